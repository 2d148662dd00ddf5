"""Rows of the source against the numbers that were published."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from medmoe_jax.data.prepare.types import SPLITS, Published


@dataclass(frozen=True)
class Comparison:
    """What was published and what the source holds."""

    version: str  # whose numbers they are; '' where none are known
    table: tuple[tuple[str, int, int], ...]  # key, published, found in the source
    explained: str  # why the numbers may be taken as right; '' where they are not
    differs: bool

    @property
    def differences(self) -> list[tuple[str, int, int]]:
        """The lines of the table that do not agree."""
        return [line for line in self.table if line[1] != line[2]]


def none_known() -> Comparison:
    """Of a data set whose numbers nobody published."""
    return Comparison("", (), "no numbers are published", False)


def compare(
    found: Counter[str], published: Sequence[Published], splits: Collection[str] = SPLITS
) -> Comparison:
    """Compares with the version that the layout should be, else with the other known ones.

    Args:
      found: rows of the source by 'train' and by 'train CLOSED'.
      published: versions, the expected one first.
      splits: those that were asked for; the others are not compared.
    """
    if not published:
        return none_known()
    tables = []
    for version in published:
        wanted = {k: n for k, n in version.counts.items() if k.split()[0] in splits}
        tables.append(tuple((key, number, found[key]) for key, number in wanted.items()))
    for place, (version, table) in enumerate(zip(published, tables, strict=True)):
        if all(number == here for _, number, here in table):
            why = "" if place == 0 else f"these are the numbers of {version.version}"
            return Comparison(version.version, table, why, False)
    return Comparison(published[0].version, tables[0], "", True)
