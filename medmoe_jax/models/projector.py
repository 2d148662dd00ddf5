"""Projector: patch features of the vision tower -> embeddings of the language model.

Source: official `build_image_projector`: `linear`, or N linear layers with exact GELU between them
(`mlpNx_gelu`).
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn

from medmoe_jax.config import ModelConfig
from medmoe_jax.models import layers
from medmoe_jax.models.layers import Array, Params


def leaves(cfg: ModelConfig) -> dict[str, Any]:
    """Parameters `fc0 .. fcN-1`: the first maps the vision width to the model width."""
    d = cfg.llm.width
    widths = [cfg.vision.width] + [d] * (cfg.projector_layers - 1)
    return {f"fc{i}": layers.linear_leaves(w, d, bias=True) for i, w in enumerate(widths)}


def project(p: Params, x: Array) -> Array:
    """[..., C] -> [..., D] in the dtype of x."""
    x = layers.linear(p["fc0"], x)
    for i in range(1, len(p)):
        x = layers.linear(p[f"fc{i}"], layers.gelu(x))
    return x


class Projector(nn.Module):
    """Holds the projector's parameters; `project` is the mathematics."""

    cfg: ModelConfig

    @nn.compact
    def tree(self) -> Params:
        """The parameters as a nested dict."""
        return {k: self.param(k, layers.initialise, sub) for k, sub in leaves(self.cfg).items()}

    def __call__(self, x: Array) -> Array:
        """[..., C] -> [..., D]."""
        return project(self.tree(), x)
