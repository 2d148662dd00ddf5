"""Pictures of confidence quality: reliability diagram and risk-coverage curve, as PNG."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medmoe_jax.metrics import MissingExtra

DPI = 200
WIDTH = 3.5  # inches, a column of a paper
STYLE: dict[Any, Any] = {
    "hatch.linewidth": 0.6,
    "legend.title_fontsize": 8,
    "font.size": 8,
    "axes.labelsize": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 8,
}
# Told apart in print and by colour-blind readers (Okabe and Ito).
BLUE, VERMILION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"
LIGHT_BLUE = "#8FC1E3"
DOT: dict[str, Any] = {"markersize": 5, "markeredgecolor": "white", "markeredgewidth": 0.8}
SHOWN_FROM = 0.02  # coverage; below it the risk is that of a handful of answers
LINES = {"all": (BLUE, "-"), "closed": (VERMILION, "--"), "open": (GREEN, "-.")}


def draw(confidence: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draws what `confidence.report` found.

    Args:
      confidence: that report.
      folder: for reliability.png and risk_coverage.png; made if it is not there.

    Returns:
      The files written.

    Raises:
      MissingExtra: matplotlib is absent.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("Pictures need matplotlib: pip install 'medmoe_jax[plots]'") from error
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, draw_on in (("reliability", _reliability), ("risk_coverage", _risk_coverage)):
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(WIDTH, WIDTH * 1.15), layout="constrained")
            FigureCanvasAgg(figure)
            draw_on(figure, confidence)
            files.append(folder / f"{name}.png")
            figure.savefig(files[-1], dpi=DPI)
    return files


def _reliability(figure: Any, confidence: Mapping[str, Any]) -> None:
    """Accuracy against confidence, and below it how many answers each bar stands for."""
    found = confidence["all"]
    bars = [bar for bar in found["reliability"] if bar["n"]]
    width = found["reliability"][0]["high"]
    middle = [bar["low"] + width / 2 for bar in bars]
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    right = [bar["accuracy"] for bar in bars]
    gap = [bar["confidence"] - bar["accuracy"] for bar in bars]
    upper.bar(middle, right, width * 0.94, color=LIGHT_BLUE, label="right answers")
    upper.bar(
        middle,
        gap,
        width * 0.94,
        right,
        facecolor="none",
        edgecolor=VERMILION,
        hatch="/////",
        linewidth=0.8,
        label="gap to the mean confidence",
    )
    upper.plot([0, 1], [0, 1], color="black", linewidth=0.9, linestyle="--", label="calibrated")
    upper.set(xlim=(0, 1), ylim=(0, 1), ylabel="share of right answers")
    figure.legend(
        *upper.get_legend_handles_labels(),
        loc="outside upper left",
        title=f"ECE {found['ece']:.3f}, Brier score {found['brier']:.3f}, n = {found['n']}",
        alignment="left",
    )
    share = [bar["n"] / found["n"] for bar in bars]
    lower.bar(middle, share, width * 0.94, color=GREY)
    lower.set(xlabel="confidence", ylabel="share of\nanswers", ylim=(0, max(share) * 1.1))
    lower.yaxis.set_major_locator(_ticks(2))
    figure.align_ylabels()


def _risk_coverage(figure: Any, confidence: Mapping[str, Any]) -> None:
    """Wrong answers among those given, when the least sure ones are withheld."""
    axes = figure.subplots()
    highest, below = 0.0, None
    for kind, (colour, dashes) in LINES.items():
        if kind not in confidence:
            continue
        found = confidence[kind]
        coverage, risks = _smooth(found["risk_coverage"])
        axes.plot(
            coverage,
            risks,
            color=colour,
            linestyle=dashes,
            linewidth=1.4,
            clip_on=False,
            label=f"{kind} (n = {found['n']}, AURC {found['aurc']:.3f})",
        )
        highest = max(highest, *risks)
        if "abstain" in found and found["abstain"]["n_answered"]:
            answered = found["abstain"]
            risk = 1 - answered["accuracy_percent"] / 100
            axes.plot(answered["coverage_percent"] / 100, risk, "o", color=colour, **DOT)
            below = answered["below"]
    wrong = 1 - confidence["all"]["accuracy_percent"] / 100
    axes.axhline(wrong, color=GREY, linewidth=0.8, linestyle=":", label="all, withheld at random")
    best = [i / 200 for i in range(1, 201)]
    axes.plot(
        best,
        [max(0.0, 1 - (1 - wrong) / coverage) for coverage in best],
        color=GREY,
        linewidth=0.8,
        label="all, best possible order",
    )
    if below is not None:
        label = f"withheld below a confidence of {below:g}"
        axes.plot([], [], "o", color="black", **DOT, label=label)
    top = max(highest, wrong, 0.01) * 1.05
    axes.set(xlim=(0, 1), ylim=(0, top), xlabel="coverage (share of questions answered)")
    axes.set_ylabel("risk (share of wrong ones among them)")
    axes.xaxis.set_major_formatter(_percent())
    axes.yaxis.set_major_formatter(_percent())
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left")


def _smooth(curve: Mapping[str, list[float]]) -> tuple[list[float], list[float]]:
    """Coverage and risk to be drawn; equal confidences at the start are a level line."""
    coverage, risk = curve["coverage"], curve["risk"]
    first = next(i for i, value in enumerate(coverage) if value >= SHOWN_FROM)
    if first:
        return coverage[first:], risk[first:]
    return [0.0, *coverage], [risk[0], *risk]


def _percent() -> Any:
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(1.0, symbol=" %")


def _ticks(n: int) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(n)
