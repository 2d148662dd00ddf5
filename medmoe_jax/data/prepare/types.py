"""What a data set is to the preparation: where its images lie, what its rows are, how many there
should be."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medmoe_jax.data.images import find_image
from medmoe_jax.data.problems import Problem

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Licence:
    """Under which terms a data set is given away."""

    name: str  # SPDX identifier where there is one
    link: str  # to its text, or to the page that states it
    note: str  # who says so, what it asks for
    citation: str = ""


@dataclass(frozen=True)
class Picture:
    """An image of the source that has not been looked at yet."""

    name: str  # path below `images/` of the prepared folder; a right suffix is added if it lacks
    read: Callable[[], bytes] | None = None  # its content, called in a thread of the writer
    file: Path | None = None  # or where it lies; DICOM and NIfTI are known by their names


@dataclass(frozen=True)
class Draft:
    """One usable row of the source, with images that have not been looked at yet."""

    file: str
    place: int  # 0-based position in the file
    row: dict[str, Any]  # of the manifest, without `image`; see `texts.Reading.draft`
    pictures: tuple[Picture, ...] = ()
    handled: tuple[str, ...] = ()  # defects that were put right, one phrase each, without values


@dataclass(frozen=True)
class LeftOut:
    """A row that is left out for a reason that is known beforehand."""

    reason: str
    split: str
    answer_type: str = ""
    counted: bool = True  # whether the published counts include it


@dataclass(frozen=True)
class Bad:
    """A row that cannot be used."""

    problem: Problem
    split: str = ""  # '' where unknown


Event = Draft | LeftOut | Bad


@dataclass(frozen=True)
class Published:
    """How many rows a version of a data set has."""

    version: str  # and where the numbers come from
    counts: Mapping[str, int]  # 'train' or 'test CLOSED' -> rows; what is absent is not compared


@dataclass(frozen=True)
class Opened:
    """A source that was recognised."""

    layout: str  # what it was recognised as
    events: Iterator[Event]
    licences: Sequence[Licence]
    published: Sequence[Published] = ()  # of this layout first, then other known versions
    total: int | None = None  # rows in the source, for the progress bar
    remarks: tuple[str, ...] = ()  # what a user should know about this layout


@dataclass(frozen=True)
class DataSet:
    """One data set, as the command line knows it."""

    name: str
    title: str  # a line of help
    layouts: str  # what `--source` may be, for the help
    read: Callable[[Sequence[Path], argparse.Namespace], Opened]  # DataError: unknown layout
    add_arguments: Callable[[argparse.ArgumentParser], None] = field(default=lambda parser: None)


def from_folder(folder: Path, name: str) -> Picture:
    """Image `name` of a folder, to be stored under the same name.

    Raises:
      DataError: the name leaves the folder, or there is no such file.
    """
    return Picture(Path(name).as_posix(), file=find_image(folder, name))


def from_bytes(data: bytes) -> Picture:
    """An image that came inside a table, named after its content, so that rows share it."""
    return Picture(hashlib.sha256(data).hexdigest()[:20], read=lambda: data)
