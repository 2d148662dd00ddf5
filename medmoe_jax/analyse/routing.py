"""Which experts tokens go to, and what the router makes of an image.

    found = trace(params, config, batches)        # one forward pass a batch
    share(found.chosen, found.modality)           # by layer, modality and kind of token

The trace holds sums for every sample; everything else are sums over samples.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from medmoe_jax import losses
from medmoe_jax.analyse import inputs
from medmoe_jax.analyse.inputs import KINDS
from medmoe_jax.config import MODALITIES, ConfigError, ModelConfig, MoeConfig
from medmoe_jax.models import medmoe, moe
from medmoe_jax.models.layers import Array, Params

GROUPS = (*MODALITIES, "unlabelled")  # of samples; index -1 is the last one
ON_DEVICE = ("tokens", "image_pos", "mask", "images")


@dataclass(frozen=True)
class Trace:
    """What the router did with n samples. K kinds of tokens (`inputs.KINDS`), Lm MoE layers.

    Attributes:
      chosen: i64[n, Lm, K, E], tokens that an expert was chosen for, first or second.
      first: i64[n, Lm, K, E], tokens whose first choice it is.
      entropy: f64[n, Lm, K], sum over tokens of the entropy of the router's distribution, bits.
      tokens: i64[n, K].
      scores: f64[n, E], the router's scores, mean over layers and telling tokens.
      posterior: f64[n, E], see `losses.posterior`, of the telling tokens: those of the image, or
        all where there is none (words say little of the modality).
      modality: i64[n], index in MODALITIES, -1 without a label.
      layers: numbers of the Lm layers in the decoder.
    """

    chosen: np.ndarray
    first: np.ndarray
    entropy: np.ndarray
    tokens: np.ndarray
    scores: np.ndarray
    posterior: np.ndarray
    modality: np.ndarray
    layers: tuple[int, ...]

    @property
    def experts(self) -> int:
        """E."""
        return self.chosen.shape[-1]


def summarise(logits: Array, kinds: Array, top_k: int) -> dict[str, Array]:
    """Sums over the tokens of each sample.

    Args:
      logits: f32[Lm, B, T, E], the router's scores.
      kinds: i32[B, T], index in KINDS or PADDING.
      top_k: experts a token.

    Returns:
      chosen, first i32[B, Lm, K, E], entropy f32[B, Lm, K], tokens i32[B, K], scores and posterior
      f32[B, E]: see `Trace`.
    """
    n_experts = logits.shape[-1]
    valid, image = kinds < inputs.PADDING, kinds == KINDS.index("image")
    choice = jax.vmap(lambda one: moe.route(one, top_k, valid).choice)(logits)
    hot = jax.nn.one_hot(choice, n_experts, dtype=jnp.int32)  # [Lm, B, T, top_k, E]
    kind = jax.nn.one_hot(kinds, len(KINDS), dtype=jnp.int32)  # padding: zeros
    log_probs = jax.nn.log_softmax(logits, -1)
    bits = -(jnp.exp(log_probs) * log_probs).sum(-1) / jnp.log(2.0)
    telling = jnp.where(image.any(-1, keepdims=True), image, valid).astype(jnp.float32)
    weight = telling / jnp.maximum(telling.sum(-1, keepdims=True), 1.0)
    exact = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    return {
        "chosen": exact("lbte,btk->blke", hot.sum(3), kind),
        "first": exact("lbte,btk->blke", hot[:, :, :, 0], kind),
        "entropy": exact("lbt,btk->blk", bits, kind.astype(jnp.float32)),
        "tokens": kind.sum(1),
        "scores": exact("lbte,bt->be", logits, weight) / len(logits),
        "posterior": losses.posterior(logits, telling > 0),
    }


@partial(jax.jit, static_argnames=("cfg", "mixture", "dtype"))
def _pass(
    p: Params,
    cfg: ModelConfig,
    mixture: MoeConfig,
    batch: dict[str, Array],
    kinds: Array,
    dtype: Any,
) -> dict[str, Array]:
    probe = None if cfg.moe else p["router"]
    _, reports = medmoe.forward(p, cfg, batch, dtype=dtype, probe=probe)
    if cfg.moe:
        logits = reports["router_logits"]
    else:
        logits = reports["probe"][jnp.asarray(mixture.layers(cfg.llm.layers))]
    return summarise(logits, kinds, mixture.top_k)


def trace(
    params: Params,
    cfg: ModelConfig,
    batches: Iterable[dict[str, np.ndarray]],
    dtype: Any = jnp.float32,
    mixture: MoeConfig | None = None,
) -> Trace:
    """Runs batches through a model and keeps what its router does.

    Args:
      params: stacked, or from `generate.for_generation`; of a dense model with a top-level
        `router`, as the router phase leaves it.
      cfg: its shapes.
      batches: of `inputs.batches`, or of training. Rows that are all padding are left out.
      dtype: of the computation.
      mixture: for a dense model, at which layers the router is read.

    Raises:
      ConfigError: a dense model without a router, one that does not ask its router
        (moe.routing), or no samples.
    """
    mixture = cfg.moe or mixture
    if mixture is None or (cfg.moe is None and "router" not in params):
        raise ConfigError(
            "a dense model (stage 1 or 2) has no experts and no router, so there are no loads; take"
            " a stage-3 model"
        )
    if mixture.routing != "router":
        raise ConfigError(
            f"moe.routing is {mixture.routing!r}: it does not ask the router, so there are no loads"
        )
    parts: list[dict[str, np.ndarray]] = []
    for batch in batches:
        arrays = {name: batch[name] for name in ON_DEVICE if name in batch}
        kinds = inputs.kinds(batch)
        found = jax.device_get(_pass(params, cfg, mixture, arrays, kinds, dtype))
        real = batch["mask"].any(-1)
        parts.append({k: v[real] for k, v in found.items()} | {"modality": batch["modality"][real]})
    if not any(len(part["modality"]) for part in parts):
        raise ConfigError("there are no samples to look at")
    whole = {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
    exact = {k: v.astype(np.int64 if v.dtype.kind == "i" else np.float64) for k, v in whole.items()}
    return Trace(**exact, layers=mixture.layers(cfg.llm.layers))


def by_group(values: np.ndarray, modality: np.ndarray) -> np.ndarray:
    """Sums over the samples of each of GROUPS: [n, ...] -> [G, ...]."""
    rows = [values[modality == m].sum(0) for m in (*range(len(MODALITIES)), -1)]
    return np.stack(rows)


def share(counts: np.ndarray) -> np.ndarray:
    """Counts [..., E] as shares of their sum, f64[..., E]; NaN where the sum is zero."""
    total = counts.sum(-1, keepdims=True)
    return np.divide(counts, total, out=np.full(counts.shape, np.nan), where=total > 0)


def information(counts: np.ndarray) -> float:
    """Mutual information of modality and expert, bits: how much the expert of one token tells of
    the modality of its image. 0: experts are used alike for all; log2 of the number of modalities,
    where they come equally often: each modality has experts of its own.

    Args:
      counts: [modalities, E], tokens.
    """
    joint = counts / max(counts.sum(), 1)
    apart = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    return float((joint[seen] * np.log2(joint[seen] / apart[seen])).sum())


def leaders(found: Trace) -> np.ndarray:
    """The expert with the most tokens of each sample at each layer (paper Figure 5): i64[n, Lm];
    ties go to the lower number."""
    return found.first.sum(2).argmax(-1)


def confusion(found: Trace) -> np.ndarray:
    """i64[E, E], rows: the expert that the true modality belongs to, columns: the router's. Samples
    without a label are left out."""
    table = np.zeros((found.experts, found.experts), np.int64)
    known = found.modality >= 0
    owner = losses.expert_of(found.modality[known], found.experts)
    np.add.at(table, (owner, found.posterior[known].argmax(-1)), 1)
    return table


def names(n_experts: int) -> tuple[str, ...]:
    """Of experts: the modality, or modalities, that each belongs to (`losses.expert_of`), or its
    number from 0."""
    return tuple(", ".join(MODALITIES[e::n_experts]) or f"expert {e}" for e in range(n_experts))


def report(found: Trace) -> dict[str, Any]:
    """All figures of a trace, for JSON; shares and means are None where there is no token.

    Returns:
      samples, by modality; layers; experts; `loads`: a row a layer, modality and kind of token
      ('all' and 'text' are sums) with tokens, share [E], first_choice [E] and entropy_bits;
      `leaders`: for each layer and modality the share of samples whose busiest expert is e;
      `information_bits` for each layer and kind; `router`: accuracy, confusion, posterior_entropy.
    """
    groups = {name: found.modality == m for m, name in enumerate(MODALITIES)}
    groups |= {GROUPS[-1]: found.modality < 0, "all": np.ones(len(found.modality), bool)}
    groups = {name: rows for name, rows in groups.items() if rows.any()}
    kinds = {kind: [place] for place, kind in enumerate(KINDS)}
    kinds |= {"text": [1, 2], "all": [0, 1, 2]}
    loads, busiest, leading = [], [], leaders(found)
    for at, layer in enumerate(found.layers):
        for group, rows in groups.items():
            for kind, places in kinds.items():
                tokens = int(found.tokens[rows][:, places].sum())
                chosen, first = (
                    share(counts[rows, at][:, places].sum((0, 1)))
                    for counts in (found.chosen, found.first)
                )
                bits = float(found.entropy[rows, at][:, places].sum())
                loads.append(
                    {
                        "layer": layer,
                        "modality": group,
                        "kind": kind,
                        "tokens": tokens,
                        "share": _finite(chosen),
                        "first_choice": _finite(first),
                        "entropy_bits": bits / tokens if tokens else None,
                    }
                )
            counted = np.bincount(leading[rows, at], minlength=found.experts)
            busiest.append({"layer": layer, "modality": group, "share": share(counted).tolist()})
    labelled = by_group(found.first, found.modality)[:-1]  # [4, Lm, K, E]
    return {
        "samples": {name: int(rows.sum()) for name, rows in groups.items()},
        "layers": list(found.layers),
        "experts": list(names(found.experts)),
        "loads": loads,
        "leaders": busiest,
        "information_bits": [
            {"layer": layer}
            | {kind: information(labelled[:, at, on].sum(1)) for kind, on in kinds.items()}
            for at, layer in enumerate(found.layers)
        ],
        "router": _router(found, groups),
    }


def _router(found: Trace, groups: dict[str, np.ndarray]) -> dict[str, Any]:
    """How well the router tells the modalities apart, and how sure it is."""
    table = confusion(found)
    n = int(table.sum())
    logs = np.log2(np.maximum(found.posterior, np.finfo(float).tiny))
    bits = -(found.posterior * logs).sum(-1)
    return {
        "labelled": n,
        "accuracy": float(np.trace(table) / n) if n else None,
        "classes": list(names(found.experts)),
        "confusion": table.tolist(),
        "posterior": {k: found.posterior[rows].mean(0).tolist() for k, rows in groups.items()},
        "posterior_entropy_bits": {k: float(bits[rows].mean()) for k, rows in groups.items()},
    }


def _finite(values: np.ndarray) -> list[float] | None:
    return values.tolist() if np.isfinite(values).all() else None
