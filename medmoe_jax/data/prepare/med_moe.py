"""Med-MoE's own files for its third phase and its tests: `train_all.json`, `test_rad.json`,
`test_slake.json`, `test_pvqa.json` and an image folder.

The files have no modality. Rule: PathVQA's images (`train_0001.jpg` and the like) are pathology.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from medmoe_jax.data import sources as rows_of
from medmoe_jax.data.prepare import layouts, stream, talks
from medmoe_jax.data.prepare.texts import Reading, split_of
from medmoe_jax.data.prepare.types import DataSet, Event, Licence, Opened, from_folder
from medmoe_jax.data.problems import DataError

NAME = "med_moe"
LICENCE = Licence(
    "CC0-1.0 AND CC-BY-4.0 AND MIT",
    "https://github.com/jiangsongtao/Med-MoE",
    "The rows come from VQA-RAD (CC0-1.0), SLAKE (CC-BY-4.0) and PathVQA (MIT).",
)
LAYOUTS = """  a folder of train_all.json, test_rad.json, test_slake.json, test_pvqa.json, some of
  them, or those files themselves; the images below the folder, or in --images"""
PATHOLOGY = "images called (train|val|test)_NUMBER.jpg are PathVQA's: pathology"
_PATH_VQA = re.compile(r"(^|/)(train|val|test)_\d+\.(jpe?g|png)$", re.I)


def _row(file: Path, split: str, folder: Path, place: int, row: dict[str, Any]) -> Event:
    reading = Reading(split, NAME, LICENCE.name)
    images = rows_of.image_names(row.get("image"))
    said = talks.turns(reading, row, images)
    modality = talks.stated_modality(reading, row)
    if not modality and images and all(map(_PATH_VQA.search, images)):
        modality = "Pathology"
        reading.rules["modality"] = PATHOLOGY
    kept = {key: row[key] for key in ("task", "label", "options") if row.get(key) is not None}
    return reading.draft(
        file=str(file),
        place=place,
        id=stream.row_id(row, place, split),
        turns=said,
        answer_type=reading.answer_type(row.get("answer_type"), said[0][1]),
        modality=modality,
        question_type=str(row.get("question_type", row.get("content_type")) or "").strip(),
        pictures=[from_folder(folder, image) for image in images],
        more=kept,
    )


def _events(found: Sequence[tuple[str, Path, list]], folder: Path) -> Iterator[Event]:
    for split, file, rows in found:
        yield from stream.events(file, enumerate(rows), partial(_row, file, split, folder), split)


def _files(sources: Sequence[Path]) -> list[tuple[str, Path, list]]:
    found = []
    for source in sources:
        for path in layouts.files(source, ".json"):
            rows = layouts.read_json(path)
            talk = ("conversations", "conversatons")
            if not isinstance(rows, list) or not any(
                isinstance(row, dict) and any(key in row for key in talk) for row in rows
            ):
                continue
            if not split_of(path.stem):
                raise DataError(f"{path}: its name does not tell the split; call it train_... ")
            found.append((split_of(path.stem), path, rows))
    return sorted(found, key=lambda entry: ("train", "val", "test").index(entry[0]))


def read(sources: Sequence[Path], options: argparse.Namespace) -> Opened:
    """Recognises the layout; see `types.DataSet`."""
    found = _files(sources)
    if not found:
        raise layouts.unknown(sources[0], f"JSON lists with `conversations`\n{LAYOUTS}")
    objects = [row for _, _, rows in found for row in rows if isinstance(row, dict)]
    images = [row.get("image") for row in objects]
    names = [n for one in images for n in (one if isinstance(one, list) else [one])]
    names = [name for name in names if isinstance(name, str)]
    home = sources[0] if sources[0].is_dir() else sources[0].parent
    folder = layouts.image_folder(home, names, options.images)
    total = sum(len(rows) for _, _, rows in found)
    return Opened("official JSON", _events(found, folder), (LICENCE,), (), total)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=Path, help="folder that image paths are relative to")


DATA_SET = DataSet(NAME, "Med-MoE's stage-3 and test files", LAYOUTS, read, _add_arguments)
