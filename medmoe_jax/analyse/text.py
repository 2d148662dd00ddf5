"""An analysis as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from medmoe_jax.analyse import routing
from medmoe_jax.analyse.explain import Explanation
from medmoe_jax.analyse.inputs import KINDS
from medmoe_jax.analyse.routing import Trace
from medmoe_jax.config import MODALITIES
from medmoe_jax.data.sources import UNKNOWN
from medmoe_jax.evaluation.text import table

MOST_PATCHES = 8  # listed


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    return table(head, [[str(cell) for cell in row] for row in rows])


def loads(report: Mapping[str, Any], found: Trace) -> str:
    """Expert loads, entropy, posterior and accuracy of a trace; `report` is `routing.report`."""
    experts = report["experts"]
    rows = []
    for group, name in enumerate(routing.GROUPS):
        here = found.modality == (group if group < len(MODALITIES) else UNKNOWN)
        for place, kind in enumerate(KINDS):
            tokens = int(found.tokens[here][:, place].sum())
            if tokens:
                shares = routing.share(found.chosen[here][:, :, place].sum((0, 1)))
                bits = found.entropy[here][:, :, place].sum() / tokens / len(found.layers)
                cells = [f"{100 * share:.1f} %" for share in shares]
                rows.append([f"{name}, {kind}", tokens, *cells, f"{bits:.3f}"])
    samples = ", ".join(f"{name} {n}" for name, n in report["samples"].items())
    most = np.log2(len(experts))
    parts = [
        "# Experts",
        f"Samples: {samples}. MoE layers: {', '.join(map(str, report['layers']))}.",
        "Share of the tokens' choices that each expert takes, over all layers, and mean entropy of"
        f" the router's distribution for a token (at most {most:.2f} bits). Question tokens include"
        " the template's words.",
        _table(["tokens", "number", *experts, "entropy (bits)"], rows),
        "By layer, tokens of all kinds:",
        _table(
            ["layer", *experts, "entropy (bits)"],
            [
                [
                    f"{row['layer']}, {row['modality']}",
                    *(f"{100 * s:.1f} %" for s in row["share"]),
                    f"{row['entropy_bits']:.3f}",
                ]
                for row in report["loads"]
                if row["kind"] == "all" and row["tokens"]
            ],
        ),
        "How much the expert of a token tells of the modality (mutual information, bits; 0: experts"
        " are used alike for all modalities):",
        _table(
            ["layer", "image tokens", "text tokens", "all tokens"],
            [
                [row["layer"], *(f"{row[kind]:.3f}" for kind in ("image", "text", "all"))]
                for row in report["information_bits"]
            ],
        ),
        "## Router",
        _router(report),
    ]
    return "\n\n".join(parts) + "\n"


def _router(report: Mapping[str, Any]) -> str:
    found = report["router"]
    names = report["experts"]
    parts = [
        "Mean posterior of the samples (rows: what they are; over layers and image tokens):",
        _table(
            ["modality", *names, "entropy (bits)"],
            [
                [g, *(f"{p:.3f}" for p in row), f"{found['posterior_entropy_bits'][g]:.3f}"]
                for g, row in found["posterior"].items()
            ],
        ),
    ]
    if not found["labelled"]:
        return "\n\n".join([*parts, "No row has a modality label, so there is no accuracy."])
    parts.append(
        f"Accuracy {found['accuracy']:.1%} of {found['labelled']} labelled samples (rows: truth, "
        "columns: router):"
    )
    rows = zip(found["classes"], found["confusion"], strict=True)
    parts.append(_table(["", *found["classes"]], [[name, *counts] for name, counts in rows]))
    return "\n\n".join(parts)


def explanation(found: Explanation) -> str:
    """One question taken apart."""
    given = "" if found.own else " (given)"
    parts = [
        "# Explanation",
        f"Question: {found.question}",
        f"Answer{given}: {found.answer} (probability {found.probability:.3g})",
    ]
    if found.modality is not None:
        shares = ", ".join(f"{name} {p:.1%}" for name, p in found.modality.items())
        parts.append(f"Router's posterior: {shares}")
    parts += [f"Warning: {warning}" for warning in found.warnings]
    parts += ["## Experts", _experts(found)]
    if found.curve is None:
        parts.append("There is no image, so no patches.")
    else:
        parts += ["## Patches", _patches(found)]
    return "\n\n".join(parts) + "\n"


def _experts(found: Explanation) -> str:
    if found.experts is None:
        return "A dense model (stage 1 or 2) has no experts that a router chooses."
    n_experts = found.experts.probability.shape[-1]
    names = routing.names(n_experts)
    rows = []
    for kind, name in enumerate(KINDS):
        here = found.kinds == kind
        if here.any():
            chosen = found.experts.choice[:, here].reshape(-1)
            shares = np.bincount(chosen, minlength=n_experts) / chosen.size
            rows.append([name, int(here.sum()), *(f"{100 * s:.1f} %" for s in shares)])
    words = []
    for number in np.flatnonzero(found.kinds == KINDS.index("answer")):
        text = found.tokens[number].replace("\n", "\\n")
        picks = found.experts.choice[:, number]
        words.append([f"`{text}`", *("+".join(names[e] for e in layer) for layer in picks)])
    layers = [f"layer {n}" for n in found.experts.layers]
    return "\n\n".join(
        [
            "Share of the choices, over all layers:",
            _table(["tokens", "number", *names], rows),
            "Tokens of the answer (those of the question and the patches: `analysis.json`):",
            _table(["token", *layers], words),
        ]
    )


def _patches(found: Explanation) -> str:
    assert found.curve is not None
    curve, side = found.curve, found.attribution.shape[-1]
    flat, places = found.attribution.reshape(-1), np.flatnonzero(found.shown)
    order = places[np.argsort(-flat[places], kind="stable")][:MOST_PATCHES]
    rows = []
    for at in order:
        image, place = divmod(int(at), side * side)
        row, column = divmod(place, side)
        corners = np.array([[column, row], [column + 1, row + 1]]) * found.places[image].crop / side
        (left, top), (right, bottom) = found.places[image].to_picture(corners).round().astype(int)
        width, height = found.pictures[image].size
        box = f"{max(left, 0)}..{min(right, width)}, {max(top, 0)}..{min(bottom, height)}"
        rows.append([image, box, f"{flat[at]:+.3f}"])
    report = curve.report()
    low, high = report["random_interval95"]
    hidden = [
        [
            f"{100 * curve.fractions[i]:.0f} %",
            int(curve.hidden[i]),
            f"{curve.top[i]:.3g}",
            f"{report['random_mean'][i]:.3g}",
            f"{low[i]:.3g} to {high[i]:.3g}",
        ]
        for i in range(len(curve.hidden))
    ]
    least, most = report["random_area_interval95"]
    return "\n\n".join(
        [
            f"What patches add to log p(answer), by {found.method.replace('_', ' ')}; those that "
            "add most (pixels of the picture):",
            _table(["image", "x, y", "added"], rows),
            "Probability of the answer when patches are hidden in the colour of the padding, in the"
            f" order of the overlay and in {report['random_orders']} random orders:",
            _table(
                ["hidden", "patches", "overlay's order", "random, mean", "95 % of them"], hidden
            ),
            f"Area below the curve {report['area']:.3g}; random orders {report['random_area']:.3g} "
            f"({least:.3g} to {most:.3g}): the overlay's order costs more than "
            f"{report['random_orders_beaten']:.0%} of them, gap {report['gap']:+.3g}. A faithful "
            "overlay has a gap above zero.",
        ]
    )


def faithfulness(report: Mapping[str, Any], method: str) -> str:
    """The deletion figures of many questions (`deletion.aggregate`)."""
    names = {
        "area": "area, overlay's order",
        "random_area": "area, random orders",
        "gap": "gap (random less overlay)",
        "random_orders_beaten": "share of random orders beaten",
    }
    rows = []
    for key, name in names.items():
        interval = report[key]["ci95"]
        shown = "-" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"
        rows.append([name, f"{report[key]['mean']:.3f}", shown])
    curves = zip(report["fractions"], report["probability"], report["random_mean"], strict=True)
    return (
        "\n\n".join(
            [
                "# Faithfulness of the overlays",
                f"{report['questions']} questions on {report['images']} images, the model's own "
                f"answers, patches ordered by {method.replace('_', ' ')}. Intervals: bootstrap "
                "over images.",
                _table(["", "mean", "95 % interval"], rows),
                _table(
                    ["patches hidden", "probability, overlay's order", "probability, random"],
                    [[f"{100 * f:.0f} %", f"{own:.3f}", f"{rand:.3f}"] for f, own, rand in curves],
                ),
            ]
        )
        + "\n"
    )
