"""Figures of an analysis, as PNG: expert loads, the router, an explanation, deletion curves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medmoe_jax.analyse import routing
from medmoe_jax.analyse.explain import Explanation
from medmoe_jax.analyse.inputs import KINDS
from medmoe_jax.evaluation.plots import BLUE, DPI, GREEN, GREY, STYLE, VERMILION, WIDTH
from medmoe_jax.metrics import MissingExtra

# Of experts, told apart in print and by colour-blind readers (Okabe and Ito).
COLOURS = (BLUE, VERMILION, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", GREY)
BLUES, REDS = (0.10, 0.35, 0.95), (0.95, 0.15, 0.10)  # against and for an answer
SHOWN_KINDS = ("image", "text")


def need_matplotlib() -> None:
    """Raises MissingExtra where matplotlib is absent."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingExtra("Figures need matplotlib: pip install 'medmoe_jax[plots]'") from error


def save(path: Path, size: tuple[float, float], draw_on: Callable[[Any], None]) -> Path:
    """Writes one figure; `size` is (width, height) in inches, `draw_on` takes the empty figure.

    Raises:
      MissingExtra: matplotlib is absent.
    """
    need_matplotlib()
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        draw_on(figure)
        figure.savefig(path, dpi=DPI)
    return path


def colour(expert: int) -> str:
    """Of an expert; beyond the eighth they repeat."""
    return COLOURS[expert % len(COLOURS)]


def loads(report: Mapping[str, Any], path: Path) -> Path:
    """Share of each expert at each layer, a panel for each modality and for image and text."""
    groups = [name for name in report["samples"] if name != "all"] or ["all"]
    layers = report["layers"]
    rows = {(r["modality"], r["kind"], r["layer"]): r["share"] for r in report["loads"]}
    kinds = [kind for kind in SHOWN_KINDS if any(rows[g, kind, n] for g in groups for n in layers)]

    def draw_on(figure: Any) -> None:
        panels = figure.subplots(len(kinds), len(groups), sharex=True, sharey=True, squeeze=False)
        for row, kind in zip(panels, kinds, strict=True):
            for axes, group in zip(row, groups, strict=True):
                _stacked(axes, [rows[group, kind, n] for n in layers], report["experts"])
                axes.set_yticks(range(len(layers)), [str(n) for n in layers])
            row[0].set_ylabel(f"{kind} tokens\nlayer", fontsize=8)
        for axes, group in zip(panels[0], groups, strict=True):
            axes.set_title(group)
        panels[0][0].invert_yaxis()
        for axes in panels[-1]:
            axes.set_xlabel("share")
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))

    height = len(kinds) * (0.55 + max(0.16 * len(layers), 0.6)) + 0.7
    return save(path, (2 * WIDTH, height), draw_on)


def _stacked(axes: Any, shares: Sequence[Sequence[float] | None], names: Sequence[str]) -> None:
    values = np.array([[np.nan] * len(names) if s is None else s for s in shares])
    left = np.zeros(len(values))
    for e, name in enumerate(names):
        axes.barh(range(len(values)), values[:, e], 0.85, left, color=colour(e), label=name)
        left = left + np.nan_to_num(values[:, e])
    axes.set_xlim(0, 1)


def router(report: Mapping[str, Any], path: Path) -> Path:
    """Entropy of the router by layer, and which modality it takes for which."""
    found, layers = report["router"], report["layers"]
    groups = [name for name in report["samples"] if name != "all"] or ["all"]
    rows = {(r["modality"], r["kind"], r["layer"]): r["entropy_bits"] for r in report["loads"]}

    def draw_on(figure: Any) -> None:
        panels = figure.subplots(1, 2 if found["labelled"] else 1, squeeze=False)[0]
        for kind, dashes in zip(SHOWN_KINDS, ("-", ":"), strict=True):
            for number, group in enumerate(groups):
                bits = [rows[group, kind, n] for n in layers]
                values = [np.nan if b is None else b for b in bits]
                label = f"{group}, {kind}"
                panels[0].plot(
                    layers, values, dashes, color=colour(number), marker=".", label=label
                )
        most = float(np.log2(len(report["experts"])))
        panels[0].axhline(most, color=GREY, linewidth=0.8, label="all experts alike")
        panels[0].set(xlabel="layer", ylabel="entropy of the router (bits)", ylim=(0, most * 1.05))
        panels[0].set_xticks(layers)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        if found["labelled"]:
            _confusion(panels[1], found)

    return save(path, (2 * WIDTH, 1.15 * WIDTH), draw_on)


def _confusion(axes: Any, found: Mapping[str, Any]) -> None:
    table, names = np.array(found["confusion"]), found["classes"]
    total = np.maximum(table.sum(1, keepdims=True), 1)
    axes.imshow(table / total, cmap="Blues", vmin=0, vmax=1)
    for (i, j), n in np.ndenumerate(table):
        dark = n > 0.5 * total[i, 0]
        axes.text(j, i, str(n), ha="center", va="center", color="white" if dark else "black")
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel=f"router (accuracy {found['accuracy']:.1%})", ylabel="truth")


