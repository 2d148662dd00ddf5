"""The paper's figures as experiments."""

from __future__ import annotations

from typing import Any

from medmoe_jax.experiments.config import LLMS
from medmoe_jax.experiments.figures_experts import Leaders, Shares
from medmoe_jax.experiments.figures_router import Depths, Labels
from medmoe_jax.experiments.result import Experiment


def _experiment(figure: Any) -> Experiment:
    return Experiment(figure.title, figure.cells, figure.result)


FIGURES: dict[str, Experiment] = {
    name: _experiment(figure)
    for name, figure in {
        "figure3": Depths("stablelm", f"Figure 3: depth of the router, {LLMS['stablelm']}"),
        "figure4": Shares("Figure 4: image and text tokens of the experts, MRI", ("MRI",)),
        "figure5": Leaders("Figure 5: busiest expert by layer and modality"),
        "figure6": Labels("Figure 6: router accuracy against the number of labels"),
        "figure10": Depths("phi", f"Figure 10: depth of the router, {LLMS['phi']}"),
        "figure11": Shares(
            "Figure 11: image and text tokens of the experts, other modalities",
            ("CT", "X-ray", "Pathology"),
        ),
    }.items()
}
