"""Rows of a file -> events: what a row's reader refuses becomes a bad row with its place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from medmoe_jax.data.prepare.types import Bad, Event
from medmoe_jax.data.problems import DataError, Problem

IDS = ("qid", "id", "question_id")


def row_id(row: Any, place: int, split: str) -> str:
    """The row's own id, or else one made of its split and place."""
    if isinstance(row, dict):
        for key in IDS:
            if row.get(key) not in (None, ""):
                return str(row[key]).strip()
    return f"{split or 'row'}-{place}"


def events(
    file: Path,
    rows: Iterable[tuple[int, Any]],
    make: Callable[[int, dict[str, Any]], Event],
    split: str | Callable[[dict[str, Any]], str],
) -> Iterator[Event]:
    """`make(place, row)` of every row.

    Args:
      file: for messages.
      rows: place and content.
      make: raises DataError on a row that cannot be used.
      split: of all rows, or of a row ('' where unknown), to count the bad ones.
    """
    for place, row in rows:
        here = split if isinstance(split, str) else split(row) if isinstance(row, dict) else ""
        try:
            if not isinstance(row, dict):
                raise DataError(f"a row must be an object, not {type(row).__name__}")
            yield make(place, row)
        except (ValueError, OSError) as error:  # DataError is a ValueError; odd names are others
            yield Bad(Problem(str(file), place, row_id(row, place, here), str(error)), here)
