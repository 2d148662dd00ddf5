"""Bad rows: how they are described, collected, reported and written down."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

SHOWN = 20  # rows listed in an error message


@dataclass(frozen=True)
class Problem:
    """One row that cannot be used, and why."""

    file: str
    row: int  # 0-based position in the list, or in the lines of a JSONL file
    id: str
    reason: str

    def __str__(self) -> str:
        return f"{self.file} row {self.row} (id {self.id!r}): {self.reason}"


class DataError(ValueError):
    """Data that cannot be used; the message names file and row and tells the remedy.

    Attributes:
      problems: the rows it is about; empty where a whole file or setting is wrong.
    """

    def __init__(self, message: str, problems: Sequence[Problem] = ()):
        super().__init__(message)
        self.problems = tuple(problems)


def check_text(text: str, what: str = "text") -> None:
    """Raises DataError where a text holds halves of characters, which JSON can write and no
    tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        near = text[max(0, error.start - 20) : error.end]
        raise DataError(f"the {what} holds half a character: {near!a}") from error


def settle(
    problems: Sequence[Problem],
    on_error: str,
    total: int | None = None,
    remedy: str = "--config.data.on_error=skip",
    place: str = "--config.data.image_folder",
) -> None:
    """Applies the `on_error` rule to the problems found.

    Args:
      problems: what was found; nothing happens where it is empty.
      on_error: 'error' raises, 'skip' returns.
      total: rows looked at; None where reading has not come to an end.
      remedy: what the command calls 'skip'.
      place: what the command calls the folder to look at where no row is left.

    Raises:
      DataError: once for all problems ('error'), or where 'skip' would leave no row, or where
        `on_error` is neither word.
    """
    if on_error not in ("error", "skip"):
        raise DataError(f"data.on_error is {on_error!r}; use 'error' or 'skip'")
    some_left = total is None or len(problems) < total
    if not problems or (on_error == "skip" and some_left):
        return
    of_total = "" if total is None else f" of {total}"
    lines = [f"{len(problems)}{of_total} row(s) cannot be used:"]
    lines += [f"  {problem}" for problem in problems[:SHOWN]]
    if len(problems) > SHOWN:
        lines.append(f"  ... and {len(problems) - SHOWN} more")
    if some_left:
        lines.append(f"Correct these rows, or leave them out with {remedy}")
    else:
        lines.append(f"No row is left. Check the files and {place}")
    raise DataError("\n".join(lines), problems)


def write_problems(problems: Iterable[Problem], path: str | Path) -> None:
    """Writes one JSON object a problem (file, row, id, reason), replacing the file at `path`."""
    with Path(path).open("w", encoding="utf-8") as stream:
        for problem in problems:
            stream.write(json.dumps(dataclasses.asdict(problem), ensure_ascii=False) + "\n")
