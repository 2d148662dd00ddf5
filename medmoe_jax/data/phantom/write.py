"""The files of a phantom data set: PNG images, and JSON that imitates LLaVA-Med and Med-MoE.

Training and held-out images are different; within each part the files share the images.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from medmoe_jax.data.phantom import rows
from medmoe_jax.data.phantom.balance import select
from medmoe_jax.data.phantom.questions import CAPTION_PROMPTS, caption, questions
from medmoe_jax.data.phantom.render import SPLITS, draw_facts, draw_image
from medmoe_jax.data.phantom.signs import questions as sign_questions
from medmoe_jax.data.phantom.signs import random_signs

CHUNK = 40  # images a task of the process pool
FEWEST = 8  # images of a part: two of every modality
SMALLEST = 56  # pixels of an image's longer side
UNSEEN = "pretrain"  # studies that are in no file

README = """# Phantom studies

Synthetic images, drawn by `python -m medmoe_jax.data.phantom` with seed {seed}: {train} for
training and {test} held out. They show no patient and must not be used to judge anything about real
patients. "Left", "right", "upper" and "lower" are sides of the image, not of a body.

| file | rows | what it is |
|---|---|---|
{table}

Paths in the files are relative to `images/`. Licence: `licence.txt` (for programs `summary.json`).
"""
CONTENTS = {
    "images": "PNG: grey (CT, MRI, X-ray) or colour (Pathology)",
    "alignment.json": "captions like LLaVA-Med's alignment file (key `conversatons`)",
    "instruct.json": "conversations with `domain` flags like LLaVA-Med's",
    "instruct_heldout.json": "the same on held-out images",
    "train_all.json": "single questions like Med-MoE's stage 3, open and closed",
    "test.json": "the same on held-out images",
    "classify_train.json": "class labels, as prompts with options",
    "classify_test.json": "the same on held-out images",
    "signs_train.json": "questions that take a rule of the modality (`signs.py`)",
    "signs_test.json": "the same on held-out images",
    "classify_more_train.json": "two further classification tasks",
    "classify_more_test.json": "the same on held-out images",
    "studies.jsonl": "the facts behind every image: what is shown, where lesions are",
}
LICENCE = """The images and texts in this folder are synthetic. They were computed by a program and
contain no data of any person. They are dedicated to the public domain (CC0 1.0,
https://creativecommons.org/publicdomain/zero/1.0/). Not for clinical use.
"""
SUMMARY = {
    "name": "phantom",
    "licences": [
        {
            "name": "CC0-1.0",
            "link": "https://creativecommons.org/publicdomain/zero/1.0/",
            "note": "synthetic images and texts, computed by a program",
            "citation": "",
        }
    ],
}


def _draw_files(task: tuple[str, int, str, int, int, int]) -> int:
    """Writes images `start` to `stop` - 1 of a split; runs in a worker process. Returns their
    number."""
    folder, seed, split, start, stop, size = task
    for index in range(start, stop):
        image, _ = draw_image(seed, split, index, size)
        path = Path(folder) / f"{rows.image_name(split, index)}.png"
        Image.fromarray(image).save(path, compress_level=1)
    return stop - start


def check(train: int, test: int, size: int) -> None:
    """Raises ValueError where `write` would have too few images, or too small ones."""
    if min(train, test) < FEWEST or size < SMALLEST:
        raise ValueError(
            f"train={train}, test={test}, size={size} is too small: "
            f"use at least {FEWEST} images a part and {SMALLEST} pixels"
        )


def write(
    out: str | Path,
    seed: int = 0,
    train: int = 1600,
    test: int = 240,
    size: int = 224,
    questions_per_image: tuple[float, float] = (4.0, 3.0),
    workers: int = 1,
    signs: bool = False,
) -> dict[str, int]:
    """Writes a whole data set into the folder `out` (made if absent; what an earlier call wrote
    there is replaced, and its rows are removed first, as they would be about other images).

    Args:
      out: folder.
      seed: the same seed gives the same files, whatever `workers` is; an image does not depend on
        `train` and `test`.
      train: number of training images.
      test: number of held-out images.
      size: longer side of the images, pixels.
      questions_per_image: rows of `train_all.json` and of `test.json` an image, about.
      workers: processes that draw; 1 draws in this one.
      signs: also write the harder questions of `signs.py`, as many as others, and two further
        classification tasks. The other files stay what they are without.

    Returns:
      Number of rows by file name, and of images under "images".

    Raises:
      ValueError: too few images, or too small.
    """
    check(train, test, size)
    out = Path(out)
    (out / "images").mkdir(parents=True, exist_ok=True)
    for name in CONTENTS.keys() - {"images"}:
        (out / name).unlink(missing_ok=True)
    folder = str(out / "images")
    tasks = [
        (folder, seed, split, start, min(start + CHUNK, number), size)
        for split, number in (("train", train), ("test", test))
        for start in range(0, number, CHUNK)
    ]
    if workers > 1:
        # Fresh processes: a fork would copy the threads of libraries that are loaded already.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            images = sum(pool.map(_draw_files, tasks))
    else:
        images = sum(map(_draw_files, tasks))

    studies = {
        split: [draw_facts(seed, split, index) for index in range(number)]
        for split, number in (("train", train), ("test", test))
    }

    def source(number: int) -> np.random.Generator:
        return np.random.default_rng([seed, len(SPLITS), number])

    files: dict[str, rows.Rows] = {
        "alignment": rows.alignment("train", studies["train"], source(0)),
        "instruct": rows.instruct("train", studies["train"], source(1)),
        "instruct_heldout": rows.instruct("test", studies["test"], source(2)),
        "train_all": rows.stage3(
            "train", studies["train"], source(3), round(train * questions_per_image[0])
        ),
        "test": rows.stage3(
            "test", studies["test"], source(4), round(test * questions_per_image[1])
        ),
        "classify_train": rows.classify("train", studies["train"], source(5)),
        "classify_test": rows.classify("test", studies["test"], source(6)),
    }
    if signs:
        wanted = (round(train * questions_per_image[0]), round(test * questions_per_image[1]))
        for place, (split, total) in enumerate(zip(studies, wanted, strict=True)):
            part = studies[split]
            files[f"signs_{split}"] = rows.rules(split, part, source(7 + place), total)
            files[f"classify_more_{split}"] = rows.classify_more(split, part)
    for name, content in files.items():
        (out / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    lines = [
        json.dumps(rows.study(split, index, facts))
        for split, part in studies.items()
        for index, facts in enumerate(part)
    ]
    (out / "studies.jsonl").write_text("\n".join(lines) + "\n")
    counts = {f"{name}.json": len(content) for name, content in files.items()}
    counts |= {"studies.jsonl": len(lines), "images": images}
    table = "\n".join(
        f"| `{name}` | {counts[name]} | {what} |"
        for name, what in CONTENTS.items()
        if name in counts
    )
    readme = README.format(seed=seed, train=train, test=test, table=table)
    (out / "README.md").write_text(readme)
    (out / "licence.txt").write_text(LICENCE)
    (out / "summary.json").write_text(json.dumps(SUMMARY | {"seed": seed}, indent=1) + "\n")
    return counts


def texts(seed: int, n: int, signs: bool = False) -> Iterator[str]:
    """All the language of `n` studies that are in no file: prompts, captions, questions with their
    answers.

    Meant for training a tokenizer or a small language model; needs no rendering. With `signs`,
    those of `signs.py` too.
    """
    yield from CAPTION_PROMPTS
    studies = [draw_facts(seed, UNSEEN, index) for index in range(n)]
    for facts in studies:
        yield caption(facts)
        asked = questions(facts) + (sign_questions(facts) if signs else [])
        for question in asked:
            yield f"{question.text} {question.answer}"
    for row in rows.classify(UNSEEN, studies, np.random.default_rng(seed)):
        prompt, answer = (turn["value"] for turn in row["conversations"])
        yield f"{prompt.removeprefix('<image>').lstrip()} {answer}"


def readings(
    seed: int, n: int, rounds: int, signs: bool = False
) -> Iterator[list[tuple[str, str]]]:
    """Conversations about the captions of `n` studies that are in no file: about `rounds` questions
    with their answers, balanced, the caption before the first of them.

    Meant for training a small language model to read; needs no rendering. With `signs`, every
    second caption also says a diagnosis and a next step, and the questions of `signs.py` are asked
    about them: these are drawn at random, so the words are met and no rule is.
    """
    studies = [draw_facts(seed, UNSEEN, index) for index in range(n)]
    rng = np.random.default_rng([seed, n, rounds])
    chosen = select([questions(f) for f in studies], n * rounds, rng)
    for number, (facts, asked) in enumerate(zip(studies, chosen, strict=True)):
        turns = [(question.text, question.answer) for question in asked]
        told = caption(facts)
        if signs and number % 2:
            said, random = random_signs(rng)
            told += said
            turns = [(q.text, q.answer) for q in random] + turns
        if turns:
            turns[0] = (f"{told}\n{turns[0][0]}", turns[0][1])
            yield turns
