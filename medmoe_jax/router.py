"""The router: a fresh one, the one that a run brought, and how well it knows the modalities."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from medmoe_jax import losses, sharding
from medmoe_jax.config import MODALITIES, ModelConfig, MoeConfig, RunConfig
from medmoe_jax.models import layers, medmoe, moe


def fresh(cfg: ModelConfig, mixture: MoeConfig, seed: int) -> dict[str, Any]:
    """Random router parameters (f32) for `mixture` on a model of width cfg.llm.width."""
    leaves = moe.router_leaves(cfg.llm.width, mixture.experts, mixture.router_layers)
    return layers.initialise(jax.random.key(seed), leaves)


def own(cfg: RunConfig, flat: dict[str, Any]) -> dict[str, Any]:
    """The router of a stage 3 that did not take it from `init`, by path; else nothing.

    Args:
      cfg: of the run.
      flat: all parameters, path -> array.
    """
    inner = "llm/moe/"
    return {
        path.removeprefix(inner): value[0]  # all layers begin with the same one
        for path, value in flat.items()
        if cfg.router and path.startswith(f"{inner}router/")
    }


def evaluate(
    params: dict[str, Any],
    model: ModelConfig,
    mixture: MoeConfig,
    batches: Iterable[dict[str, np.ndarray]],
    dtype: Any,
    mesh: Mesh,
) -> dict[str, Any]:
    """Accuracy of the router on labelled batches. Of several processes all must call this; all get
    the whole report.

    Args:
      params: dense parameters with a top-level `router`, on the devices of `mesh`.
      model: the dense model.
      mixture: which layers it is read at.
      batches: with modality i32[B], this process' rows of each; rows with -1 are left out.
      dtype: of the computation.
      mesh: the devices.

    Returns:
      n, accuracy (of samples: argmax of the posterior over all layers and image tokens, or over
      all tokens where there is no image), token_accuracy (every token of every layer by itself),
      confusion (rows true, columns predicted) with its class names.
    """
    placed = jnp.asarray(mixture.layers(model.llm.layers))

    @partial(jax.jit, out_shardings=NamedSharding(mesh, P()))
    def predict(p: Any, batch: Any) -> dict[str, Any]:
        """What is counted of each row, everywhere."""
        _, reports = medmoe.forward(p, model, batch, dtype=dtype, probe=p["router"])
        logits, mask = reports["probe"][placed], batch["mask"]
        owner = losses.expert_of(batch["modality"], mixture.experts)
        right = (logits.argmax(-1) == owner[None, :, None]) & mask[None]
        image = batch["image_pos"] >= 0
        # Words say little about the modality, and those in front of the image nothing.
        telling = jnp.where(image.any(-1, keepdims=True), image, mask)
        return {
            "modality": batch["modality"],
            "owner": owner,
            "said": losses.posterior(logits, telling).argmax(-1),
            "right": right.sum((0, 2)),
            "tokens": mask.sum(-1) * len(placed),
        }

    n = mixture.experts
    confusion = np.zeros((n, n), int)
    right = tokens = 0
    for batch in batches:
        read = {k: batch[k] for k in ("tokens", "image_pos", "mask", "images", "modality")}
        with jax.set_mesh(mesh):
            found = jax.device_get(predict(params, sharding.place_batch(read, mesh)))
        known = (found["modality"] >= 0) & (found["tokens"] > 0)
        np.add.at(confusion, (found["owner"][known], found["said"][known]), 1)
        right += int(found["right"][known].sum())
        tokens += int(found["tokens"][known].sum())
    total = int(confusion.sum())
    # Fewer experts than modalities: some share one (`losses.expert_of`).
    names = [", ".join(MODALITIES[i::n]) or f"expert {i}" for i in range(n)]
    return {
        "n": total,
        "accuracy": float(np.trace(confusion) / max(total, 1)),
        "token_accuracy": right / max(tokens, 1),
        "classes": names,
        "confusion": confusion.tolist(),
    }


def report_table(report: dict[str, Any]) -> str:
    """The report as text: accuracy and the confusion matrix (rows: truth, columns: router)."""
    names = report["classes"]
    width = max(len(n) for n in names) + 2
    lines = [
        f"router accuracy {report['accuracy']:.1%} of {report['n']} samples, "
        f"{report['token_accuracy']:.1%} of single tokens",
        " " * width + "".join(n.rjust(width) for n in names),
    ]
    for name, row in zip(names, report["confusion"], strict=True):
        lines.append(name.ljust(width) + "".join(str(c).rjust(width) for c in row))
    return "\n".join(lines)
