"""What is in several splits: the same picture, nearly the same, and the same question about it.

Two pictures are nearly the same where their difference hashes (64 bits) are at most DISTANCE bits
apart and their grey thumbnails, 32 pixels square, correlate by SIMILAR or more. Of 179 700 pairs of
different phantom images no pair with near hashes correlates above 0.972; what JPEG at quality 50,
halving the size, 15 % of brightness or 30 % of contrast do to an image stays above 0.98. Cropped,
turned or strongly darkened copies are not found.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medmoe_jax.data.check.findings import Finding
from medmoe_jax.data.check.pictures import Facts
from medmoe_jax.data.check.rows import Row

DISTANCE = 10  # bits of 64
SIMILAR = 0.98  # correlation
BLOCK = 256  # images compared with all others at once; 100 000 others take 0.3 GB
CHUNK = 1 << 14  # pairs whose thumbnails are compared at once


@dataclass(frozen=True)
class Pair:
    """Two image files of different splits that show the same."""

    first: Path
    second: Path
    similarity: float  # correlation; 1 = the same pixels


@dataclass(frozen=True)
class Leaks:
    """What several splits share."""

    findings: list[Finding]
    pairs: list[Pair]  # of one picture; those with the same pixels first
    shared: dict[str, int]  # 'train & test' -> pictures of the later split that leak


def near(
    hashes: np.ndarray, thumbs: np.ndarray, splits: np.ndarray
) -> list[tuple[int, int, float]]:
    """Pairs of images of different splits that are nearly the same.

    Args:
      hashes: uint64[N].
      thumbs: uint8[N, P], the pixels of each thumbnail.
      splits: int[N].

    Returns:
      (i, j, correlation), i being of the split with the smaller number.
    """
    values = thumbs.astype(np.float32)
    values -= values.mean(1, keepdims=True)
    norms = np.linalg.norm(values, axis=1)
    values /= np.maximum(norms, 1e-6)[:, None]
    flat = norms < 1  # one grey everywhere: like any other such image, and no evidence
    order = np.flatnonzero(~flat)
    order = order[np.argsort(splits[order], kind="stable")]
    hashes, values, splits = hashes[order], values[order], splits[order]
    found = []
    for start in range(0, len(order), BLOCK):
        part = slice(start, start + BLOCK)
        later = int(np.searchsorted(splits, splits[start], side="right"))
        apart = np.bitwise_count(hashes[part, None] ^ hashes[None, later:])
        rows, columns = np.nonzero(apart <= DISTANCE)
        rows, columns = rows + start, columns + later
        other = splits[rows] < splits[columns]
        rows, columns = rows[other], columns[other]
        for at in range(0, len(rows), CHUNK):
            i, j = rows[at : at + CHUNK], columns[at : at + CHUNK]
            alike = np.einsum("np,np->n", values[i], values[j])
            keep = alike >= SIMILAR
            pairs = zip(
                order[i[keep]].tolist(), order[j[keep]].tolist(), alike[keep].tolist(), strict=True
            )
            found += pairs
    return found


def find(rows: Sequence[Row], facts: dict[Path, Facts], level: str) -> Leaks:
    """Pictures and questions of one split that another one has too.

    Args:
      rows: usable rows of all splits.
      facts: of every image file that they name.
      level: of the findings, ERROR or WARNING.

    Returns:
      Findings are about the later split: train comes before val before test, others by name.
    """
    users: dict[Path, list[Row]] = defaultdict(list)
    for row in rows:
        for name in row.sample.images:
            users[row.folder / name].append(row)
    names = sorted({row.split for row in rows}, key=_order)
    entries = [  # one for each split that uses a usable image
        (path, names.index(split))
        for path, using in users.items()
        if facts[path].exact
        for split in sorted({row.split for row in using}, key=_order)
    ]
    group = _Groups(len(entries))
    pairs: dict[tuple[Path, Path], float] = {}
    first: dict[tuple[str, int], int] = {}
    for place, (path, split) in enumerate(entries):
        first.setdefault((facts[path].exact, split), place)
    by_hash: dict[str, list[int]] = defaultdict(list)
    for place, (path, _) in enumerate(entries):
        by_hash[facts[path].exact].append(place)
    for places in by_hash.values():
        for other in places[1:]:
            group.join(places[0], other)
            if entries[places[0]][1] != entries[other][1]:
                pairs[entries[places[0]][0], entries[other][0]] = 1.0
    only = sorted(first.values())
    if only and len(names) > 1:
        chosen = [facts[entries[place][0]] for place in only]
        thumbs = np.stack([np.ravel(f.thumb) for f in chosen if f.thumb is not None])
        hashes = np.array([f.difference for f in chosen], np.uint64)
        for i, j, alike in near(hashes, thumbs, np.array([entries[p][1] for p in only])):
            one, other = entries[only[i]][0], entries[only[j]][0]
            if facts[one].exact != facts[other].exact:
                group.join(only[i], only[j])
                pairs[one, other] = alike
    return _report(rows, facts, level, names, entries, group, pairs)


def _report(
    rows: Sequence[Row],
    facts: dict[Path, Facts],
    level: str,
    names: list[str],
    entries: list[tuple[Path, int]],
    group: _Groups,
    pairs: dict[tuple[Path, Path], float],
) -> Leaks:
    place_of = {entry: place for place, entry in enumerate(entries)}
    holders: dict[int, dict[int, int]] = defaultdict(dict)  # group -> split -> an entry of it
    for place, (_, split) in enumerate(entries):
        holders[group.of(place)].setdefault(split, place)
    asked: dict[Any, Row] = {}
    findings, leaking = [], defaultdict(set)
    for row in sorted(rows, key=lambda r: names.index(r.split)):
        split, sample = names.index(row.split), row.sample
        keys = [place_of.get((row.folder / name, split)) for name in sample.images]
        if any(key is None for key in keys):
            continue  # an unusable image: a finding of its own
        shown = tuple(group.of(key) for key in keys if key is not None)
        about = row.words
        earlier = asked.setdefault((shown, about[0] if shown else about), row)
        same = names.index(earlier.split) < split
        if same:
            other = earlier.sample
            answer = "the same answer" if earlier.words[1] == about[1] else "another answer"
            what = "about the same picture" if shown else "without a picture"
            reason = (
                f"the same question {what}, with {answer}, is in {earlier.split}: {other.file} "
                f"row {other.row} (id {other.id!r})"
            )
            findings.append(
                Finding(level, "question in two splits", sample.file, sample.row, sample.id, reason)
            )
        for key, name in zip(shown, sample.images, strict=True):
            before = [s for s in sorted(holders[key]) if s < split]
            if not before:
                continue
            other_path = entries[holders[key][before[0]]][0]
            path = row.folder / name
            exact = facts[path].exact == facts[other_path].exact
            leaking[f"{names[before[0]]} & {row.split}"].add(path)
            like = "the same as" if exact else "nearly the same as"
            user = f"{other_path.name!r} in {names[before[0]]}"
            findings.append(
                Finding(
                    level,
                    "picture in two splits" if exact else "near-duplicate in two splits",
                    sample.file,
                    sample.row,
                    sample.id,
                    f"image {name!r} is {like} {user}",
                )
            )
    listed = sorted(pairs.items(), key=lambda item: (-item[1], str(item[0])))
    return Leaks(
        findings,
        [Pair(one, other, alike) for (one, other), alike in listed],
        {key: len(paths) for key, paths in sorted(leaking.items())},
    )


def _order(split: str) -> tuple[int, str]:
    known = ("train", "val", "test")
    return (known.index(split) if split in known else len(known), split)


class _Groups:
    """Sets that grow together (union-find)."""

    def __init__(self, size: int):
        self._parent = list(range(size))

    def of(self, item: int) -> int:
        """The set an item is in, by its smallest member."""
        while self._parent[item] != item:
            self._parent[item] = self._parent[self._parent[item]]
            item = self._parent[item]
        return item

    def join(self, one: int, other: int) -> None:
        low, high = sorted((self.of(one), self.of(other)))
        self._parent[high] = low
