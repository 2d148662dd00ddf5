"""What an answer owes to the image: the same questions with the image taken away.

With a blank or a noise image, or with that of another row (shuffled), a model can only use the
question and its habits. What it loses then, it had from the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from medmoe_jax.data.problems import DataError
from medmoe_jax.evaluation.bootstrap import Bootstrap, cells
from medmoe_jax.evaluation.rows import Item

CONTROLS = ("blank", "noise", "shuffled")


def check(name: str, items: Sequence[Item], file: str) -> None:
    """Raises a DataError where the answers were not made with such images, as far as they tell."""
    if name not in CONTROLS:
        raise DataError(f"the control {name!r} is none of {', '.join(CONTROLS)}")
    others = {item.shown for item in items} - {name, ""}
    if others:
        raise DataError(
            f"{file} is named as the control {name!r}, but was made with images "
            f"{sorted(others)}: run predict with --images {name}"
        )


def compare(
    items: Sequence[Item],
    control: Sequence[Item],
    found: dict[str, np.ndarray],
    without: dict[str, np.ndarray],
    boot: Bootstrap,
) -> dict[str, Any]:
    """Figures with and without the image, and their difference.

    Args:
      items: n rows, answered with their images.
      control: the same rows, answered without.
      found: columns of `items` (figure -> f64[n], NaN = the row does not count).
      without: columns of `control`; figures that only one side has are left out.
      boot: of the rows; the difference of each draw is taken on the same rows.

    Returns:
      n, same_answer_percent (answers whose text is the same), figures: figure -> n (rows that both
      sides have), shown_percent, control_percent, difference (points), ci95 (of the difference).
    """
    same = [
        a.prediction.strip() == b.prediction.strip() for a, b in zip(items, control, strict=True)
    ]
    shared = [name for name in found if name in without]
    apart = {name: found[name] - without[name] for name in shared}
    both = {name: np.isfinite(column) for name, column in apart.items()}
    figures = {}
    for name, cell in cells(apart, boot).items():
        if cell["n"]:
            figures[name] = {
                "n": cell["n"],
                "shown_percent": 100 * float(found[name][both[name]].mean()),
                "control_percent": 100 * float(without[name][both[name]].mean()),
                "difference": cell["percent"],
                "ci95": cell["ci95"],
            }
    return {
        "n": len(items),
        "same_answer_percent": 100 * float(np.mean(same)),
        "figures": figures,
    }
