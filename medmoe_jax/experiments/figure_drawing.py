"""Pictures of the figures: embeddings, accuracy curves, shares of tokens, busiest experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medmoe_jax.analyse import routing
from medmoe_jax.analyse.routing import Trace
from medmoe_jax.config import MODALITIES
from medmoe_jax.evaluation.plots import BLUE, DPI, GREY, VERMILION, WIDTH
from medmoe_jax.experiments.drawing import COLOURS, MARKS, new_figure
from medmoe_jax.experiments.statistics import Level

Rows = Mapping[str, Mapping[str, Level]]


def principal(points: np.ndarray) -> np.ndarray:
    """The first two principal components of f64[n, F]: f64[n, 2]; F is 2 at least."""
    centred = points - points.mean(0)
    axes = np.linalg.svd(centred, full_matrices=False)[2]
    signs = np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(1)])  # the same every time
    return centred @ (axes * signs[:, None])[:2].T


def embeddings(path: Path, traces: Mapping[str, Trace], found: Rows) -> Path:
    """Samples in the plane of their router scores, a panel a router with its levels above."""
    figure, style = new_figure(2 * WIDTH, WIDTH)
    with style:
        panels = figure.subplots(1, len(traces), squeeze=False)[0]
        for axes, (title, trace) in zip(panels, traces.items(), strict=True):
            points = principal(trace.scores)
            for m, modality in enumerate(MODALITIES):
                here = points[trace.modality == m]
                axes.plot(*here.T, MARKS[m], color=COLOURS[m], markersize=2.5, label=modality)
            lines = [f"{column}: {value.text()}" for column, value in found[title].items()]
            axes.set_title("\n".join([title, *lines]), fontsize=7)
            axes.set(xticks=[], yticks=[], xlabel="component 1")
        panels[0].set_ylabel("component 2")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        figure.savefig(path, dpi=DPI)
    return path


def curve(path: Path, found: Rows, columns: Sequence[str]) -> Path:
    """Levels against the number in the rows' names, deviations as bars."""
    figure, style = new_figure(1.3 * WIDTH, 0.9 * WIDTH)
    x = [int(name) for name in found]
    with style:
        axes = figure.subplots()
        for place, column in enumerate(columns):
            each = [row[column] for row in found.values()]
            axes.errorbar(
                x,
                [one.mean for one in each],
                yerr=[one.std or 0.0 for one in each],
                fmt=f"{MARKS[place]}-",
                color=COLOURS[place],
                markersize=4,
                linewidth=1.2,
                capsize=2,
                label=column,
            )
        axes.axhline(100 / len(MODALITIES), color=GREY, linewidth=0.8, label="chance")
        axes.set_xscale("log")
        axes.set_xticks(x, [str(n) for n in x])
        axes.minorticks_off()
        axes.set(xlabel="labels of a modality", ylabel="right (percent)", ylim=(0, 102))
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
        figure.savefig(path, dpi=DPI)
    return path


def shares(path: Path, found: Rows, modalities: Sequence[str], experts: Sequence[str]) -> Path:
    """Of the image and of the text tokens of a modality, how many each expert takes."""
    figure, style = new_figure((0.75 + 0.85 * len(modalities)) * WIDTH * 0.75, 0.85 * WIDTH)
    with style:
        panels = figure.subplots(1, len(modalities), sharey=True, squeeze=False)[0]
        for axes, modality in zip(panels, modalities, strict=True):
            rows = [found[f"{modality}: expert {expert}"] for expert in experts]
            for offset, column, colour in (
                (-0.2, "of image tokens", BLUE),
                (0.2, "of text tokens", VERMILION),
            ):
                axes.bar(
                    np.arange(len(rows)) + offset,
                    [row[column].mean for row in rows],
                    0.38,
                    yerr=[row[column].std or 0.0 for row in rows],
                    error_kw={"linewidth": 0.8},
                    color=colour,
                    label=column,
                )
            axes.set_title(modality)
            axes.set_xticks(range(len(rows)), experts, rotation=30)
            axes.set_xlabel("expert")
        panels[0].set(ylabel="taken (percent)", ylim=(0, 100))
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
        figure.savefig(path, dpi=DPI)
    return path


def leaders(path: Path, traces: Mapping[str, Trace]) -> Path:
    """The busiest expert of every sample (rows, by modality) at every layer (columns)."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    figure, style = new_figure(2 * WIDTH, 1.2 * WIDTH)
    with style:
        panels = figure.subplots(1, len(traces), sharey=True, squeeze=False)[0]
        n_experts = max(trace.experts for trace in traces.values())
        colours = [COLOURS[e % len(COLOURS)] for e in range(n_experts)]
        for axes, (title, trace) in zip(panels, traces.items(), strict=True):
            order = np.argsort(trace.modality, kind="stable")
            order = order[trace.modality[order] >= 0]
            shade: dict[str, Any] = {"vmin": -0.5, "vmax": n_experts - 0.5}
            axes.imshow(
                routing.leaders(trace)[order],
                aspect="auto",
                interpolation="nearest",
                cmap=ListedColormap(colours),
                **shade,
            )
            counts = np.bincount(trace.modality[order], minlength=len(MODALITIES))
            ends = np.cumsum(counts)
            for end in ends[:-1]:
                axes.axhline(end - 0.5, color="white", linewidth=2)
            axes.set_yticks(ends - counts / 2 - 0.5, MODALITIES)
            axes.set_xticks(range(len(trace.layers)), [str(n) for n in trace.layers])
            axes.set(title=title, xlabel="MoE layer")
        handles = [Patch(color=c, label=f"expert {e}") for e, c in enumerate(colours)]
        figure.legend(handles=handles, loc="outside lower center", ncols=n_experts)
        figure.savefig(path, dpi=DPI)
    return path
