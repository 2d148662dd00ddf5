"""Model FLOPs: the products that a training step cannot do without, from shapes alone.

Forward, and backward through what trains only: a product y = x W counts once in the forward pass,
once more where its input needs a gradient, and once more where W trains. Causal attention counts
the pairs of a query and a key at or before it. Left out: what rematerialisation computes again,
experts that nobody chose, padding, and everything that is no matrix product.

Source: Chowdhery et al. 2022, appendix B (model FLOPs utilisation), with the counting of pairs
instead of the whole square.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from medmoe_jax.config import ModelConfig, MoeConfig, RunConfig
from medmoe_jax.optim import TRAIN


class Costs(NamedTuple):
    """FLOPs of a step (or of a forward pass) by what it is made of."""

    token: float  # for each token of text or image, without padding
    pair: float  # for each (query, key) pair of the language model's attention
    image: float  # for each image: vision tower and projector

    def total(self, lengths: Sequence[int], images: float) -> float:
        """FLOPs for samples of so many tokens each, with so many images in all."""
        pairs = sum(n * (n + 1) / 2 for n in lengths)
        return self.token * sum(lengths) + self.pair * pairs + self.image * images


def chosen(moe: MoeConfig | None, tokens: int) -> float:
    """Share of the experts that at least one of so many tokens chooses, all being equally likely;
    1 without experts."""
    return 1.0 if moe is None else 1.0 - (1.0 - moe.active / moe.experts) ** tokens


class _Label:
    """What trains."""

    def __init__(self, label: dict[str, str], rank: int) -> None:
        self._rank = rank  # of adapters
        self._paths = [path for path, kind in label.items() if kind == TRAIN]

    def __call__(self, *prefixes: str) -> bool:
        """Whether a parameter below one of the prefixes trains."""
        return any(path.startswith(prefixes) for path in self._paths)

    def product(self, path: str, d_in: int, d_out: int, flows: bool) -> float:
        """One linear layer on one token; `flows`: its input needs a gradient."""
        whole = 2.0 * d_in * d_out * (1 + flows + self(f"{path}/kernel"))
        if not self(f"{path}/lora_a"):
            return whole
        # Both factors forward and for their own gradients, and what flows back through them.
        return whole + 2.0 * self._rank * (2 * (d_in + d_out) + d_out + flows * d_in)

    def chain(self, folder: str, widths: Sequence[int], flows: bool, first: int = 1) -> float:
        """Linear layers fc1, fc2, ... on one token."""
        total = 0.0
        for i, (a, b) in enumerate(itertools.pairwise(widths), start=first):
            total += self.product(f"{folder}/fc{i}", a, b, flows)
            flows = flows or self(f"{folder}/fc{i}/")
        return total


def _ffn(model: ModelConfig, trains: _Label, folder: str, flows: bool) -> float:
    d, f = model.llm.width, model.llm.ffn
    if model.llm.family == "phi":
        return trains.chain(folder, (d, f, d), flows)
    inner = sum(trains.product(f"{folder}/{name}", d, f, flows) for name in ("gate", "up"))
    below = flows or trains(f"{folder}/gate/", f"{folder}/up/")
    return inner + trains.product(f"{folder}/down", f, d, below)


def _moe(model: ModelConfig, trains: _Label, flows: bool) -> float:
    assert model.moe is not None
    d, folder = model.llm.width, "llm/moe"
    widths = (*[d] * model.moe.router_layers, model.moe.experts)
    total = trains.chain(f"{folder}/router", widths, flows)
    total += model.moe.active * _ffn(model, trains, f"{folder}/experts", flows)
    if model.moe.meta:
        total += _ffn(model, trains, f"{folder}/meta", flows)
    if model.moe.use_residual:
        total += trains.product(f"{folder}/coefficient", d, 2, flows)
    return total


def _image(model: ModelConfig, trains: _Label) -> float:
    """Vision tower and projector, for one image."""
    vision, tuned = model.vision, trains("vision/")
    c, n = vision.width, vision.patches + 1
    layer = n * (8.0 * c * c + 4.0 * c * vision.ffn) + 4.0 * c * n * n
    tower = vision.layers_run * layer + 6.0 * vision.patches * vision.patch_size**2 * c
    widths = (c, *[model.llm.width] * model.projector_layers)
    projected = trains.chain("projector", widths, tuned, first=0)
    return tower * (3 if tuned else 1) + vision.patches * projected


def costs(cfg: RunConfig, model: ModelConfig, label: dict[str, str]) -> Costs:
    """Costs of one optimiser step.

    Args:
      cfg: objective; in the router phase, which layers are read (config.model.moe).
      model: the model that is run.
      label: path -> TRAIN or FROZEN, see `layout.labels`; empty: a forward pass.
    """
    trains, llm = _Label(label, cfg.lora.rank), model.llm
    d, kv = llm.width, llm.kv_heads * llm.head_dim
    probes = cfg.model.moe if cfg.objective == "router" else None
    probed = probes.layers(llm.layers) if probes else ()
    last = probed[-1] if probed else llm.layers
    flows = trains("projector/", "vision/", "llm/embed/")
    token = pair = 0.0
    for i in range(min(last + 1, llm.layers)):
        attends = i < last or llm.family == "stablelm"  # the probe of Phi reads the first norm
        within = flows or trains("llm/layers/ln1/")
        if attends:
            token += trains.product("llm/layers/attn/q", d, d, within)
            token += trains.product("llm/layers/attn/k", d, kv, within)
            token += trains.product("llm/layers/attn/v", d, kv, within)
            below = within or trains(*(f"llm/layers/attn/{name}/" for name in "qkv"))
            pair += 4.0 * d * (3 if below else 1)
            token += trains.product("llm/layers/attn/out", d, d, below)
        if llm.family == "stablelm":
            within = flows or trains("llm/layers/")
        if i < last:
            routed = i in model.moe_layers
            kind = "llm/moe" if routed else "llm/mlp"
            token += _moe(model, trains, within) if routed else _ffn(model, trains, kind, within)
            flows = flows or trains("llm/layers/", f"{kind}/")
        if i in probed:
            assert probes is not None
            widths = (*[d] * probes.router_layers, probes.experts)
            token += trains.chain("router", widths, False)  # hidden states get no gradient
    if not probed:
        token += trains.product("llm/lm_head", d, llm.vocab, flows or trains("llm/final_ln/"))
    return Costs(token, pair, _image(model, trains))
