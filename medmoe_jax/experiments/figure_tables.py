"""What the figures of routers and of experts share: kinds of tokens, and tables of levels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from medmoe_jax.analyse.inputs import KINDS
from medmoe_jax.experiments.result import Table
from medmoe_jax.experiments.statistics import Level, as_json
from medmoe_jax.experiments.study import Study

IMAGE, TEXT = [KINDS.index("image")], [KINDS.index("question"), KINDS.index("answer")]
NO_LABEL = "no row of config.files.{} names its modality ('modality' or 'domain')"

Rows = dict[str, dict[str, Level]]  # row -> column -> level, percent


def level_table(title: str, rows: Rows, columns: Sequence[str]) -> Table:
    """Levels as a table, percent."""
    return Table(
        title,
        ("", *columns),
        tuple((name, *(row[c].text() for c in columns)) for name, row in rows.items()),
    )


def over_seeds(study: Study) -> str:
    """How the figures of a table are to be read."""
    n = len(study.seeds)
    return f"percent, mean ± standard deviation over {n} seeds" if n > 1 else "percent"


def rows_as_json(found: Rows) -> dict[str, Any]:
    """The levels for a file."""
    return {name: {c: as_json(v) for c, v in row.items()} for name, row in found.items()}
