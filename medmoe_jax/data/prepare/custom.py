"""One's own questions: a CSV, TSV, JSON or JSONL file, or a folder with several of them.

Columns (keys): `image`, `question`, `answer`; and, where wanted, `id`, `answer_type`, `modality`,
`question_type`, `split`, `options`, `task`. `image` and `options` hold several values with ';'
between them, or a list. `docs/data.md` says what each may be.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from medmoe_jax.data import medical
from medmoe_jax.data.prepare import layouts, stream
from medmoe_jax.data.prepare.texts import SPLIT_NAMES, Reading, split_of
from medmoe_jax.data.prepare.types import Bad, DataSet, Event, Licence, Opened, from_folder
from medmoe_jax.data.problems import DataError, Problem
from medmoe_jax.data.sources import ANSWER_TYPES, records

NAME = "custom"
NEEDED = ("image", "question", "answer")
KNOWN = (
    *NEEDED, "id", "answer_type", "modality", "question_type", "split", "options", "task"
)  # fmt: skip
LAYOUTS = """  a .csv, .tsv, .json or .jsonl file, or a folder with some; columns image, question,
  answer and, where wanted, id, answer_type, modality, question_type, split, options, task"""
SUFFIXES = (".csv", ".tsv", ".json", ".jsonl")
BY_NAME = "the file's name"
DEFAULT = "train where neither a column nor the file's name tells"
BY_OPTIONS = "CLOSED as the row has options"
BY_TAG = "the file's own DICOM tag"
LINE = "(line)"  # key of the place of a table's line in its file
FAULT = "(fault)"  # key under which a line that could not be split is passed on


def _table(file: Path) -> Iterator[tuple[int, Any]]:
    """Place and cells of every line of a CSV or TSV file.

    Raises:
      DataError: it cannot be read, or has no header with the needed columns.
    """
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            head = stream.readline()
            stream.seek(0)
            comma = "\t" if file.suffix.lower() == ".tsv" else ","
            if comma == "," and "," not in head and ";" in head:
                comma = ";"
            reader = csv.reader(stream, delimiter=comma, strict=True)
            columns = [name.strip().lower() for name in next(reader, [])]
            _check_columns(file, columns)
            place = 0
            for cells in reader:
                if not any(cell.strip() for cell in cells):
                    continue
                line = f"line {reader.line_num}"
                row: dict[str, Any] = {LINE: line}
                if len(cells) != len(columns):
                    row[FAULT] = f"{line} has {len(cells)} cells, the header has {len(columns)}"
                pairs = list(zip(columns, cells, strict=False))
                if any(cell.strip() and not name for name, cell in pairs):
                    row[FAULT] = f"{line} has text in a column without a name"
                yield place, row | {name: cell for name, cell in pairs if name}
                place += 1
    except csv.Error as error:
        raise DataError(f"{file} line {reader.line_num} cannot be read: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error


def _check_columns(file: Path, columns: Sequence[str]) -> None:
    lacking = [name for name in NEEDED if name not in columns]
    if lacking:
        raise DataError(
            f"{file} has no column {', '.join(lacking)}; its header is {', '.join(columns)}"
        )
    # Spreadsheets leave empty columns behind the last one: those have no name.
    doubled = sorted({name for name in columns if name and columns.count(name) > 1})
    if doubled:
        raise DataError(f"{file}: the column {', '.join(doubled)} is there twice")


def _objects(file: Path) -> Iterator[tuple[int, Any]]:
    for place, row, fault in records(file):
        if fault:
            yield place, {FAULT: fault}
        elif isinstance(row, dict):
            yield place, {str(key).strip().lower(): value for key, value in row.items()}
        else:
            yield place, row


def _several(row: dict[str, Any], column: str) -> list[str]:
    value = row.get(column)
    parts = value if isinstance(value, list) else [] if value is None else str(value).split(";")
    if not all(isinstance(part, (str, int, float)) for part in parts):
        raise DataError(f"column '{column}': give a text or a list of texts, not {value!r}")
    return [str(part).strip() for part in parts if str(part).strip()]


def _split(row: dict[str, Any], file: Path, fallback: str) -> tuple[str, str]:
    """Split and the rule that gave it, '' where the row says it."""
    given = str(row.get("split") or "").strip().lower()
    if given:
        if given not in SPLIT_NAMES:
            raise DataError(f"column 'split': {row['split']!r} is unknown; use train, val or test")
        return SPLIT_NAMES[given], ""
    named = split_of(file.stem)
    return (named, BY_NAME) if named else (fallback, DEFAULT)


def _column(reading: Reading, row: dict[str, Any], column: str) -> str:
    if column not in row:
        raise DataError(f"no '{column}'")
    try:
        return reading.text(row[column], column)
    except DataError as error:
        raise DataError(f"column '{column}': {error}") from error


def _row(
    file: Path, folder: Path | None, fallback: str, licence: str, place: int, row: dict[str, Any]
) -> Event:
    if row.get(FAULT):
        raise DataError(str(row[FAULT]))
    try:
        split, rule = _split(row, file, fallback)
        reading = Reading(split, NAME, licence)
        if rule:
            reading.rules["split"] = rule
        return _draft(reading, file, folder, place, row)
    except DataError as error:
        raise DataError(f"{row[LINE]}, {error}" if LINE in row else str(error)) from error


def _draft(
    reading: Reading, file: Path, folder: Path | None, place: int, row: dict[str, Any]
) -> Event:
    question = _column(reading, row, "question")
    answer = _column(reading, row, "answer")
    images = _several(row, "image")
    if images and folder is None:
        raise DataError("column 'image': no folder holds the images; name it with --images")
    try:
        pictures = [from_folder(folder, image) for image in images if folder is not None]
    except DataError as error:
        raise DataError(f"column 'image': {error}") from error
    kind = str(row.get("answer_type") or "").strip()
    if kind and kind.lower() not in ANSWER_TYPES:
        raise DataError(f"column 'answer_type': {kind!r} is unknown; use open or closed")
    options, more = _several(row, "options"), {}
    if options:
        lower = [option.lower() for option in options]
        if len(set(lower)) < len(options) or answer.lower() not in lower:
            raise DataError(
                f"column 'options': {options} must be different and hold the answer {answer!r}"
            )
        answer = options[lower.index(answer.lower())]
        more = {"options": options, "label": lower.index(answer.lower())}
        more |= {"task": str(row["task"]).strip()} if row.get("task") else {}
        question = f"{question} Options: {', '.join(options)}."
        if not kind:
            kind = "CLOSED"
            reading.rules["answer_type"] = BY_OPTIONS
    modality = reading.modality(row.get("modality"))
    if not modality and pictures and pictures[0].file is not None:
        modality = medical.modality(pictures[0].file)
        if modality:
            reading.rules["modality"] = BY_TAG
    return reading.draft(
        file=str(file),
        place=place,
        id=stream.row_id(row, place, f"{file.stem}"),
        turns=[(question, answer)],
        answer_type=reading.answer_type(kind, answer),
        modality=modality,
        question_type=str(row.get("question_type") or "").strip(),
        pictures=pictures,
        more=more,
    )


def _rows(file: Path) -> Iterator[tuple[int, Any]]:
    return _table(file) if file.suffix.lower() in (".csv", ".tsv") else _objects(file)


def _events(
    files: Sequence[Path], folder: Path | None, fallback: str, licence: str
) -> Iterator[Event]:
    for file in files:
        make = partial(_row, file, folder, fallback, licence)
        for event in stream.events(file, _rows(file), make, ""):
            yield _with_split(event, file, fallback)


def _with_split(event: Event, file: Path, fallback: str) -> Event:
    if isinstance(event, Bad) and not event.split:
        problem: Problem = event.problem
        return Bad(problem, split_of(file.stem))
    return event


def read(sources: Sequence[Path], options: argparse.Namespace) -> Opened:
    """Finds the files and their images; see `types.DataSet`."""
    files = [file for source in sources for file in layouts.files(source, *SUFFIXES)]
    if not files:
        raise layouts.unknown(sources[0], f"tables of questions\n{LAYOUTS}")
    names, total, unused = [], 0, set()
    for file in files:
        for _, row in _rows(file):
            total += 1
            if not isinstance(row, dict) or FAULT in row:
                continue
            unused |= set(row) - set(KNOWN) - {LINE}
            with suppress(DataError):  # told when the row itself is read
                names += _several(row, "image")
    folder = None
    if names:
        home = sources[0] if sources[0].is_dir() else sources[0].parent
        folder = layouts.image_folder(home, names, options.images)
    licence = Licence(options.licence, "-", "As stated on the command line (--licence).")
    remarks = (f"columns that are not used: {', '.join(sorted(unused))}",) if unused else ()
    events = _events(files, folder, options.split, options.licence)
    return Opened("own tables", events, (licence,), (), total, remarks)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=Path, help="folder that image paths are relative to")
    parser.add_argument("--licence", default="not stated", help="terms of the data, for the record")
    parser.add_argument(
        "--split",
        choices=("train", "val", "test"),
        default="train",
        help="of rows whose column and file name do not tell it",
    )


DATA_SET = DataSet(NAME, "your own CSV, JSON or JSONL", LAYOUTS, read, _add_arguments)
