"""Answers to a file of questions: `python -m medmoe_jax.predict --model-path DIR --question-file F
--image-folder D --answers-file OUT`.

Reads the Med-MoE and LLaVA formats (`data/questions.py`; the first question of each row is asked)
and writes the official JSONL: question_id, prompt, text, answer_id, model_id, metadata. A run that
was killed goes on where it was. Exit status: 0, or 1 if questions could not be answered (their rows
hold the reason) or nothing could be done at all.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
import uuid
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from medmoe_jax import compilation
from medmoe_jax import model as loaded
from medmoe_jax.config import ConfigError, natural
from medmoe_jax.data import images, questions
from medmoe_jax.data.medical import flags
from medmoe_jax.data.problems import DataError
from medmoe_jax.data.questions import Question
from medmoe_jax.evaluation.controls import CONTROLS
from medmoe_jax.model import Model, Reply, Request
from medmoe_jax.responder import tagged
from medmoe_jax.sampling import Sampling

SHOWN_PROBLEMS = 10


def pixels(question: Question, folder: Path, spec: images.ImageSpec, control: str) -> np.ndarray:
    """What is shown with a question, uint8[K, H, W, 3].

    Args:
      question: names its images.
      folder: of the images.
      spec: of the vision tower.
      control: 'shown' or 'shuffled' (the names were exchanged before) reads the files, 'blank' is
        the mean colour, 'noise' uniform noise that depends on the row only.

    Raises:
      DataError: an image cannot be read.
    """
    shape = (len(question.images), spec.crop, spec.crop, 3)
    if control == "blank":
        colour = np.array([round(255 * m) for m in spec.mean], np.uint8)
        return np.broadcast_to(colour, shape).copy()
    if control == "noise":
        rng = np.random.default_rng(question.row)
        return rng.integers(0, 256, shape, dtype=np.uint8)
    found = [images.load_image(images.find_image(folder, name), spec) for name in question.images]
    return np.stack(found) if found else np.zeros(shape, np.uint8)


def replies(
    model: Model,
    asked: Sequence[Question],
    folder: Path,
    how: Sampling,
    *,
    batch_size: int,
    control: str = "shown",
    score_options: bool = False,
) -> Iterator[tuple[Question, Reply | DataError]]:
    """Answers in batches of questions of like length, as they come.

    Args:
      model: that answers.
      asked: questions.
      folder: of the images.
      how: settings of generation; each question draws from a key of its own, made from its id.
      batch_size: questions answered at once.
      control: see `pixels`.
      score_options: also weigh the options of rows that have them.

    Yields:
      A question and its reply, or why it cannot be answered.
    """

    def request(question: Question) -> Request | DataError:
        try:
            shown = pixels(question, folder, model.spec, control)
            options = question.options if score_options else ()
            seed = zlib.crc32(str(question.id).encode())
            files = [folder / name for name in question.images] if control == "shown" else ()
            ready = Request(question.text, shown, options, seed, tagged(files))
            model.check_request(ready)
            return ready
        except DataError as error:
            return error

    order = sorted(asked, key=lambda q: (len(q.images), len(q.options), len(q.text), q.row))
    parts = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        # The next batch's images are read while this one is answered.
        reading = [pool.submit(request, q) for q in parts[0]] if parts else []
        for number, part in enumerate(parts):
            ready = [future.result() for future in reading]
            following = parts[number + 1] if number + 1 < len(parts) else []
            reading = [pool.submit(request, question) for question in following]
            good = [(q, r) for q, r in zip(part, ready, strict=True) if isinstance(r, Request)]
            if good:
                answered = model.answer([r for _, r in good], how, min(batch_size, len(order)))
                yield from zip([q for q, _ in good], answered, strict=True)
            for question, fault in zip(part, ready, strict=True):
                if isinstance(fault, DataError):
                    yield question, fault


def row(question: Question, reply: Reply | DataError, model_id: str, control: str) -> dict:
    """The line of the answers file."""
    metadata: dict[str, Any] = {"images": control}
    if isinstance(reply, DataError):
        metadata |= {"confidence": None, "router": None, "error": str(reply)}
    else:
        metadata |= {"confidence": reply.confidence, "router": reply.modality}
        metadata |= {"tokens": len(reply.ids), "finished": reply.finished}
        if reply.options is not None:
            metadata["options"] = reply.options
        if reply.warnings:
            metadata["warnings"] = list(reply.warnings)
    return {
        "question_id": question.id,
        "prompt": question.text,
        "text": "" if isinstance(reply, DataError) else reply.text,
        "answer_id": uuid.uuid4().hex,
        "model_id": model_id,
        "metadata": metadata,
    }


class Progress:
    """Lines already written by a run, in `OUT.partial`: its settings first, then a row each."""

    def __init__(self, out: Path, settings: dict[str, Any]) -> None:
        """Reads what an interrupted run with the same settings has left.

        Raises:
          DataError: there is a partial file of a run with other settings, or nothing can be written
            there.
        """
        self.out, self.path = out, out.with_name(out.name + ".partial")
        self.rows: dict[int, dict[str, Any]] = {}
        try:
            if out.is_dir():
                raise IsADirectoryError(errno.EISDIR, "it is a folder")
            out.parent.mkdir(parents=True, exist_ok=True)
            self._begin(settings)
        except OSError as error:
            raise DataError(
                f"{out} cannot be written ({error.strerror}); name another file with --answers-file"
            ) from error

    def _begin(self, settings: dict[str, Any]) -> None:
        found = self.path.read_bytes() if self.path.exists() else b""
        # Behind the last line's end is nothing, or a line that was cut by the end of the process.
        size = found.rfind(b"\n") + 1
        whole = [json.loads(line) for line in found[:size].split(b"\n")[:-1]]
        if len(whole) > 1 and whole[0] != settings:
            changed = [key for key in settings if whole[0].get(key) != settings[key]]
            raise DataError(
                f"{self.path} was begun with other settings ({', '.join(changed)}); finish that "
                "run, or delete the file to start anew"
            )
        for line in whole[1:]:
            self.rows[line["row"]] = line["answer"]
        if self.rows:
            os.truncate(self.path, size)
        else:
            self.path.write_text(json.dumps(settings, ensure_ascii=False) + "\n", encoding="utf-8")
        self.file = self.path.open("a", encoding="utf-8")

    def add(self, number: int, answer: dict[str, Any]) -> None:
        """Writes one answer down at once."""
        self.rows[number] = answer
        self.file.write(json.dumps({"row": number, "answer": answer}, ensure_ascii=False) + "\n")
        self.file.flush()

    def finish(self) -> None:
        """Writes the answers file, in the order of the questions, and removes the partial one."""
        self.file.close()
        lines = [json.dumps(self.rows[n], ensure_ascii=False) + "\n" for n in sorted(self.rows)]
        ready = self.out.with_name(self.out.name + ".ready")
        ready.write_text("".join(lines), encoding="utf-8")
        ready.replace(self.out)
        self.path.unlink()


def predict(args: argparse.Namespace) -> int:
    """Writes the answers of --question-file to --answers-file, in the order of the questions.

    Returns the number of questions that could not be answered.
    """
    view = flags.view(args)
    compilation.keep(args.compilation_cache)
    if args.batch_size < 1:
        raise ConfigError(f"--batch-size is {args.batch_size}; it must be 1 or more")
    if args.answers_file.resolve() == args.question_file.resolve():
        raise ConfigError(f"--answers-file {args.answers_file} is the file of the questions")
    asked = questions.read_questions(args.question_file)
    if args.images == "shuffled":
        asked = questions.exchanged(asked, args.seed)
    asked = questions.chunk(asked, args.num_chunks, args.chunk_idx)
    how = Sampling(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        repetition_penalty=args.repetition_penalty,
        beams=args.num_beams,
        max_new_tokens=args.max_new_tokens,
        stop=tuple(args.stop),
        seed=args.seed,
    )
    # May differ when a run goes on.
    free = ("answers_file", "batch_size", "mesh", "compilation_cache")
    settings = {k: str(v) for k, v in sorted(vars(args).items()) if k not in free}
    settings["content"] = f"{zlib.crc32(args.question_file.read_bytes()):08x}"  # of the questions
    progress = Progress(args.answers_file, settings)
    rest = [q for q in asked if q.row not in progress.rows]
    if len(rest) < len(asked):
        print(f"{len(asked) - len(rest)} of {len(asked)} answers are there from an earlier run")
    if rest:
        model = loaded.load(
            args.model_path,
            template=args.conv_mode,
            dtype=args.dtype,
            aspect=args.image_aspect,
            view=view,
            bits=args.bits,
            mesh=args.mesh,
        )
        stream = replies(
            model,
            rest,
            args.image_folder,
            how,
            batch_size=args.batch_size,
            control=args.images,
            score_options=args.score_options,
        )
        bar = tqdm(
            stream,
            total=len(asked),
            initial=len(asked) - len(rest),
            desc="predict",
            unit="question",
            dynamic_ncols=True,
        )
        for question, reply in bar:
            progress.add(question.row, row(question, reply, str(args.model_path), args.images))
    progress.finish()
    faults = [a for a in progress.rows.values() if "error" in a["metadata"]]
    warned = [a for a in progress.rows.values() if "warnings" in a["metadata"]]
    for answer in warned[:SHOWN_PROBLEMS]:
        print(
            f"warning: {answer['question_id']}: {answer['metadata']['warnings'][0]}",
            file=sys.stderr,
        )
    if len(warned) > SHOWN_PROBLEMS:
        print(f"warning: {len(warned)} answers have warnings in their rows", file=sys.stderr)
    print(f"{len(progress.rows) - len(faults)} answers in {args.answers_file}")
    for answer in faults[:SHOWN_PROBLEMS]:
        print(f"not answered: {answer['question_id']}: {answer['metadata']['error']}")
    if faults:
        print(f"{len(faults)} questions were not answered; their rows hold the reason")
    return len(faults)


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="Answers a file of questions about images.")
    add = parser.add_argument
    loaded.add_flags(parser)
    add("--question-file", type=Path, required=True, help="JSON or JSONL")
    add("--image-folder", type=Path, required=True)
    add("--answers-file", type=Path, required=True, help="JSONL to write")
    add("--temperature", type=float, default=0.0, help="0 = the likeliest answer")
    add("--top-k", type=int, default=0, help="draw from the k likeliest tokens; 0 = all")
    add("--top-p", type=float, default=1.0, help="draw from the tokens that reach this probability")
    add("--repetition-penalty", type=float, default=1.0)
    add("--num-beams", type=int, default=1, help="above 1: beam search")
    add("--max-new-tokens", type=int, default=256)
    add("--stop", action="append", default=[], help="text at which an answer ends; repeatable")
    add("--seed", type=natural, default=0)
    add("--num-chunks", type=int, default=1, help="parts of the file, answered by several runs")
    add("--chunk-idx", type=int, default=0, help="the part to answer, from 0")
    add("--batch-size", type=int, default=16)
    add("--image-aspect", choices=("pad", "square"), default="pad")
    add(
        "--images",
        choices=("shown", *CONTROLS),
        default="shown",
        help="what is shown instead of the image",
    )
    add("--score-options", action="store_true", help="weigh the options of rows that have them")
    add("--mesh", type=loaded.mesh_sizes, help="DATA,FSDP,EXPERT devices, as 1,2,4; default: one")
    compilation.add_flag(parser)
    flags.add_view(parser)
    return parser


def main() -> None:
    """Command line."""
    try:
        sys.exit(1 if predict(arguments().parse_args()) else 0)
    except loaded.FAULTS as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
