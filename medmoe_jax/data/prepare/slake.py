"""SLAKE: English and Chinese questions about CT, MRI and X-ray images (Liu et al. 2021).

Layouts: the original (`train.json`, `validation.json`, `test.json` with `imgs/` or `imgs.zip`, or
all of it in one zip file; the Hugging Face repository BoKelvin/SLAKE has the same), and parquet
mirrors with images inside (mdwiratathya/SLAKE-vqa-english, OctoMed/SLAKE).
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from medmoe_jax.data.prepare import layouts, mirror, stream, tables
from medmoe_jax.data.prepare.archives import Archive
from medmoe_jax.data.prepare.texts import Reading, split_of
from medmoe_jax.data.prepare.types import (
    DataSet,
    Event,
    LeftOut,
    Licence,
    Opened,
    Picture,
    Published,
    from_folder,
)
from medmoe_jax.data.problems import DataError

NAME = "slake"
LICENCE = Licence(
    "CC-BY-4.0",
    "https://www.med-vqa.com/slake/",
    "Attribution, as the data set's card on the Hugging Face hub states it.",
    "Liu et al., SLAKE: a semantically-labeled knowledge-enhanced dataset for medical visual "
    "question answering, ISBI 2021.",
)
PUBLISHED = {
    "en": (
        Published("SLAKE, English", {"train": 4919, "val": 1053, "test": 1061}),
        Published("OctoMed/SLAKE, train and validation in one", {"train": 5972, "test": 1061}),
    ),
    "zh": (Published("SLAKE, Chinese (the test part is all that is known)", {"test": 1033}),),
    "both": (
        Published("SLAKE, both languages (the test part is all that is known)", {"test": 2094}),
    ),
}
LAYOUTS = """  a folder with train.json, validation.json, test.json and imgs/ or imgs.zip
  one zip file with all of them
  a folder with parquet files (train-....parquet, ...) that have the images inside"""

EMPTY = "1622"  # qid whose answer is empty in the release
LANGUAGES = {"en": "en", "english": "en", "zh": "zh", "cn": "zh", "chinese": "zh"}
BY_LETTERS = "zh if the question has Chinese characters, otherwise en"
_CHINESE = re.compile(r"[\u4e00-\u9fff]")

Find = Callable[[str], Picture]


def _language(reading: Reading, row: dict[str, Any]) -> str:
    given = str(row.get("q_lang") or "").strip()
    if not given:
        reading.rules["language"] = BY_LETTERS
        question = str(tables.first(row, mirror.QUESTION) or "")
        return "zh" if _CHINESE.search(question) else "en"
    if given.lower() not in LANGUAGES:
        raise DataError(f"q_lang {given!r} is unknown; known are en and zh")
    language = LANGUAGES[given.lower()]
    if given != language:
        reading.handled.append(f"q_lang: {given!r} written as {language}")
    return language


def _leave_out(wanted: str, reading: Reading, row: dict[str, Any]) -> LeftOut | None:
    """Rows of the other language, and the one that is known to be empty."""
    language = _language(reading, row)
    if wanted not in ("both", language):
        reason = f"question in {language} (--language {wanted})"
        return LeftOut(reason, reading.split, counted=False)
    if str(row.get("qid")).strip() == EMPTY and not str(row.get("answer") or "").strip():
        kind = Reading(reading.split, NAME, LICENCE.name).answer_type(row.get("answer_type"), "")
        return LeftOut(f"qid {EMPTY}: its answer is empty in the release", reading.split, kind)
    return None


def _row(file: Path, split: str, wanted: str, find: Find, place: int, row: dict[str, Any]) -> Event:
    reading = Reading(split, NAME, LICENCE.name)
    unwanted = _leave_out(wanted, reading, row)
    if unwanted is not None:
        return unwanted
    question = reading.text(row.get("question"), "question")
    answer = reading.text(row.get("answer"), "answer")
    image = str(row.get("img_name") or "").strip()
    if not image:
        raise DataError("no img_name")
    modality = reading.modality(row.get("modality"))
    return reading.draft(
        file=str(file),
        place=place,
        id=stream.row_id(row, place, split),
        turns=[(question, answer)],
        answer_type=reading.answer_type(row.get("answer_type"), answer),
        modality=modality,
        question_type=str(row.get("content_type") or "").strip(),
        pictures=[find(image)],
        more={
            "language": _language(Reading(split, NAME, LICENCE.name), row),
            "base_type": str(row.get("base_type") or "").strip(),
            "organ": str(row.get("location") or "").strip(),
        },
    )


def _from_archive(archive: Archive, name: str) -> Picture:
    if ".." in Path(name).parts or Path(name).is_absolute():
        raise DataError(f"image {name!r} points out of the image folder")
    if name not in archive:
        raise DataError(f"image {name!r} is not in {archive.path}")
    return Picture(name, read=partial(archive.read, name))


def _original(files: Sequence[tuple[str, Path, list]], wanted: str, find: Find) -> Iterator[Event]:
    for split, file, rows in files:
        make = partial(_row, file, split, wanted, find)
        yield from stream.events(file, enumerate(rows), make, split)


def _in_order(files: list[tuple[str, Path, Any]]) -> list[tuple[str, Path, list]]:
    """The lists of questions among JSON files, by split."""
    kept = [
        (split, file, rows)
        for split, file, rows in files
        if split
        and isinstance(rows, list)
        and any(isinstance(row, dict) and "question" in row for row in rows)
    ]
    return sorted(kept, key=lambda entry: (("train", "val", "test").index(entry[0]), entry[1]))


def read(sources: Sequence[Path], options: argparse.Namespace) -> Opened:
    """Recognises the layout; see `types.DataSet`."""
    source = layouts.only(sources)
    wanted: str = options.language
    published = PUBLISHED[wanted]
    parquet = layouts.files(source, ".parquet")
    if parquet:
        events = mirror.events(
            tables.split_files(parquet),
            NAME,
            LICENCE.name,
            lambda reading, row: reading.modality(row.get("modality")),
            partial(_leave_out, wanted),
        )
        count = tables.count(parquet)
        return Opened("parquet mirror", events, (LICENCE,), published, count)
    if source.is_file() and source.suffix.lower() == ".zip":
        found, find, layout = _from_one_zip(source)
    else:
        texts = [path for path in layouts.files(source, ".json") if split_of(path.stem)]
        found = _in_order([(split_of(p.stem), p, layouts.read_json(p)) for p in texts])
        if not found:
            raise layouts.unknown(source, f"train.json, validation.json, test.json\n{LAYOUTS}")
        find, layout = _images(source, found, options.images)
    total = sum(len(rows) for _, _, rows in found)
    return Opened(layout, _original(found, wanted, find), (LICENCE,), published, total)


def _from_one_zip(source: Path) -> tuple[list[tuple[str, Path, list]], Find, str]:
    whole = Archive(source)
    names = [f"{name}.json" for name in ("train", "validation", "validate", "val", "test")]
    inside = [
        (split_of(name), source / name, _parsed(whole.read(name), source / name))
        for name in names
        if name in whole
    ]
    found = _in_order(inside)
    if not found:
        raise DataError(f"{source}: looked for {', '.join(names)} in it and found none")
    return found, partial(_from_archive, whole), "original, in one zip file"


def _images(
    source: Path, found: Sequence[tuple[str, Path, list]], given: Path | None
) -> tuple[Find, str]:
    """Where the images lie: in imgs.zip, or in a folder."""
    rows = chain.from_iterable(rows for _, _, rows in found)
    names = [str(row.get("img_name") or "").strip() for row in rows if isinstance(row, dict)]
    zipped = [path for path in layouts.files(source, ".zip") if path.stem.lower() == "imgs"]
    try:
        folder = layouts.image_folder(source, names, given)
    except DataError:
        if given is not None or not zipped:
            raise
        return partial(_from_archive, Archive(zipped[0])), "original, imgs.zip"
    return partial(from_folder, folder), "original, imgs/"


def _parsed(data: bytes, path: Path) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}") from error


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--language", choices=("en", "zh", "both"), default="en", help="questions to keep"
    )
    parser.add_argument(
        "--images", type=Path, help="folder of the images, if it is not in the source"
    )


DATA_SET = DataSet(
    NAME, "SLAKE: radiology, English and Chinese, 14,028 questions", LAYOUTS, read, _add_arguments
)
