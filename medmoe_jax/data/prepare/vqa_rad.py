"""VQA-RAD: questions of clinicians about radiology images (Lau et al. 2018).

Two layouts are read: the original (`VQA_RAD Dataset Public.json` and its image folder), and
parquet files with the columns image, question and answer, as mirrors have them. The mirrors lost
answer types, ids and question types, and rows that were there twice.

No layout has modalities. Rules, in this order: what questions for the modality about the same image
were answered; else the organ: CHEST is X-ray, ABD is CT, HEAD remains unknown (CT or MRI).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from medmoe_jax.data.prepare import layouts, mirror, spoken, stream, tables
from medmoe_jax.data.prepare.texts import Reading
from medmoe_jax.data.prepare.types import (
    DataSet,
    Event,
    Licence,
    Opened,
    Published,
    from_folder,
)
from medmoe_jax.data.problems import DataError

NAME = "vqa_rad"
LICENCE = Licence(
    "CC0-1.0",
    "https://osf.io/89kps/",
    "Public domain dedication, as the data set's card on the Hugging Face hub states it.",
    "Lau et al., A dataset of clinically generated visual questions and answers about radiology "
    "images, Scientific Data 2018.",
)
ORIGINAL = Published(
    "the original release", {"train": 1797, "test": 451, "test CLOSED": 272, "test OPEN": 179}
)
MIRROR = Published(
    "the mirror flaviagiammarino/vqa-rad, which has 4 doubled rows less and types by rule",
    {"train": 1793, "test": 451, "test CLOSED": 251, "test OPEN": 200},
)
LAYOUTS = """  a folder with 'VQA_RAD Dataset Public.json' and 'VQA_RAD Image Folder/', or that JSON
  a folder with parquet files (train-....parquet, test-....parquet) of image, question, answer"""

PHRASES = {"freeform": "train", "para": "train", "test_freeform": "test", "test_para": "test"}
ORGANS = {"CHEST": "X-ray", "ABD": "CT"}
BY_ORGAN = "image_organ: CHEST is X-ray, ABD is CT, HEAD unknown"


def _infer(reading: Reading, told: Mapping[str, set[str]], image: str, organ: str) -> str:
    modality, rule = spoken.infer(told, image)
    if not rule and organ in ORGANS:
        modality, rule = ORGANS[organ], BY_ORGAN
    if rule:
        reading.rules["modality"] = rule
    return modality


def _split(row: dict[str, Any]) -> str:
    return PHRASES.get(str(row.get("phrase_type")).strip().lower(), "")


def _original(files: Sequence[tuple[Path, list]], folder: Path) -> Iterator[Event]:
    asked = [
        (str(row.get("image_name")).strip(), str(row.get("question")), str(row.get("answer")))
        for _, rows in files
        for row in rows
        if isinstance(row, dict) and "MODALITY" in str(row.get("question_type")).upper()
    ]
    told = spoken.modalities(asked)
    for file, rows in files:
        make = partial(_row, file, folder, told)
        yield from stream.events(file, enumerate(rows), make, _split)


def _row(
    file: Path, folder: Path, told: Mapping[str, set[str]], place: int, row: dict[str, Any]
) -> Event:
    split = _split(row)
    if not split:
        raise DataError(
            f"phrase_type {row.get('phrase_type')!r} is unknown; known are {', '.join(PHRASES)}"
        )
    reading = Reading(split, NAME, LICENCE.name)
    question = reading.text(row.get("question"), "question")
    answer = reading.text(row.get("answer"), "answer")
    image = str(row.get("image_name") or "").strip()
    if not image:
        raise DataError("no image_name")
    organ = str(row.get("image_organ") or "").strip().upper()
    kinds = str(row.get("question_type") or "").upper().split(",")
    return reading.draft(
        file=str(file),
        place=place,
        id=stream.row_id(row, place, split),
        turns=[(question, answer)],
        answer_type=reading.answer_type(row.get("answer_type"), answer),
        modality=_infer(reading, told, image, organ),
        question_type=", ".join(kind.strip() for kind in kinds if kind.strip()),
        pictures=[from_folder(folder, image)],
        more={"phrase_type": str(row["phrase_type"]).strip().lower(), "organ": organ},
    )


def read(sources: Sequence[Path], options: argparse.Namespace) -> Opened:
    """Recognises the layout; see `types.DataSet`."""
    source = layouts.only(sources)
    parquet = layouts.files(source, ".parquet")
    if parquet:
        files = tables.split_files(parquet)
        return Opened(
            "parquet mirror",
            mirror.events(files, NAME, LICENCE.name, lambda reading, row: ""),
            (LICENCE,),
            (MIRROR, ORIGINAL),
            tables.count(parquet),
            ("the mirror has no answer types, so they differ from the original's 272 closed",),
        )
    found = []
    for path in layouts.files(source, ".json"):
        rows = layouts.read_json(path)
        if isinstance(rows, list) and any(isinstance(r, dict) and "phrase_type" in r for r in rows):
            found.append((path, rows))
    if not found:
        raise layouts.unknown(source, f"a JSON list with phrase_type, or parquet files\n{LAYOUTS}")
    names = [
        str(r.get("image_name")).strip() for _, rows in found for r in rows if isinstance(r, dict)
    ]
    return Opened(
        "original JSON and image folder",
        _original(found, layouts.image_folder(source, names, options.images)),
        (LICENCE,),
        (ORIGINAL, MIRROR),
        sum(len(rows) for _, rows in found),
    )


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--images", type=Path, help="folder of the images, if it is not in the source"
    )


DATA_SET = DataSet(NAME, "VQA-RAD: radiology, 2,248 questions", LAYOUTS, read, _add_arguments)
