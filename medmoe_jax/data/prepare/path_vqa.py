"""PathVQA: questions about pathology images from textbooks (He et al. 2020).

Layouts: the original pickles, `{train,val,test}_vqa.pkl` (img_id, sent, label, answer_type,
question_id, question_type) or `{train,val,test}_qa.pkl` (image, question, answer) with the images
in `images/{train,val,test}/`; and parquet mirrors, which lost answer types and cleaned rows up.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from medmoe_jax.data.prepare import layouts, mirror, pickles, stream, tables
from medmoe_jax.data.prepare.texts import Reading, split_of
from medmoe_jax.data.prepare.types import (
    SPLITS,
    DataSet,
    Event,
    Licence,
    Opened,
    Picture,
    Published,
    from_folder,
)
from medmoe_jax.data.problems import DataError

NAME = "path_vqa"
LICENCE = Licence(
    "MIT",
    "https://github.com/UCSD-AI4H/PathVQA",
    "As the data set's card on the Hugging Face hub states it. The pictures come from textbooks "
    "and a digital library whose terms may say more.",
    "He et al., PathVQA: 30000+ questions for medical visual question answering, 2020.",
)
ORIGINAL = Published("the original release", {"train": 19755, "val": 6279, "test": 6761})
MIRROR = Published(
    "the mirror flaviagiammarino/path-vqa, after its clean-up",
    {"train": 19654, "val": 6259, "test": 6719},
)
LAYOUTS = """  a folder with train_vqa.pkl, val_vqa.pkl, test_vqa.pkl (or *_qa.pkl), images/train/
  a folder with parquet files (train-....parquet, ...) of image, question, answer"""
PATHOLOGY = "all images of PathVQA are pathology"
SUFFIXES = (".jpg", ".jpeg", ".png")


def _modality(reading: Reading, row: dict[str, Any]) -> str:
    reading.rules["modality"] = PATHOLOGY
    return "Pathology"


def _answer(row: dict[str, Any]) -> Any:
    """The answer with the highest score; `label` is {answer: score} in the VQA pickles."""
    label = row.get("label", row.get("answer"))
    if not isinstance(label, dict):
        return label
    try:
        return max(label, key=label.__getitem__) if label else None
    except TypeError as error:
        raise DataError(f"label {label!r} must be answers with their scores") from error


def _picture(folder: Path, split: str, name: str) -> Picture:
    """Image of a row: in its split's folder, or in the one that its name begins with."""
    if not name:
        raise DataError("no img_id")
    fault: DataError | None = None
    for place in dict.fromkeys((split, name.partition("_")[0])):
        for suffix in ("",) if name.lower().endswith(SUFFIXES) else SUFFIXES:
            try:
                return from_folder(folder, f"{place}/{name}{suffix}")
            except DataError as error:
                fault = fault or error
    raise fault or DataError(f"no image {name!r}")


def _row(file: Path, split: str, folder: Path, place: int, row: dict[str, Any]) -> Event:
    reading = Reading(split, NAME, LICENCE.name)
    question = reading.text(row.get("sent", row.get("question")), "question")
    label = row.get("label")
    if isinstance(label, dict) and len(label) > 1:
        reading.handled.append("label: several answers, the one with the highest score taken")
    answer = reading.text(_answer(row), "answer")
    name = str(tables.first(row, ("img_id", "image")) or "").strip()
    return reading.draft(
        file=str(file),
        place=place,
        id=stream.row_id(row, place, split),
        turns=[(question, answer)],
        answer_type=reading.answer_type(row.get("answer_type"), answer),
        modality=_modality(reading, row),
        question_type=str(row.get("question_type") or "").strip(),
        pictures=[_picture(folder, split, name)],
    )


def _original(files: Sequence[tuple[str, Path, list]], folder: Path) -> Iterator[Event]:
    for split, file, rows in files:
        yield from stream.events(file, enumerate(rows), partial(_row, file, split, folder), split)


def _pickles(source: Path) -> list[tuple[str, Path, list]]:
    """One list of questions for each split, the one with answer types where there are two."""
    found: dict[str, Path] = {}
    for ending in ("_qa", "_vqa"):
        for path in layouts.files(source, ".pkl", ".pickle"):
            split = split_of(path.stem)
            if split and path.stem.lower().endswith(ending):
                found[split] = path
    lists = []
    for split in SPLITS:
        if split in found:
            rows = pickles.read(found[split])
            if not isinstance(rows, list):
                raise DataError(f"{found[split]} holds no list of questions")
            lists.append((split, found[split], rows))
    return lists


def read(sources: Sequence[Path], options: argparse.Namespace) -> Opened:
    """Recognises the layout; see `types.DataSet`."""
    source = layouts.only(sources)
    parquet = layouts.files(source, ".parquet")
    if parquet:
        events = mirror.events(tables.split_files(parquet), NAME, LICENCE.name, _modality)
        count = tables.count(parquet)
        return Opened("parquet mirror", events, (LICENCE,), (MIRROR, ORIGINAL), count)
    found = _pickles(source)
    if not found:
        raise layouts.unknown(source, f"pickles or parquet files\n{LAYOUTS}")
    names = [
        f"{split}/{tables.first(row, ('img_id', 'image'))}{suffix}"
        for split, _, rows in found
        for row in islice((row for row in rows if isinstance(row, dict)), layouts.TRIED // 9)
        for suffix in SUFFIXES
    ]
    folder = layouts.image_folder(source, names, options.images)
    total = sum(len(rows) for _, _, rows in found)
    events = _original(found, folder)
    return Opened("original pickles", events, (LICENCE,), (ORIGINAL, MIRROR), total)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--images", type=Path, help="folder with train/, val/, test/, if it is not in the source"
    )


DATA_SET = DataSet(NAME, "PathVQA: pathology, 32,632 questions", LAYOUTS, read, _add_arguments)
