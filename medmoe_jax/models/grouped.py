"""Each expert on its own tokens, in sorted rows: the form for a CPU, and for a few tokens on any
platform.

The rows of an expert are its group. XLA wants a static number of rows, so a group is computed
together with what follows it, up to the next of a few static sizes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from medmoe_jax.models import layers
from medmoe_jax.models.layers import Array, Params

Experts = Params | tuple[Params, ...]
FEW = 64  # (token, expert) pairs up to which only the bytes of the weights matter
BUCKET = 32  # pairs by which the static sizes of an expert's group differ at least
BUCKETS = 8  # static sizes of a group up to a likely one, beside the empty one
LIKELY = 2  # times as many rows as the mean group: above, the sizes double


def expert(p: Experts, e: int) -> Params:
    """The parameters of expert `e`."""
    return p[e] if isinstance(p, tuple) else jax.tree.map(lambda a: a[e], p)


def group_sizes(pairs: int, n_experts: int) -> list[int]:
    """Static sizes of an expert's group among `pairs` (token, expert) pairs: 0, ..., pairs."""
    if pairs <= FEW:
        return [0, pairs]
    unit = max(BUCKET, -(-pairs * LIKELY // (n_experts * BUCKETS)))
    sizes = [unit * i for i in range(BUCKETS + 1) if unit * i < pairs]
    while 2 * sizes[-1] < pairs and len(sizes) > BUCKETS:
        sizes.append(2 * sizes[-1])
    return [*sizes, pairs]


def by_size(sizes: list[int], count: Array, run: Callable[..., Any], empty: Any, *args: Any) -> Any:
    """run(size, *args) for the first of `sizes` that holds a group of `count` rows; empty(*args)
    for an empty group."""

    def branch(size: int) -> Callable[..., Any]:
        return lambda *args: run(size, *args)

    which = (count > jnp.asarray(sizes[:-1])).sum()
    with jax.named_scope("rows_of_expert"):  # `plan.hlo` finds it by this name
        return jax.lax.switch(which, [empty, *map(branch, sizes[1:])], *args)


def padded(rows: Array, sizes: list[int]) -> Array:
    """rows [R, ...] and zeros behind them, as many as the last group's size may reach too far."""
    more = max(b - a for a, b in itertools.pairwise(sizes))
    return jnp.pad(rows, ((0, more), (0, 0)))


def over_groups(
    rows: Array, counts: Array, width: int, run: Callable[[int, Array], Array]
) -> Array:
    """run(expert, its rows) for all groups.

    Args:
      rows: [R, K], sorted by expert; behind the last group there may be more.
      counts: i32[E], rows of each group.
      width: N.
      run: makes [M, N] of [M, K] row by row; is not called for an empty group.

    Returns:
      [R, N] in the dtype of rows, zero behind the last group.
    """
    sizes = group_sizes(len(rows), len(counts))
    given, starts = padded(rows, sizes), jnp.cumsum(counts) - counts
    y = jnp.zeros((len(given), width), rows.dtype)
    for e in range(len(counts)):

        def group(size: int, y: Array, e: int = e) -> Array:
            mine = jax.lax.dynamic_slice_in_dim(given, starts[e], size)
            # What is wrong behind the group is overwritten by the next one.
            return jax.lax.dynamic_update_slice_in_dim(y, run(e, mine), starts[e], 0)

        y = by_size(sizes, counts[e], group, lambda y: y, y)
    return jnp.where((jnp.arange(len(rows)) < counts.sum())[:, None], y[: len(rows)], 0)


def grouped(p: Experts, x: Array, choice: Array, weight: Array, n_experts: int) -> Array:
    """The expert sum, one expert after the other.

    No token is dropped: the largest size holds all of them. An expert that nobody chose is not
    read. Arguments and result as in `experts.reference`. The derivative keeps what every static
    size would need: `buckets.py` is for training.
    """
    b, t, d = x.shape
    k = choice.shape[-1]
    order = jnp.argsort(choice.reshape(-1), stable=True)
    counts = jnp.bincount(choice.reshape(-1), length=n_experts)
    rows = x.reshape(b * t, d)[order // k]
    each = tuple(expert(p, e) for e in range(n_experts))
    y = over_groups(rows, counts, d, lambda e, mine: layers.mlp(each[e], mine))
    share = weight.reshape(-1)[order].astype(x.dtype)
    return jnp.zeros((b * t, d), x.dtype).at[order // k].add(share[:, None] * y).reshape(x.shape)
