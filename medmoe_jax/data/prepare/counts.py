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
    """Of a data set, or of splits, whose numbers nobody published."""
    return Comparison("", (), "no numbers are published", False)


def compare(
    found: Counter[str], published: Sequence[Published], splits: Collection[str] = SPLITS
) -> Comparison:
    """Compares with the version that the layout should be, else with the other known ones.

    Args:
      found: rows of the source by 'train' and by 'train CLOSED'.
      published: versions, the expected one first. One that says nothing of the splits that were
        asked for is none to compare with.
      splits: those that were asked for; the others are not compared.
    """
    tables = []
    for version in published:
        wanted = {k: n for k, n in version.counts.items() if k.split()[0] in splits}
        if wanted:
            table = tuple((key, number, found[key]) for key, number in wanted.items())
            tables.append((version.version, table))
    if not tables:
        return none_known()
    expected = published[0].version
    for name, table in tables:
        if all(number == here for _, number, here in table):
            why = "" if name == expected else f"these are the numbers of {name}"
            return Comparison(name, table, why, False)
    name, table = tables[0]
    return Comparison(name, table, "", True)
