"""Tables that compare variants: levels of each, and differences of pairs with intervals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medmoe_jax.experiments import answers, drawing, paper
from medmoe_jax.experiments.cells import Cell, Store
from medmoe_jax.experiments.config import LLMS
from medmoe_jax.experiments.result import Claim, Experiment, Result, Table, claim, paper_table
from medmoe_jax.experiments.statistics import (
    ALL,
    Difference,
    Level,
    Scores,
    as_json,
    differences,
    levels,
)
from medmoe_jax.experiments.study import Study

OPEN_CLOSED = ("open", "closed")


@dataclass(frozen=True)
class Row:
    """A model of a table.

    Attributes:
      title: in the table.
      llm: phi or stablelm.
      variant: of phase 3, or "stage2" for the model of phase 2.
      control: what is shown instead of images.
    """

    title: str
    llm: str = "phi"
    variant: str = "moe"
    control: str = "shown"

    def model(self, study: Study, seed: int) -> Cell:
        """The cell of its model."""
        if self.variant == "stage2":
            return study.stage2(self.llm, seed)
        return study.stage3(self.llm, seed, self.variant)


@dataclass(frozen=True)
class Pair:
    """Two rows (by title) whose difference is asked for: first minus second.

    Attributes:
      says: the claim, that this is above zero; "" = the difference is shown, nobody claims it.
      of_paper: whether the claim is the paper's.
    """

    first: str
    second: str
    says: str = ""
    of_paper: bool = True


@dataclass(frozen=True)
class Comparison:
    """A table of variants, as data.

    Attributes:
      title: a line.
      rows: from top to bottom.
      pairs: what is compared.
      role: of the test files.
      figures: columns of each test; () = the classification tasks.
      notes: what a reader should know.
      hours: whether training times are a column.
    """

    title: str
    rows: tuple[Row, ...]
    pairs: tuple[Pair, ...]
    role: str = "tests"
    figures: tuple[str, ...] = OPEN_CLOSED
    notes: tuple[str, ...] = ()
    hours: bool = False

    def experiment(self) -> Experiment:
        """As the catalogue lists it."""
        return Experiment(self.title, self.cells, self.result)

    def cells(self, study: Study) -> list[Cell]:
        """The answers of all rows and seeds."""
        return [cell for row in self.rows for cell in self._answers(row, study)]

    def _answers(self, row: Row, study: Study) -> list[Cell]:
        return [
            study.answers(row.model(study, seed), seed, row.control, self.role)
            for seed in study.seeds
        ]

    def scores(self, row: Row, study: Study, store: Store) -> list[Scores]:
        """One a seed."""
        read: Callable[[Path], Scores] = answers.read_tasks
        if self.figures:
            read = lambda folder: answers.read_scores(folder, self.figures)  # noqa: E731
        return [read(store.place(cell)) for cell in self._answers(row, study)]

    def result(self, name: str, study: Study, store: Store, folder: Path) -> Result:
        """Tables, claims and a picture."""
        scores = {row.title: self.scores(row, study, store) for row in self.rows}
        found = {title: levels(seeds) for title, seeds in scores.items()}
        apart = {
            pair: differences(scores[pair.first], scores[pair.second], study.cfg.bootstrap)
            for pair in self.pairs
        }
        seconds = {row.title: self._seconds(row, study, store) for row in self.rows}
        columns = list(next(iter(found.values())))
        tables = [_level_table(found, columns, seconds if self.hours else {}, study)]
        if apart:
            tables.append(_difference_table(apart, columns))
        notes = list(self.notes)
        printed = paper.TABLES.get(name)
        if printed:
            title = f"The paper's {name.replace('table', 'Table ')}, on its data sets"
            tables.append(paper_table(title, printed))
            notes += [f"On the paper's table: {printed.remark}"] if printed.remark else []
        claims = tuple(c for pair, found in apart.items() for c in _claims(pair, found))
        picture = drawing.comparison(folder / f"{name}.png", self.title, found, apart)
        return Result(
            name,
            self.title,
            tuple(tables),
            claims,
            tuple(notes),
            (picture.name,),
            {
                "levels": {
                    title: {column: as_json(value) for column, value in row.items()}
                    for title, row in found.items()
                },
                "differences": [
                    {"first": pair.first, "second": pair.second, "claim": pair.says}
                    | {"columns": {column: as_json(value) for column, value in row.items()}}
                    for pair, row in apart.items()
                ],
                "training_seconds": seconds,
                "cells": {
                    row.title: [cell.folder for cell in self._answers(row, study)]
                    for row in self.rows
                },
            },
        )

    def _seconds(self, row: Row, study: Study, store: Store) -> list[float]:
        """What the last phase of the row took, a seed."""
        return [store.known(row.model(study, seed))["seconds"] for seed in study.seeds]


def _level_table(
    found: dict[str, dict[str, Level]],
    columns: list[str],
    seconds: dict[str, list[float]],
    study: Study,
) -> Table:
    n = len(study.seeds)
    title = f"Here, percent, mean ± standard deviation over {n} seeds" if n > 1 else "Here, percent"
    rows = []
    for name, row in found.items():
        cells = [row[column].text() for column in columns]
        if seconds:
            cells.append(f"{sum(seconds[name]) / n:.0f} s")
        rows.append((name, *cells))
    return Table(title, ("", *columns, *(["training"] if seconds else [])), tuple(rows))


def _difference_table(apart: dict[Pair, dict[str, Difference]], columns: list[str]) -> Table:
    rows = tuple(
        (f"{pair.first} - {pair.second}", *(row[column].text() for column in columns))
        for pair, row in apart.items()
    )
    title = "Differences, points, with 95 % intervals (seeds and images drawn, paired by question)"
    return Table(title, ("", *columns), rows)


def _claims(pair: Pair, found: dict[str, Difference]) -> list[Claim]:
    """One claim for the mean of the columns; the columns one by one are in its evidence."""
    if not pair.says:
        return []
    single = [value.verdict for name, value in found.items() if name != ALL]
    judged = claim(pair.says, found[ALL], pair.of_paper)
    each = (
        f"; of {len(single)} columns {single.count(1)} above zero, {single.count(-1)} below, "
        f"{single.count(0)} undecided"
    )
    return [Claim(judged.text, judged.verdict, judged.evidence + each, pair.of_paper)]


def both(make: Callable[[str, str], Any]) -> tuple[Any, ...]:
    """`make(llm, its name)` for both language models."""
    return tuple(make(llm, name) for llm, name in LLMS.items())
