"""VQA-RAD: questions of clinicians about radiology images (Lau et al. 2018).

Two layouts are read: the original (`VQA_RAD Dataset Public.json` and its image folder), and
parquet files with the columns image, question and answer, as mirrors have them. The mirrors lost
answer types, ids and question types, and rows that were there twice.

No layout has modalities. Rules, in this order: what questions for the modality about the same image
were answered; else the organ: CHEST is X-ray, ABD is CT, HEAD remains unknown (CT or MRI).
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from medmoe_jax.data.prepare import layouts, tables
from medmoe_jax.data.prepare.texts import Reading, is_yes_no
from medmoe_jax.data.prepare.types import (
    Bad,
    DataSet,
    Event,
    Licence,
    Opened,
    Published,
    from_bytes,
    from_folder,
)
from medmoe_jax.data.problems import DataError, Problem

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
BY_ANSWER = "answers to questions for the modality of the same image"
BY_ORGAN = "image_organ: CHEST is X-ray, ABD is CT, HEAD unknown"
DISAGREE = "answers to questions for the modality of the same image disagree: unknown"
_SPOKEN = {
    "CT": re.compile(r"\b(ct|cat scan|computed tomography|computerized tomography)\b", re.I),
    "MRI": re.compile(r"\b(mri?|magnetic resonance|flair|dwi|t[12])\b", re.I),
    "X-ray": re.compile(r"\b(x[- ]?rays?|xrs?|cxr|radiograph[sy]?|plain films?)\b", re.I),
}
_ASKS = re.compile(
    r"\bmodality\b|\b(type|kind) of (image|imaging|scan|study|radiograph)"
    r"|\bhow (is|was) (this|the) (image|scan|picture)"
    r"|^(is|was) (this|the image) an? ",
    re.I,
)


def spoken_modality(question: str, answer: str) -> str:
    """The modality that an answered question names, '' if none or several: 'yes' takes it from the
    question, other answers from themselves."""
    if is_yes_no(answer):
        text = question if answer.strip().lower().startswith("y") else ""
    else:
        text = answer
    found = [name for name, pattern in _SPOKEN.items() if pattern.search(text)]
    return found[0] if len(found) == 1 else ""


def modalities(asked: Iterable[tuple[str, str, str]]) -> dict[str, set[str]]:
    """Image -> modalities that its questions for the modality were answered with.

    Args:
      asked: image, question and answer of such questions.
    """
    found: dict[str, set[str]] = defaultdict(set)
    for image, question, answer in asked:
        name = spoken_modality(question, answer)
        if name:
            found[image].add(name)
    return found


def _infer(reading: Reading, spoken: Mapping[str, set[str]], image: str, organ: str) -> str:
    names = spoken.get(image, set())
    if names:
        reading.rules["modality"] = BY_ANSWER if len(names) == 1 else DISAGREE
        return next(iter(names)) if len(names) == 1 else ""
    if organ in ORGANS:
        reading.rules["modality"] = BY_ORGAN
    return ORGANS.get(organ, "")


def _original(files: Sequence[tuple[Path, list]], folder: Path) -> Iterator[Event]:
    asked = [
        (str(row.get("image_name")), str(row.get("question")), str(row.get("answer")))
        for _, rows in files
        for row in rows
        if isinstance(row, dict) and "MODALITY" in str(row.get("question_type")).upper()
    ]
    spoken = modalities(asked)
    for file, rows in files:
        for place, row in enumerate(rows):
            split = ""
            try:
                if not isinstance(row, dict):
                    raise DataError(f"a row must be an object, not {type(row).__name__}")
                phrase = str(row.get("phrase_type")).strip().lower()
                if phrase not in PHRASES:
                    raise DataError(
                        f"phrase_type {row.get('phrase_type')!r} is unknown; known are "
                        f"{', '.join(PHRASES)}"
                    )
                split = PHRASES[phrase]
                reading = Reading(split, NAME, LICENCE.name)
                question = reading.text(row.get("question"), "question")
                answer = reading.text(row.get("answer"), "answer")
                image = row.get("image_name")
                if not isinstance(image, str) or not image.strip():
                    raise DataError("no image_name")
                organ = str(row.get("image_organ") or "").strip().upper()
                kinds = str(row.get("question_type") or "").upper().split(",")
                yield reading.draft(
                    file=str(file),
                    place=place,
                    id=_id(row, place),
                    turns=[(question, answer)],
                    answer_type=reading.answer_type(row.get("answer_type"), answer),
                    modality=_infer(reading, spoken, image, organ),
                    question_type=", ".join(kind.strip() for kind in kinds if kind.strip()),
                    pictures=[from_folder(folder, image)],
                    more={"phrase_type": phrase, "organ": organ},
                )
            except DataError as error:
                name = _id(row, place) if isinstance(row, dict) else ""
                yield Bad(Problem(str(file), place, name, str(error)), split)


def _id(row: dict[str, Any], place: int) -> str:
    return str(row.get("qid") if row.get("qid") not in (None, "") else f"row-{place}")


def _mirror(files: Sequence[tuple[str, Path]]) -> Iterator[Event]:
    asked = []
    for _, file in files:
        for _, row in tables.rows(file, ("image", "question", "answer")):
            if _ASKS.search(str(row["question"])):
                data = row["image"] and row["image"].get("bytes")
                if data:
                    asked.append((from_bytes(data).name, str(row["question"]), str(row["answer"])))
    spoken = modalities(asked)
    for split, file in files:
        for place, row in tables.rows(file, ("image", "question", "answer")):
            name = f"{split}-{file.stem}-{place}" if _several(files, split) else f"{split}-{place}"
            try:
                reading = Reading(split, NAME, LICENCE.name)
                question = reading.text(row["question"], "question")
                answer = reading.text(row["answer"], "answer")
                picture = from_bytes(tables.image_bytes(row["image"]))
                yield reading.draft(
                    file=str(file),
                    place=place,
                    id=name,
                    turns=[(question, answer)],
                    answer_type=reading.answer_type(row.get("answer_type"), answer),
                    modality=_infer(reading, spoken, picture.name, ""),
                    pictures=[picture],
                )
            except DataError as error:
                yield Bad(Problem(str(file), place, name, str(error)), split)


def _several(files: Sequence[tuple[str, Path]], split: str) -> bool:
    return sum(other == split for other, _ in files) > 1


def read(sources: Sequence[Path], options: argparse.Namespace) -> Opened:
    """Recognises the layout; see `types.DataSet`."""
    source = layouts.only(sources)
    parquet = layouts.files(source, ".parquet")
    if parquet:
        files = tables.split_files(parquet)
        return Opened(
            "parquet mirror",
            _mirror(files),
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
    names = [str(r.get("image_name")) for _, rows in found for r in rows if isinstance(r, dict)]
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
