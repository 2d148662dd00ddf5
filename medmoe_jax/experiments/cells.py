"""Units of work that are done once: data, a trained model, a set of answers.

A cell is named by what it does and by a digest of all that its result depends on: its settings, its
files' content and its parents. Another setting is another cell, so no result is ever stale, and
tables that need the same model share it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import jax

import medmoe_jax
from medmoe_jax.data.records import INFO, is_records

DONE = "cell.json"  # written last: a folder without it is unfinished
DIGITS = 10  # of the digest in a folder's name

Json = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One unit of work.

    Attributes:
      name: for people, as in "stage3-top2-phi-s0".
      spec: everything that the result depends on beside the parents, JSON.
      parents: cells whose folders `make` reads.
      make: (own folder, parents' folders) -> writes the result. Called again on the same folder
        after an interruption: what it finds there is its own unfinished work.
      resumes: whether `make` goes on with unfinished work; else that is removed first.
    """

    name: str
    spec: Json
    parents: tuple[Cell, ...]
    make: Callable[[Path, list[Path]], None]
    resumes: bool = False

    @cached_property
    def digest(self) -> str:
        """Of the spec and of the parents' digests; the name does not count."""
        whole = {"spec": self.spec, "parents": [parent.digest for parent in self.parents]}
        text = json.dumps(whole, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return f"{self.name}-{self.digest[:DIGITS]}"


class Store:
    """The cells of a run directory, under `workdir/cells`."""

    def __init__(self, workdir: Path) -> None:
        self.root = workdir / "cells"
        self.root.mkdir(parents=True, exist_ok=True)

    def place(self, cell: Cell) -> Path:
        """The cell's folder, whether it is there or not. Another cell of the same work may have
        another name: the digest decides."""
        found = sorted(self.root.glob(f"*-{cell.digest[:DIGITS]}"))
        return found[0] if found else self.root / cell.folder

    def done(self, cell: Cell) -> bool:
        """Whether the cell is finished."""
        return (self.place(cell) / DONE).exists()

    def get(self, cell: Cell) -> Path:
        """The folder of a finished cell; what is missing is made first, parents before children.

        Several processes may share a run directory: each cell is made by one, the others wait.
        """
        if not self.done(cell):
            for parent in cell.parents:
                self.get(parent)
            self.attempt(cell)
        return self.place(cell)

    def attempt(self, cell: Cell, wait: bool = True) -> bool:
        """Makes a cell whose parents are finished, unless it is there.

        Returns:
          Whether it is finished now; False only without `wait`, where another process is at it.
        """
        with self._alone(cell, wait) as mine:
            if not mine or self.done(cell):
                return mine
            parents = [self.place(parent) for parent in cell.parents]
            folder = self.place(cell)
            if folder.exists() and not cell.resumes:
                shutil.rmtree(folder)
            folder.mkdir(parents=True, exist_ok=True)
            print(f"\n=== {cell.name} ===", flush=True)
            started = time.perf_counter()
            cell.make(folder, parents)
            jax.clear_caches()  # programs of this cell; the folder of compiled ones has them
            known = {
                "name": cell.name,
                "spec": cell.spec,
                "parents": [parent.name for parent in parents],
                "seconds": time.perf_counter() - started,
                "version": medmoe_jax.__version__,
                "devices": [str(jax.devices()[0].device_kind), jax.device_count()],
            }
            partial = folder / f"{DONE}.partial"
            partial.write_text(json.dumps(known, indent=1) + "\n")
            partial.replace(folder / DONE)
            print(f"--- {cell.name}: {known['seconds']:.1f} s", flush=True)
            return True

    def known(self, cell: Cell) -> Json:
        """What is noted about a finished cell: spec, seconds, version, devices."""
        return json.loads((self.place(cell) / DONE).read_text())

    @contextmanager
    def _alone(self, cell: Cell, wait: bool) -> Iterator[bool]:
        """Holds the cell's lock, which the system drops when a process ends, however it ends; gives
        whether it does."""
        with (self.root / f".{cell.digest[:DIGITS]}.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True


def every(cells: list[Cell]) -> list[Cell]:
    """The cells and all their parents, each once, parents first."""
    found: dict[str, Cell] = {}

    def add(cell: Cell) -> None:
        for parent in cell.parents:
            add(parent)
        found.setdefault(cell.digest, cell)

    for cell in cells:
        add(cell)
    return list(found.values())


@lru_cache
def fingerprint(path: str) -> str:
    """What a user's file or folder holds, for a spec: CRC of a file's content; of a model folder
    and of records, which are large, when they were written."""
    place = Path(path)
    if is_records(place):
        folder = place if (place / INFO).is_file() else place.parent
        return f"{(folder / INFO).stat().st_mtime_ns}"
    if place.is_dir():
        config = place / "config.json"
        return f"{config.stat().st_mtime_ns}" if config.exists() else "folder"
    crc = 0
    with place.open("rb") as file:
        while part := file.read(1 << 22):
            crc = zlib.crc32(part, crc)
    return f"{crc:08x}"
