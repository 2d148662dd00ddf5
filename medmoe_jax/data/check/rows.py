"""Data files -> rows with their split, and what is wrong with rows before an image is opened."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medmoe_jax.config import MODALITIES
from medmoe_jax.data import sources
from medmoe_jax.data.check.findings import ERROR, WARNING, WHOLE, Finding, kind_of
from medmoe_jax.data.problems import DataError
from medmoe_jax.data.sources import UNKNOWN, Sample
from medmoe_jax.data.templates import GPT, HUMAN, IMAGE_TOKEN

MANIFEST = "manifest.jsonl"  # of a prepared folder
SPLITS = {  # words of a file's name or a `split` -> split
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validate", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "heldout"), "test"),
}
NO_LABEL = {"answer_type": "no answer type", "modality": "no modality"}


@dataclass(frozen=True)
class Row:
    """A usable row."""

    sample: Sample
    split: str
    folder: Path  # its image paths are relative to it

    @property
    def words(self) -> tuple[str, str]:
        """All questions and all answers, in lower case with single spaces."""
        return _normal(self.sample, HUMAN), _normal(self.sample, GPT)


@dataclass
class Table:
    """The rows of all files with what was found in them."""

    rows: list[Row] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    total: int = 0  # rows looked at, unusable ones included


def read(files: Sequence[Path], image_folder: Path | None = None) -> Table:
    """Reads all rows.

    Args:
      files: JSON, JSONL, or folders with a manifest.jsonl.
      image_folder: image paths are relative to it; default: `images` beside each file where there
        is such a folder, else the folder of the file.
    """
    table = Table()
    for given in files:
        file = given / MANIFEST if given.is_dir() else given
        beside = file.parent / "images"
        folder = image_folder or (beside if beside.is_dir() else file.parent)
        try:
            _read_file(file, folder, table)
        except DataError as error:
            table.findings.append(
                Finding(ERROR, "unreadable file", str(file), WHOLE, "", str(error))
            )
    _find_doubles(table)
    return table


def split_of(record: Any, file: Path) -> str:
    """The row's own `split`, else the first word of the file's name that is one, else the name."""
    own = record.get("split") if isinstance(record, dict) else None
    if isinstance(own, str) and own.strip():
        return SPLITS.get(own.strip().lower(), own.strip())
    words = re.split(r"[^a-z]+", file.stem.lower())
    return next((SPLITS[word] for word in words if word in SPLITS), file.stem)


def balance(rows: Sequence[Row]) -> dict[str, dict[str, Counter[str]]]:
    """Counts of answer types, modalities, question types and yes/no answers: name -> split."""
    found: dict[str, dict[str, Counter[str]]] = {}
    for row in rows:
        sample, (_, answer) = row.sample, row.words
        answer = answer.rstrip(".")
        values = {
            "answer type": sample.answer_type or "(none)",
            "modality": MODALITIES[sample.modality] if sample.modality >= 0 else "(none)",
            "question type": sample.question_type or "(none)",
            "yes or no": answer if answer in ("yes", "no") else "(other)",
        }
        for name, value in values.items():
            found.setdefault(name, defaultdict(Counter))[row.split][value] += 1
    return found


def _normal(sample: Sample, role: str) -> str:
    said = " | ".join(text for who, text in sample.turns if who == role)
    return " ".join(said.replace(IMAGE_TOKEN, " ").lower().split())


def _read_file(file: Path, folder: Path, table: Table) -> None:
    loaded = sources.read_rows([file], folder)
    raw = {row: record for row, record, _ in sources.records(file)}
    table.total += loaded.total
    for problem in loaded.problems:
        kind = kind_of(problem.reason, "unusable row")
        table.findings.append(Finding(ERROR, kind, *_place(problem), problem.reason))
    rows = [Row(s, split_of(raw[s.row], file), folder) for s in loaded.samples]
    table.rows += rows
    without: dict[str, list[Sample]] = {key: [] for key in NO_LABEL}
    for sample in loaded.samples:
        record = raw[sample.row]
        given = record.get("answer_type")
        if not sample.answer_type and given not in (None, ""):
            reason = f"answer_type {given!r} is unknown; use 'open' or 'closed'"
            table.findings.append(Finding(ERROR, "unknown answer type", *_place(sample), reason))
        elif not sample.answer_type:
            without["answer_type"].append(sample)
        if sample.modality == UNKNOWN:
            without["modality"].append(sample)
    for key, samples in without.items():
        if samples and len(samples) == len(loaded.samples):
            reason = f"no row has a usable '{key}'"
            table.findings.append(Finding(WARNING, NO_LABEL[key], str(file), WHOLE, "", reason))
            continue
        for sample in samples:
            reason = f"no usable '{key}', unlike other rows of the file"
            table.findings.append(Finding(WARNING, NO_LABEL[key], *_place(sample), reason))


def _find_doubles(table: Table) -> None:
    """Rows of one split that say the same about the same images, and ids used for several rows."""
    seen: dict[Any, Sample] = {}
    ids: dict[Any, Sample] = {}
    for row in table.rows:
        sample = row.sample
        first = seen.setdefault((row.split, row.folder, sample.images, row.words), sample)
        named = ids.setdefault((sample.file, sample.id), sample)
        if first is not sample:
            reason = f"the same as {first.file} row {first.row} (id {first.id!r})"
            table.findings.append(Finding(WARNING, "doubled row", *_place(sample), reason))
        elif named is not sample:
            reason = f"the id is that of row {named.row} as well"
            table.findings.append(Finding(WARNING, "doubled id", *_place(sample), reason))


def _place(row: Any) -> tuple[str, int, str]:
    return row.file, row.row, row.id
