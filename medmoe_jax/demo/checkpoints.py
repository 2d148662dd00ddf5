"""Makes the tiny PyTorch checkpoints that the demonstration starts from.

    python -m medmoe_jax.demo.checkpoints --out DIR --llm phi

writes `DIR/clip` (a CLIP vision tower) and `DIR/llm` (Phi or StableLM, with a tokenizer) in Hugging
Face's layout: what a real user downloads, at a size that a laptop trains in a minute. Both are
pretrained shortly on phantom studies that appear in no data file (see `pretrain.py`).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from medmoe_jax import checkpoint, presets
from medmoe_jax.config import ModelConfig, natural
from medmoe_jax.convert.report import ConversionError
from medmoe_jax.convert.to_jax import check_empty
from medmoe_jax.convert.to_torch import to_torch
from medmoe_jax.data import images, phantom, templates, tokens
from medmoe_jax.demo import pretrain

PRESET = {"phi": "tiny", "stablelm": "tiny_stablelm"}
WORDS = 1000  # size of the tokenizer
RENDER = 112  # pixels at which pretraining images are drawn
CHUNK = 100  # images a worker draws at once
STUDIES_NAMED = 800  # whose texts make the tokenizer
STUDIES_READ = 8000  # whose reports the language model reads
ROUNDS = 8  # questions about a report
LENGTH = 152  # tokens of a reading; what is longer is cut
ANSWER_WEIGHT = 5.0  # of an answer's token in the loss, against one of the report or a question


def make_tokenizer(texts: Iterable[str], folder: Path) -> None:
    """Trains a byte-level BPE on `texts` and writes it as a Hugging Face tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [templates.END, tokens.STABLELM_UNK]
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS,
        special_tokens=special,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    end = templates.END
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end, unk_token=end
    )
    fast.add_special_tokens({"additional_special_tokens": special[1:]})
    fast.save_pretrained(folder)


def readings(
    seed: int, n: int, template: str, tokenizer: Any, signs: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """i32[N, LENGTH] and f32[N, LENGTH]: reports of `n` studies (N <= n have questions) with
    questions and answers, and the weight of each token in the loss."""
    conversations = list(phantom.readings(seed, n, ROUNDS, signs))
    ids = np.zeros((len(conversations), LENGTH), np.int32)
    weights = np.zeros(ids.shape, np.float32)
    for row, rounds in enumerate(conversations):
        pairs = [((templates.HUMAN, asked), (templates.GPT, said)) for asked, said in rounds]
        spans = templates.render(template, [turn for pair in pairs for turn in pair])
        encoded = tokens.encode(spans, tokenizer)
        size = min(len(encoded.ids), LENGTH)
        ids[row, :size] = encoded.ids[:size]
        learnt = np.array(encoded.labels[:size]) != tokens.IGNORE
        weights[row, :size] = np.where(learnt, ANSWER_WEIGHT, 1.0)
    return ids, weights


def patch_classes(facts: phantom.Facts, side: int) -> np.ndarray:
    """i32[side * side]: for each patch 0, or 2 * quadrant + (1 small, 2 large) where a lesion
    is."""
    size = phantom.lesion_map(facts, side)
    far = np.arange(side) >= side / 2
    quadrant = 2 * far[:, None] + far[None, :]
    return np.where(size > 0, 2 * quadrant + size, 0).astype(np.int32).reshape(-1)


def _draw(start: int, seed: int, size: int, side: int) -> list[tuple[Any, ...]]:
    spec = images.ImageSpec(size, size)
    studies = phantom.generate(seed, CHUNK, size=RENDER, start=start)
    return [
        (images.fit(Image.fromarray(pixels).convert("RGB"), spec), f.ids(), patch_classes(f, side))
        for pixels, f in studies
    ]


def draw_images(n: int, seed: int, size: int, side: int) -> tuple[Any, dict[str, Any], Any]:
    """uint8[n, size, size, 3] pretraining images, their facts and patch classes; n in hundreds."""
    draw = partial(_draw, seed=seed, size=size, side=side)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        studies = [study for part in pool.map(draw, range(0, n, CHUNK)) for study in part]
    pixels, facts, classes = zip(*studies, strict=True)
    named = {k: np.array([f[k] for f in facts], np.int32) for k in facts[0]}
    return np.stack(pixels), named, np.stack(classes)


def write_part(name: str, params: dict[str, Any], model: ModelConfig, folder: Path) -> None:
    """One part of a model ('vision' or 'llm') as a Hugging Face folder."""
    with tempfile.TemporaryDirectory() as scratch:
        meta = checkpoint.ModelMeta("base", model, history=["short pretraining on phantom studies"])
        checkpoint.save_model(Path(scratch) / "model", {name: params}, meta)
        to_torch(Path(scratch) / "model", folder, layout="hf")


def make_vision(out: Path, model: ModelConfig, seed: int, studies: int, steps: int) -> None:
    """Writes `out`, the CLIP tower of `model`; prints what was learned and how long it took."""
    side = model.vision.image_size // model.vision.patch_size
    started = time.perf_counter()
    pixels, facts, classes = draw_images(studies, seed, model.vision.image_size, side)
    tower, accuracy = pretrain.vision(model.vision, pixels, facts, classes, steps=steps, seed=seed)
    write_part("vision", tower, model, out)
    print(f"{out}: facts right {accuracy:.1%}, {time.perf_counter() - started:.0f} s", flush=True)


def make_language(
    out: Path, model: ModelConfig, seed: int, steps: int, signs: bool = False
) -> None:
    """Writes `out`, the language model of `model`, with a tokenizer that knows the words of all
    phantom questions (with `signs`, also those of `data/phantom/signs.py`); prints what was learned
    and how long it took."""
    started = time.perf_counter()
    template = model.llm.family
    named = phantom.texts(seed, STUDIES_NAMED, signs)
    words = out.with_name(f"{out.name}.tokenizer")
    make_tokenizer((templates.prompt(template, t, images=0) for t in named), words)
    tokenizer = tokens.load_tokenizer(words, model.llm.family)
    ids, weight = readings(seed, STUDIES_READ, template, tokenizer, signs)
    weights, loss = pretrain.language(model, ids, weight, steps=steps, seed=seed)
    write_part("llm", weights, model, out)
    for file in words.iterdir():
        file.rename(out / file.name)
    words.rmdir()
    seconds = time.perf_counter() - started
    print(f"{out}: loss {loss:.2f} a token, {seconds:.0f} s", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--llm", choices=sorted(PRESET), default="phi")
    parser.add_argument("--seed", type=natural, default=0)
    parser.add_argument("--studies", type=int, default=4000, help="pretraining images, hundreds")
    parser.add_argument("--vision-steps", type=int, default=2000)
    parser.add_argument("--language-steps", type=int, default=750)
    args = parser.parse_args()
    try:
        for part in ("clip", "llm"):  # told before, not after, the pretraining
            check_empty(args.out / part)
    except ConversionError as error:
        sys.exit(f"error: {error}")
    model = presets.model(PRESET[args.llm])
    make_vision(args.out / "clip", model, args.seed, args.studies, args.vision_steps)
    make_language(args.out / "llm", model, args.seed, args.language_steps)


if __name__ == "__main__":
    main()
