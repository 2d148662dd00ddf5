"""Which parameters train, and how. Next stop: `sharding.py`.

A phase names what trains by regexes. They become one label a parameter, and the labels drive
`optax.multi_transform`: AdamW for `train`, nothing for `frozen`. A frozen parameter owns no
optimiser state, its gradient is never computed, and it is never written.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from medmoe_jax.config import ConfigError, OptimConfig

TRAIN, FROZEN = "train", "frozen"
Flat = dict[str, Any]  # path -> array


def labels(paths: list[str], patterns: tuple[str, ...]) -> dict[str, str]:
    """Labels every path: TRAIN if one of the regexes matches the whole of it, else FROZEN.

    Raises:
      ConfigError: a regex matches nothing (a typo would freeze silently) or is none, or nothing
        trains.
    """
    for pattern in patterns:
        try:
            found = any(re.fullmatch(pattern, path) for path in paths)
        except re.error as error:
            raise ConfigError(f"train: {pattern!r} is no regular expression: {error}") from error
        if not found:
            raise ConfigError(f"train: the regex {pattern!r} matches no parameter of this model")
    if not patterns:
        raise ConfigError("train: no regex given, nothing would train")
    return {
        path: TRAIN if any(re.fullmatch(p, path) for p in patterns) else FROZEN for path in paths
    }


def split(flat: Flat, label: dict[str, str]) -> tuple[Flat, Flat]:
    """(trainable, frozen) parts of a path -> array dict."""
    train = {k: v for k, v in flat.items() if label[k] == TRAIN}
    return train, {k: v for k, v in flat.items() if label[k] == FROZEN}


def schedule(cfg: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up from 0 over ceil(warmup * steps), then cosine to 0 or
    constant.

    Source: transformers `get_cosine_schedule_with_warmup`, which the official scripts select.

    Raises:
      ConfigError: unknown schedule.
    """
    rise = -int(-cfg.warmup * steps // 1)
    if cfg.schedule == "cosine":
        after = optax.cosine_decay_schedule(cfg.lr, max(steps - rise, 1))
    elif cfg.schedule == "constant":
        after = optax.constant_schedule(cfg.lr)
    else:
        raise ConfigError(f"optim.schedule {cfg.schedule!r} is unknown; use 'cosine' or 'constant'")
    return optax.join_schedules([optax.linear_schedule(0.0, cfg.lr, max(rise, 1)), after], [rise])


def make(cfg: OptimConfig, steps: int, label: dict[str, str]) -> optax.GradientTransformation:
    """AdamW on trainable leaves; biases and norms do not decay, as in the official code.

    Clipping is inside the train branch: the norm is over trainable leaves only.
    """
    adamw = optax.adamw(
        schedule(cfg, steps),
        b1=cfg.b1,
        b2=cfg.b2,
        eps=cfg.eps,
        weight_decay=cfg.weight_decay,
        mask=_decays if cfg.weight_decay else None,
    )
    clip = [optax.clip_by_global_norm(cfg.clip_norm)] if cfg.clip_norm else []
    branches: dict[Hashable, optax.GradientTransformation] = {
        TRAIN: optax.chain(*clip, adamw),
        FROZEN: optax.set_to_zero(),
    }
    return optax.multi_transform(branches, label)


def _decays(tree: Flat) -> dict[str, bool]:
    """Which parameters decay. Source: `get_decay_parameter_names` of transformers' Trainer."""
    return {path: not path.endswith(("/bias", "/scale")) for path in tree}


def update(
    tx: optax.GradientTransformation, grads: Flat, state: Any, train: Flat, frozen: Flat
) -> tuple[Flat, Any]:
    """One optimiser step. Gradients are of the trainable leaves only; the frozen ones are not
    written at all.

    Args:
      tx: from `make`.
      grads: gradients of `train`.
      state: optimiser state.
      train: parameters that train, see `split`.
      frozen: the others.

    Returns:
      New trainable parameters and optimiser state.
    """
    # multi_transform wants a whole tree; nothing reads these zeros, so the compiled step does not
    # hold them.
    whole = grads | jax.tree.map(jnp.zeros_like, frozen)
    updates: Any
    updates, state = tx.update(whole, state, train | frozen)
    return {k: optax.apply_updates(v, updates[k]) for k, v in train.items()}, state


def norm(tree: Any) -> jax.Array:
    """f32[]: the Euclidean norm of all numbers of a tree, added up in float32."""

    def squares(a: jax.Array) -> jax.Array:
        return jnp.square(a.astype(jnp.float32)).sum()

    def by_slice(a: jax.Array) -> jax.Array:
        # XLA's CPU backend writes all squares to memory before it adds them up.
        return jax.lax.map(squares, a).sum() if a.ndim > 1 else squares(a)

    each = (
        jax.lax.platform_dependent(a, cpu=by_slice, default=squares) for a in jax.tree.leaves(tree)
    )
    return jnp.sqrt(jnp.stack(list(each)).sum())


def group_table(flat: Flat, label: dict[str, str]) -> str:
    """Table of parameter groups, of arrays or their shapes: name, tensors, numbers, dtype,
    sharding, train or frozen. Of quantized matrices it tells what the small numbers lie in: int8,
    of which one holds two of 4 bits."""
    rows: dict[tuple[str, ...], list[int]] = {}
    for path, kept in flat.items():
        value = jax.tree.leaves(kept)[0]
        depth = 3 if path.startswith("llm/moe/") else 2 if path.startswith("llm/") else 1
        sharding = getattr(value, "sharding", None)
        where = str(tuple(sharding.spec)) if isinstance(sharding, NamedSharding) else "-"
        key = ("/".join(path.split("/")[:depth]), str(value.dtype), where, label[path])
        count = rows.setdefault(key, [0, 0])
        count[0] += 1
        count[1] += value.size
    head = ("parameters", "dtype", "sharding", "label", "tensors", "numbers")
    body = [(*key, str(n), f"{size:,}") for key, (n, size) in rows.items()]
    widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.rjust(w) if i >= 4 else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [head, *body]
    )
