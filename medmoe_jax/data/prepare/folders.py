"""Prepared folders read again, by what is made of them: mixtures and TensorFlow Datasets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medmoe_jax.data.prepare.types import Licence
from medmoe_jax.data.problems import DataError
from medmoe_jax.data.sources import records

MANIFEST, SUMMARY, IMAGES = "manifest.jsonl", "summary.json", "images"
IDENTITY = "source.json"  # what a folder was begun from


def is_prepared(folder: Path) -> bool:
    """Whether a folder is the output of a preparation, also of one that was stopped."""
    return (folder / IDENTITY).is_file() and (folder / IMAGES).is_dir()


def rows(folder: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Place and content of every row of the manifest.

    Raises:
      DataError: no prepared folder, or the manifest is damaged.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise DataError(
            f"{folder} is no prepared folder (no {MANIFEST}); "
            "`python -m medmoe_jax.data.prepare NAME --out` makes one"
        )
    for place, row, fault in records(file):
        if fault or not isinstance(row, dict) or not {"id", "split", "source"} <= row.keys():
            raise DataError(f"{file} row {place}: {fault or 'id, split or source is missing'}")
        yield place, row


def licences(folder: Path) -> list[Licence]:
    """The licences that the folder's summary names.

    Raises:
      DataError: the summary cannot be read; licences must not get lost.
    """
    try:
        return [Licence(**found) for found in _summary(folder)["licences"]]
    except (KeyError, TypeError) as error:
        raise DataError(f"{folder / SUMMARY} names no licences: {error!r}") from error


def train_agrees(folder: Path) -> bool:
    """Whether the number of train rows in the folder's source was that of a published version.

    Raises:
      DataError: the summary cannot be read.
    """
    published = _summary(folder).get("published") or {}
    return "train" in published.get("counts", {}) and not published.get("differences")


def _summary(folder: Path) -> dict[str, Any]:
    file = folder / SUMMARY
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read, so the licence is unknown: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{file} is no object")
    return found
