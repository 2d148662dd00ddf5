"""What an experiment finds: tables of text, claims with verdicts, pictures, and all numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medmoe_jax.experiments.cells import Cell, Store
from medmoe_jax.experiments.paper import PaperTable
from medmoe_jax.experiments.statistics import Difference
from medmoe_jax.experiments.study import Study

VERDICTS = {
    1: "reproduced",
    0: "undecided: the interval contains zero",
    -1: "not reproduced",
}


@dataclass(frozen=True)
class Table:
    """A table of text; the first entry of a row is its title."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Claim:
    """Something the paper says (or a control asks), and what is seen here.

    Attributes:
      text: the statement, as a difference above zero.
      verdict: a key of VERDICTS; never set by hand, see `claim`.
      evidence: the figures behind it.
      of_paper: whether the paper says so.
    """

    text: str
    verdict: int
    evidence: str
    of_paper: bool = True

    def words(self) -> str:
        """The verdict in words."""
        if self.of_paper:
            return VERDICTS[self.verdict]
        return {1: "yes", 0: VERDICTS[0], -1: "no"}[self.verdict]


@dataclass(frozen=True)
class Result:
    """What an experiment gives; `report.py` writes it down.

    Attributes:
      name: of the experiment, and of its files.
      title: a line.
      tables, claims, notes: for readers.
      pictures: PNG file names, in the folder of results.
      data: all numbers, JSON.
    """

    name: str
    title: str
    tables: tuple[Table, ...] = ()
    claims: tuple[Claim, ...] = ()
    notes: tuple[str, ...] = ()
    pictures: tuple[str, ...] = ()
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment:
    """One table or figure.

    Attributes:
      title: a line.
      cells: study -> the cells whose folders `result` reads; they (and what they need) are made
        first.
      result: (name, study, store with finished cells, folder for pictures) -> what is found.
    """

    title: str
    cells: Callable[[Study], list[Cell]]
    result: Callable[[str, Study, Store, Path], Result]


def claim(text: str, found: Difference, of_paper: bool = True) -> Claim:
    """A claim that a difference is above zero, judged by its interval."""
    opposite = "the opposite is seen: " if found.verdict < 0 else ""
    return Claim(text, found.verdict, f"{opposite}{found.text()} points", of_paper)


def paper_table(title: str, printed: PaperTable) -> Table:
    """The paper's figures as a table."""

    def shown(value: float | str | None) -> str:
        return "-" if value is None else str(value)

    rows = tuple((name, *map(shown, row)) for name, row in printed.rows.items())
    return Table(title, ("", *printed.columns), rows)


def markdown(table: Table) -> str:
    """The table in Markdown, without its title."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    marks = ["---", *["---:"] * (len(table.columns) - 1)]
    return "\n".join([line(table.columns), line(marks), *map(line, table.rows)])
