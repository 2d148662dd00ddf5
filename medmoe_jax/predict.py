"""Answers to a file of questions: `python -m medmoe_jax.predict --model-path DIR --question-file F
--image-folder D --answers-file OUT`.

Reads the Med-MoE and LLaVA-Med JSON formats (the first question of each row is asked) and writes
the official JSONL: question_id, prompt, text, answer_id, model_id, metadata.
"""

from __future__ import annotations

import argparse
import json
import sys
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from medmoe_jax import checkpoint, generate
from medmoe_jax.config import ConfigError, ModelConfig
from medmoe_jax.data import images, merge, problems, sources, templates, tokens

LENGTH_STEP = 32  # prompts are padded to a multiple, so that few programs are compiled
CONTROLS = ("shown", "blank")


@dataclass
class Answerer:
    """A loaded model with what it takes to ask it something."""

    params: dict[str, Any]
    model: ModelConfig
    tokenizer: Any
    spec: images.ImageSpec
    template: str
    dtype: Any

    @classmethod
    def load(cls, folder: Path, template: str, dtype: str, aspect: str = "pad") -> Answerer:
        """Reads a model folder.

        Args:
          folder: made by `convert to-jax` or by a training phase.
          template: of the conversation; '' = the one named like the language model.
          dtype: of weights (router excepted) and computation.
          aspect: 'pad' as in training, 'square' as the official evaluation crops.

        Raises:
          CheckpointError, DataError: the folder cannot be used.
        """
        params, meta = checkpoint.load_model(folder)
        family = meta.model.llm.family
        return cls(
            jax.device_put(params),
            meta.model,
            tokens.load_tokenizer(folder / "tokenizer", family),
            images.read_image_spec(folder / "preprocessor_config.json", aspect),
            template or family,
            jnp.dtype(dtype),
        )

    def answer(
        self, questions: Sequence[str], pictures: Sequence[np.ndarray], max_new: int
    ) -> list[tuple[str, float]]:
        """Greedy answers to a batch.

        Args:
          questions: one a row.
          pictures: one a row, uint8[K, H, W, 3] (K may be 0), shown before the question.
          max_new: most tokens of an answer.

        Returns:
          (text, probability of the whole answer) for each row.
        """
        rows = []
        for question, shown in zip(questions, pictures, strict=True):
            text = templates.prompt(self.template, question, images=len(shown))
            ids = tokens.encode_prompt(text, self.tokenizer)
            rows.append(merge.expand(ids, None, self.model.vision.patches))
        longest = max(len(row.tokens) for row in rows)
        batch = merge.pad_rows(rows, -(-longest // LENGTH_STEP) * LENGTH_STEP)
        most = max(1, *(len(shown) for shown in pictures))
        size = self.spec.crop
        stack = np.zeros((len(rows), most, size, size, 3), np.uint8)
        for place, shown in enumerate(pictures):
            stack[place, : len(shown)] = shown
        left = generate.left_padded(batch | {"images": stack})
        eos = jnp.asarray(self.tokenizer.eos_token_id)
        out = jax.device_get(
            generate.greedy(self.params, self.model, left, eos, max_new=max_new, dtype=self.dtype)
        )
        return [
            (
                self.tokenizer.decode(ids[:n], skip_special_tokens=True).strip(),
                float(np.exp(total)),
            )
            for ids, n, total in zip(out.ids, out.lengths, out.log_probs, strict=True)
        ]


def blank(spec: images.ImageSpec) -> np.ndarray:
    """An image that shows nothing: the mean colour, uint8[H, W, 3]."""
    colour = np.array([round(255 * m) for m in spec.mean], np.uint8)
    return np.broadcast_to(colour, (spec.crop, spec.crop, 3)).copy()


def answers(
    model: Answerer,
    rows: Sequence[sources.Sample],
    folder: Path,
    *,
    batch_size: int,
    max_new: int,
    control: str,
) -> Iterator[tuple[sources.Sample, str, str, float]]:
    """(row, question, answer, probability) for every row, batched by length; order as batched.

    Raises:
      DataError: an image cannot be read.
    """
    order = sorted(rows, key=lambda s: (len(s.images), len(s.turns[0][1])))
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        asked = [s.turns[0][1].replace(templates.IMAGE_TOKEN, "").strip() for s in part]
        shown = []
        for sample in part:
            pixels = [
                blank(model.spec)
                if control == "blank"
                else images.load_image(images.find_image(folder, name), model.spec)
                for name in sample.images
            ]
            size = model.spec.crop
            shown.append(np.stack(pixels) if pixels else np.zeros((0, size, size, 3), np.uint8))
        # A short last batch is filled up, so that it needs no program of its own.
        fill = batch_size - len(part) if start else 0
        found = model.answer(asked + asked[:1] * fill, shown + shown[:1] * fill, max_new)
        for sample, question, (text, probability) in zip(part, asked, found, strict=False):
            yield sample, question, text, probability


def predict(args: argparse.Namespace) -> None:
    """Writes the answers of --question-file to --answers-file, in the order of the questions."""
    loaded = sources.read_samples([args.question_file], args.image_folder, "error")
    model = Answerer.load(args.model_path, args.conv_mode, args.dtype, args.image_aspect)
    found = {}
    bar = tqdm(total=len(loaded.samples), desc="predict", unit="question", dynamic_ncols=True)
    stream = answers(
        model,
        loaded.samples,
        args.image_folder,
        batch_size=args.batch_size,
        max_new=args.max_new_tokens,
        control=args.images,
    )
    for sample, question, text, probability in stream:
        found[sample.file, sample.row] = {
            "question_id": sample.id,
            "prompt": question,
            "text": text,
            "answer_id": uuid.uuid4().hex,
            "model_id": str(args.model_path),
            "metadata": {"confidence": probability, "images": args.images},
        }
        bar.update()
    bar.close()
    args.answers_file.parent.mkdir(parents=True, exist_ok=True)
    with args.answers_file.open("w", encoding="utf-8") as file:
        for sample in loaded.samples:
            file.write(json.dumps(found[sample.file, sample.row], ensure_ascii=False) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Answers a file of questions about images.")
    parser.add_argument("--model-path", type=Path, required=True, help="a model folder")
    parser.add_argument("--question-file", type=Path, required=True, help="JSON or JSONL")
    parser.add_argument("--image-folder", type=Path, required=True)
    parser.add_argument("--answers-file", type=Path, required=True, help="JSONL to write")
    parser.add_argument("--conv-mode", default="", help="phi or stablelm; default: the model's")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--image-aspect", choices=("pad", "square"), default="pad")
    parser.add_argument(
        "--images", choices=CONTROLS, default="shown", help="'blank' shows an empty image instead"
    )
    parser.add_argument(
        "--dtype", default="float32" if jax.default_backend() == "cpu" else "bfloat16"
    )
    try:
        predict(parser.parse_args())
    except (ConfigError, checkpoint.CheckpointError, problems.DataError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
