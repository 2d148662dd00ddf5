"""Each expert on its own tokens, in sorted rows: the form for a CPU, and for a few tokens on any
platform.

The rows of an expert are its group. XLA wants a static number of rows, so a group is computed
together with what follows it, up to the next of a few static sizes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from medmoe_jax.models import layers
from medmoe_jax.models.layers import Array, Params

Experts = Params | tuple[Params, ...]
FEW = 64  # (token, expert) pairs up to which only the bytes of the weights matter
BUCKET = 32  # pairs by which the static sizes of an expert's group differ at least
BUCKETS = 8  # static sizes of a group up to a likely one, beside the empty one
LIKELY = 2  # times as many rows as the mean group


def expert(p: Experts, e: int) -> Params:
    """The parameters of expert `e`."""
    return p[e] if isinstance(p, tuple) else jax.tree.map(lambda a: a[e], p)


def unit(pairs: int, n_experts: int) -> int:
    """By how much the static sizes of an expert's group differ, up to a likely one."""
    return max(BUCKET, -(-pairs * LIKELY // (n_experts * BUCKETS)))


def group_sizes(pairs: int, n_experts: int) -> list[int]:
    """Static sizes of an expert's group among `pairs` (token, expert) pairs: 0, ..., pairs. Above a
    likely one they double."""
    if pairs <= FEW:
        return [0, pairs]
    step = unit(pairs, n_experts)
    sizes = [step * i for i in range(BUCKETS + 1) if step * i < pairs]
    while 2 * sizes[-1] < pairs and len(sizes) > BUCKETS:
        sizes.append(2 * sizes[-1])
    return [*sizes, pairs]


def by_size(sizes: list[int], count: Array, run: Callable[[int, Array], Array], y: Array) -> Array:
    """run(size, y) for the first of `sizes` that holds a group of `count` rows; y for an empty
    group."""
    branches = [lambda y: y, *(partial(run, size) for size in sizes[1:])]
    which = (count > jnp.asarray(sizes[:-1])).sum()
    with jax.named_scope("rows_of_expert"):  # `plan.hlo` finds it by this name
        return jax.lax.switch(which, branches, y)


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

        y = by_size(sizes, counts[e], group, y)
    return jnp.where((jnp.arange(len(rows)) < counts.sum())[:, None], y[: len(rows)], 0)


def of_one_token(p: Experts, x: Array, choice: Array, weight: Array, n_experts: int) -> Array:
    """The expert sum of a single token: nothing to sort. Arguments and result as in
    `experts.reference`, with B = T = 1."""
    runs = [partial(layers.mlp, expert(p, e)) for e in range(n_experts)]
    chosen = choice.reshape(-1)
    shares = weight.reshape(-1).astype(x.dtype)
    each = [jax.lax.switch(chosen[i], [*runs, jnp.zeros_like], x) for i in range(len(chosen))]
    return sum((share * y for share, y in zip(shares, each, strict=True)), jnp.zeros_like(x))


def grouped(p: Experts, x: Array, choice: Array, weight: Array, n_experts: int) -> Array:
    """The expert sum, one expert after the other.

    No token is dropped: the largest size holds all of them. An expert that nobody chose is not
    read. Arguments and result as in `experts.reference`. The derivative keeps what every static
    size would need: `buckets.py` is for training.
    """
    b, t, d = x.shape
    if b * t == 1:
        return of_one_token(p, x, choice, weight, n_experts)
    k = choice.shape[-1]
    order = jnp.argsort(choice.reshape(-1), stable=True)
    counts = jnp.bincount(choice.reshape(-1), length=n_experts)
    rows = x.reshape(b * t, d)[order // k]
    each = tuple(expert(p, e) for e in range(n_experts))
    y = over_groups(rows, counts, d, lambda e, mine: layers.mlp(each[e], mine))
    share = weight.reshape(-1)[order].astype(x.dtype)
    return jnp.zeros((b * t, d), x.dtype).at[order // k].add(share[:, None] * y).reshape(x.shape)
