"""Finding the files of a source: folders differ a little from user to user."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from medmoe_jax.data.prepare.folders import is_prepared
from medmoe_jax.data.problems import DataError

DEPTH = 4  # folders below the source that are looked into
TRIED = 64  # names that decide which folder the images lie in
SHOWN = 12  # names listed in a message


def only(sources: Sequence[Path]) -> Path:
    """The one path of a data set that has one. Raises DataError on several."""
    if len(sources) != 1:
        raise DataError(f"--source takes one path here, not {len(sources)}")
    return sources[0]


def unknown(source: Path, looked_for: str) -> DataError:
    """The error of a source that is no known layout: what was looked for, what is there."""
    if source.is_dir():
        names = sorted(p.name + "/" * p.is_dir() for p in source.iterdir())
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        here = ", ".join(names[:SHOWN]) + more if names else "nothing"
    else:
        here = "a file"
    return DataError(f"{source}: looked for {looked_for}; found {here}")


def folders(source: Path) -> list[Path]:
    """The source and the folders below it, outer ones first; of a file, where it lies. What was
    prepared before is no source: an --out may lie below."""
    level = [source if source.is_dir() else source.parent]
    found = []
    for _ in range(DEPTH):
        found += level
        below = (p for f in level for p in sorted(f.iterdir()) if p.is_dir() and p.name[0] != ".")
        level = [p for p in below if not is_prepared(p)]
    return found


def files(source: Path, *suffixes: str) -> list[Path]:
    """Files with one of the suffixes in the source and below, sorted; the source itself if it is
    one."""
    if source.is_file():
        return [source] if source.suffix.lower() in suffixes else []
    return [
        path
        for folder in folders(source)
        for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix.lower() in suffixes and path.name[0] != "."
    ]


def image_folder(source: Path, names: Collection[str], given: Path | None) -> Path:
    """The folder that image names are relative to.

    Args:
      source: it lies there, or below.
      names: as the rows have them.
      given: what the user named, if anything.

    Raises:
      DataError: no folder has any of the first names.
    """
    if given is not None:
        if not given.is_dir():
            raise DataError(f"--images {given} is no folder")
        return given
    inside = (n for n in names if n and not Path(n).is_absolute() and ".." not in Path(n).parts)
    tried = list(islice(dict.fromkeys(inside), TRIED))
    if not any(names):
        return source if source.is_dir() else source.parent

    def hits(folder: Path) -> int:
        return sum(os.path.isfile(folder / name) for name in tried)  # noqa: PTH113, never raises

    best = max(folders(source), key=hits)
    if not hits(best):
        raise DataError(
            f"{source}: no folder in it holds the images of the rows ({', '.join(tried[:3])}, "
            "...); name it with --images"
        )
    return best


def read_json(path: Path) -> Any:
    """Content of a JSON file. Raises DataError where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}") from error