def overlay(found: Explanation, path: Path) -> Path:
    """The pictures, and over each what its patches add to the answer."""
    need_matplotlib()
    from matplotlib.colors import LinearSegmentedColormap

    # Clear where a patch adds nothing, so that the picture is seen.
    ends = [(0.0, (*BLUES, 0.85)), (0.5, (*BLUES, 0.0)), (0.5, (*REDS, 0.0)), (1.0, (*REDS, 0.85))]
    added = LinearSegmentedColormap.from_list("added", ends)
    most = float(np.abs(found.attribution).max()) or 1.0
    heights = [0.86 * WIDTH * picture.height / picture.width for picture in found.pictures]

    def draw_on(figure: Any) -> None:
        panels = figure.subplots(len(heights), 2, height_ratios=heights, squeeze=False)
        shade = None
        for number, (row, picture) in enumerate(zip(panels, found.pictures, strict=True)):
            grey = np.asarray(picture.convert("L"))
            row[0].imshow(np.asarray(picture))
            row[1].imshow(grey, cmap="gray", vmin=0, vmax=255)
            values = np.ma.masked_invalid(found.overlay(number))
            shade = row[1].imshow(values, cmap=added, vmin=-most, vmax=most)
            for axes in row:
                axes.set_axis_off()
        method = found.method.replace("_", " ")
        bar = figure.colorbar(shade, ax=panels[:, 1].tolist(), shrink=0.8)
        bar.set_label(f"added to log p(answer)\n({method})")
        title = f"{found.question}\n{found.answer} ({found.probability:.1%})"
        figure.suptitle(title, fontsize=9, parse_math=False)

    return save(path, (2 * WIDTH, max(0.6 + sum(heights), WIDTH / 2)), draw_on)


def experts(found: Explanation, path: Path) -> Path:
    """First choice of every patch and of every word at each layer; needs `found.experts`."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    assert found.experts is not None
    first, layers = found.experts.choice[:, :, 0], found.experts.layers
    n_experts = found.experts.probability.shape[-1]
    names = routing.names(n_experts)
    shades: dict[str, Any] = {
        "cmap": ListedColormap([colour(e) for e in range(n_experts)]),
        "vmin": -0.5,
        "vmax": n_experts - 0.5,
        "interpolation": "nearest",
    }
    image = found.kinds == KINDS.index("image")
    grids = first[:, image].reshape(len(layers), *found.attribution.shape)
    words = [_label(text) for text, patch in zip(found.tokens, image, strict=True) if not patch]
    rows = len(found.pictures)

    def draw_on(figure: Any) -> None:
        upper, lower = None, figure
        if rows:
            upper, lower = figure.subfigures(2, 1, height_ratios=(rows, 2))
        if upper is not None:
            panels = upper.subplots(rows, len(layers), squeeze=False)
            for number, line in enumerate(panels):
                for at, axes in enumerate(line):
                    axes.imshow(grids[at, number], **shades)
                    axes.set(xticks=[], yticks=[])
                    if not number:
                        axes.set_title(f"layer {layers[at]}")
        axes = lower.subplots()
        axes.imshow(first[:, ~image], aspect="auto", **shades)
        axes.set_yticks(range(len(layers)), [str(n) for n in layers])
        axes.set_ylabel("layer")
        axes.set_xticks(range(len(words)), words, rotation=90, fontsize=5, parse_math=False)
        handles = [Patch(color=colour(e), label=name) for e, name in enumerate(names)]
        figure.legend(handles=handles, loc="outside upper center", ncols=n_experts)

    width = max(2 * WIDTH, 0.09 * len(words), 0.8 * len(layers))
    return save(path, (width, 2.4 + rows * width / max(len(layers), 4)), draw_on)


def _label(text: str) -> str:
    """A token as a label: no line breaks, nothing that the font may lack."""
    return text.strip().encode("ascii", "replace").decode()


def deletion(report: Mapping[str, Any], path: Path) -> Path:
    """The answer's probability as patches are hidden, of one question or of many."""

    def draw_on(figure: Any) -> None:
        axes = figure.subplots()
        x = report["fractions"]
        if "random_interval95" in report:
            low, high = report["random_interval95"]
            axes.fill_between(x, low, high, color=GREY, alpha=0.25, linewidth=0)
        random, own = report["random_mean"], report["probability"]
        axes.plot(x, random, "--", color=GREY, marker=".", label="hidden at random")
        axes.plot(x, own, color=VERMILION, marker=".", label="hidden in the overlay's order")
        axes.set(xlim=(0, 1), ylim=(0, None), xlabel="share of patches hidden")
        axes.set_ylabel("probability of the answer")
        gap = report["gap"]
        value = gap["mean"] if isinstance(gap, Mapping) else gap
        many = f" ({report['questions']} questions)" if "questions" in report else ""
        axes.set_title(f"area between the curves {value:+.3f}{many}")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)

    return save(path, (1.3 * WIDTH, WIDTH), draw_on)
