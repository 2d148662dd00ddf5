"""Pictures of comparisons: points with deviations, and differences with their intervals."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medmoe_jax.evaluation.plots import BLUE, DPI, GREEN, GREY, STYLE, VERMILION, WIDTH
from medmoe_jax.experiments.statistics import ALL, Difference, Level
from medmoe_jax.metrics import MissingExtra

COLOURS = (BLUE, VERMILION, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKS = "osD^vPX"
ROW = 0.2  # inches


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    """A matplotlib figure in the style of a paper, inches, and what to draw it in (a context).

    Raises:
      MissingExtra: matplotlib is absent.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("Pictures need matplotlib: pip install 'medmoe_jax[plots]'") from error
    style = matplotlib.rc_context(STYLE)
    with style:
        figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, matplotlib.rc_context(STYLE)


def comparison(
    path: Path,
    title: str,
    found: Mapping[str, Mapping[str, Level]],
    apart: Mapping[Any, Mapping[str, Difference]],
) -> Path:
    """Left the level of each row in each column (mean, deviation over seeds), right the differences
    (mean of the columns, 95 % interval).

    Args:
      path: PNG to write.
      title: above the left part.
      found: row -> column -> level, percent.
      apart: pair -> column -> difference, points.
    """
    columns = list(next(iter(found.values())))
    widest = max(len(columns) * (len(found) + 1), 4)
    height = max(WIDTH * 0.62, ROW * widest * 0.45 + 0.9)
    figure, style = new_figure(2 * WIDTH if apart else WIDTH * 1.3, height)
    with style:
        parts = figure.subplots(1, 2, width_ratios=(1.15, 1)) if apart else [figure.subplots()]
        _levels(parts[0], found, columns)
        parts[0].set_title(title, loc="left", wrap=True)
        if apart:
            _differences(parts[1], apart)
        figure.legend(
            *parts[0].get_legend_handles_labels(), loc="outside lower left", ncols=2, fontsize=7
        )
        figure.savefig(path, dpi=DPI)
    return path


def _levels(axes: Any, found: Mapping[str, Mapping[str, Level]], columns: list[str]) -> None:
    step = 0.8 / len(found)
    for place, (title, row) in enumerate(found.items()):
        middle = [i + (place - (len(found) - 1) / 2) * step for i in range(len(columns))]
        axes.errorbar(
            [row[column].mean for column in columns],
            middle,
            xerr=[row[column].std or 0.0 for column in columns],
            fmt=MARKS[place % len(MARKS)],
            color=COLOURS[place % len(COLOURS)],
            markersize=4,
            linewidth=1,
            label=title,
        )
    axes.set_yticks(range(len(columns)), columns)
    axes.set_ylim(len(columns) - 0.5, -0.5)
    for line in range(1, len(columns)):
        axes.axhline(line - 0.5, color=GREY, linewidth=0.3)
    axes.set_xlabel("percent (mean, deviation over seeds)")


def _differences(axes: Any, apart: Mapping[Any, Mapping[str, Difference]]) -> None:
    for place, row in enumerate(apart.values()):
        for offset, (name, found) in enumerate(row.items()):
            whole = name == ALL
            colour = {1: GREEN, 0: GREY, -1: VERMILION}[found.verdict]
            y = place + (offset - len(row) / 2 + 0.5) * 0.8 / len(row)
            axes.plot([found.low, found.high], [y, y], color=colour, linewidth=2 if whole else 0.8)
            axes.plot(
                found.mean, y, "D" if whole else "o", color=colour, markersize=5 if whole else 3
            )
    axes.axvline(0, color="black", linewidth=0.8)
    names = [f"{pair.first}\n- {pair.second}" for pair in apart]
    axes.set_yticks(range(len(apart)), names, fontsize=6.5)
    axes.set_ylim(len(apart) - 0.5, -0.5)
    axes.set_xlabel("difference, points\n(95 % interval; thick: mean)")
