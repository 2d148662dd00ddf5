"""Questions to be answered: the first turn of a data row, or LLaVA's question files.

    {"id", "image", "conversations" | "conversatons": [{"from": "human", "value": ...}, ...]}
    {"question_id", "image", "text"}

Answers in the rows are not looked at, so files without them work as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from medmoe_jax.data import sources, templates
from medmoe_jax.data.problems import DataError, Problem

Item = TypeVar("Item")


@dataclass(frozen=True)
class Question:
    """One row of a question file."""

    row: int  # position in the file
    id: str | int  # as the file has it
    images: tuple[str, ...]  # relative to the image folder; empty = text only
    text: str  # without <image>
    options: tuple[str, ...]  # answers to choose from, where the row has them


def read_questions(file: str | Path) -> list[Question]:
    """All questions of a JSON list or JSONL file.

    Raises:
      DataError: the file cannot be read, or rows that are no questions; all of them are listed.
    """
    found, problems = [], []
    for row, record, fault in sources.records(Path(file)):
        try:
            if fault:
                raise DataError(fault)
            found.append(_question(row, record))
        except DataError as error:
            name = str(record.get("id", "")) if isinstance(record, dict) else ""
            problems.append(Problem(str(file), row, name, str(error)))
    if problems:
        lines = [f"{p.file} row {p.row} {p.id}: {p.reason}" for p in problems[:20]]
        raise DataError(
            f"{len(problems)} of {len(problems) + len(found)} rows are no questions:\n"
            + "\n".join(lines),
            problems,
        )
    if not found:
        raise DataError(f"{file} holds no question")
    return found


def _question(row: int, record: Any) -> Question:
    if not isinstance(record, dict):
        raise DataError("the row is no JSON object")
    name = sources.question_id(record, row)
    turns = record.get("conversations", record.get("conversatons"))
    if isinstance(turns, list):
        asked = [turn for turn in turns if isinstance(turn, dict) and turn.get("from") == "human"]
        text = asked[0].get("value") if asked else None
    else:
        text = record.get("text", record.get("question"))
    if not isinstance(text, str) or not text.replace(templates.IMAGE_TOKEN, "").strip():
        raise DataError("no question: give `conversations` with a human turn, or `text`")
    options = record.get("options", ())
    if not isinstance(options, (list, tuple)) or not all(isinstance(o, str) and o for o in options):
        raise DataError(f"`options` is {options!r}; give a list of texts")
    return Question(
        row,
        name,
        sources.image_names(record.get("image")),
        text.replace(templates.IMAGE_TOKEN, "").strip(),
        tuple(options),
    )


def chunk(items: Sequence[Item], number: int, index: int) -> Sequence[Item]:
    """Part `index` of `number` parts of equal size, the last one shorter.

    Raises:
      DataError: no such part.

    Source: `get_chunk` of LLaVA's `model_vqa.py`.
    """
    if not 0 <= index < number:
        raise DataError(f"chunk {index} of {number} does not exist; count from 0")
    size = -(-len(items) // number)
    return items[index * size : (index + 1) * size]


def exchanged(questions: Sequence[Question], seed: int) -> list[Question]:
    """The same questions with each image replaced by another one of the file.

    Raises:
      DataError: fewer than two different images.
    """
    names = sorted({name for question in questions for name in question.images})
    if len(names) < 2:
        raise DataError("shuffled images need a file with two different images at least")
    order = np.random.default_rng(seed).permutation(len(names))
    other = {names[a]: names[b] for a, b in zip(order, np.roll(order, 1), strict=True)}
    return [
        Question(q.row, q.id, tuple(other[name] for name in q.images), q.text, q.options)
        for q in questions
    ]
