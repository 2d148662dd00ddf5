"""Mirrors of the VQA sets: parquet files with an image, a question and an answer a row, and as
many of the original's fields as the mirror has kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from medmoe_jax.data.prepare import spoken, stream, tables
from medmoe_jax.data.prepare.texts import Reading
from medmoe_jax.data.prepare.types import Event, Picture, from_bytes
from medmoe_jax.data.problems import DataError

IMAGE = ("image", "images")
QUESTION = ("question", "problem", "sent")
NEEDED = (IMAGE, QUESTION, ("answer",))


def events(
    files: Sequence[tuple[str, Path]],
    source: str,
    licence: str,
    state: Callable[[Reading, dict[str, Any]], str],
    leave_out: Callable[[Reading, dict[str, Any]], Event | None] = lambda reading, row: None,
) -> Iterator[Event]:
    """Rows of all files.

    Args:
      files: split and file.
      source: name of the data set.
      licence: its licence.
      state: the modality that the data set or the row states, '' for none; then answers to
        questions for the modality of the same image tell.
      leave_out: a row that is known not to be wanted.
    """
    told = _told(files, state, Reading("train", source, licence))
    first: dict[str, int] = {}  # split -> rows in the files before
    for split, file in files:
        start = first.get(split, 0)
        make = partial(_row, (source, licence, split), file, start, state, leave_out, told)
        number = 0
        rows = tables.rows(file, NEEDED)
        for event in stream.events(file, rows, make, split):
            number += 1
            yield event
        first[split] = start + number


def _row(
    about: tuple[str, str, str],
    file: Path,
    start: int,
    state: Callable[[Reading, dict[str, Any]], str],
    leave_out: Callable[[Reading, dict[str, Any]], Event | None],
    told: dict[str, set[str]],
    place: int,
    row: dict[str, Any],
) -> Event:
    source, licence, split = about
    reading = Reading(split, source, licence)
    unwanted = leave_out(reading, row)
    if unwanted is not None:
        return unwanted
    question = reading.text(tables.first(row, QUESTION), "question")
    answer = reading.text(row["answer"], "answer")
    pictures = _pictures(row)
    modality = state(reading, row)
    if not modality:
        modality, rule = spoken.infer(told, pictures[0].name)
        if rule:
            reading.rules["modality"] = rule
    return reading.draft(
        file=str(file),
        place=place,
        id=stream.row_id(row, start + place, split),
        turns=[(question, answer)],
        answer_type=reading.answer_type(row.get("answer_type"), answer),
        modality=modality,
        question_type=str(tables.first(row, ("question_type", "content_type")) or "").strip(),
        pictures=pictures,
    )


def _pictures(row: dict[str, Any]) -> list[Picture]:
    value = tables.first(row, IMAGE)
    values = value if isinstance(value, list) else [value]
    if not values:
        raise DataError("the row has no image inside")
    return [from_bytes(tables.image_bytes(one)) for one in values]


def _told(
    files: Sequence[tuple[str, Path]],
    state: Callable[[Reading, dict[str, Any]], str],
    reading: Reading,
) -> dict[str, set[str]]:
    """What the questions for the modality say, of all splits; nothing where rows state theirs."""
    asked = []
    for _, file in files:
        for number, row in tables.rows(file, NEEDED):
            if number == 0 and state(reading, row):
                break
            question = str(tables.first(row, QUESTION))
            if spoken.asks_modality(question):
                try:
                    asked.append((_pictures(row)[0].name, question, str(row["answer"])))
                except DataError:
                    continue  # reported when the row itself is read
    return spoken.modalities(asked)
