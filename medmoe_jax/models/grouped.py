"""Each expert on its own tokens, padded to one of a few static sizes: the form for a CPU, and for a
few tokens on any platform.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from medmoe_jax.models import layers
from medmoe_jax.models.layers import Array, Params

Experts = Params | tuple[Params, ...]
FEW = 64  # (token, expert) pairs up to which only the bytes of the weights matter
BUCKET = 32  # pairs by which the static sizes of an expert's group differ at least
BUCKETS = 8  # most static sizes of a group, beside the empty one


def expert(p: Experts, e: int) -> Params:
    """The parameters of expert `e`."""
    return p[e] if isinstance(p, tuple) else jax.tree.map(lambda a: a[e], p)


def group_sizes(pairs: int) -> list[int]:
    """Static sizes of an expert's group among `pairs` (token, expert) pairs: 0, ..., pairs."""
    n = 1 if pairs <= FEW else min(BUCKETS, -(-pairs // BUCKET))
    return [-(-pairs * i // n) for i in range(n + 1)]


def grouped(p: Experts, x: Array, choice: Array, weight: Array, n_experts: int) -> Array:
    """Each expert on its own tokens, padded to the next of a few static sizes (`group_sizes`).

    No token is dropped: the largest size holds all of them. An expert that nobody chose is not
    read. Arguments and result as in `reference`.
    """
    b, t, d = x.shape
    k = choice.shape[-1]
    order = jnp.argsort(choice.reshape(-1), stable=True)
    counts = jnp.bincount(choice.reshape(-1), length=n_experts)
    rows = x.reshape(b * t, d)[order // k]
    y = _sorted_rows(tuple(expert(p, e) for e in range(n_experts)), rows, counts)
    share = weight.reshape(-1)[order].astype(x.dtype)
    return jnp.zeros((b * t, d), x.dtype).at[order // k].add(share[:, None] * y).reshape(x.shape)


Slices = Callable[[Array], Array]  # [M + largest size, ...] -> the rows of one group, padded


def _by_group(
    n: int, counts: Array, run: Callable[[int, int, Slices, Array, Any], Any], start: Any
) -> Any:
    """Folds run(expert, size, slices, place, carry) over the groups of `n` sorted rows.

    `size` is the static size of the expert's group, `place` where it begins; the carry of an empty
    group is left alone.
    """
    sizes, carry = group_sizes(n), start
    places = jnp.cumsum(counts) - counts
    for e in range(len(counts)):

        def branch(size: int, e: int = e) -> Callable[[Any], Any]:
            def slices(a: Array) -> Array:
                rows = jax.lax.dynamic_slice_in_dim(a, places[e], size)
                # Rows of the next group are in the slice as well.
                return jnp.where((jnp.arange(size) < counts[e])[:, None], rows, 0)

            return lambda value: run(e, size, slices, places[e], value)

        bucket = (counts[e] > jnp.asarray(sizes[:-1])).sum()
        branches = [lambda value: value, *map(branch, sizes[1:])]
        carry = jax.lax.switch(bucket, branches, carry)
    return carry


def _add(total: Array, place: Array, rows: Array) -> Array:
    """total with `rows` added from `place` on."""
    before = jax.lax.dynamic_slice_in_dim(total, place, len(rows))
    return jax.lax.dynamic_update_slice_in_dim(total, before + rows, place, 0)


@jax.custom_vjp
def _sorted_rows(p: tuple[Params, ...], rows: Array, counts: Array) -> Array:
    """Expert outputs of rows [M, D] that are sorted by expert; counts i32[E] rows for each.

    The derivative is written out because that of `lax.switch` keeps what every branch would need,
    filled with zeros, which costs more than the products. It computes the hidden layer again.
    """
    # A group's slice may reach past the last row: it must not be moved back by clamping.
    padded = jnp.pad(rows, ((0, len(rows)), (0, 0)))

    def run(e: int, size: int, slices: Slices, place: Array, y: Array) -> Array:
        mine = (jnp.arange(size) < counts[e])[:, None]
        return _add(y, place, jnp.where(mine, layers.mlp(p[e], slices(padded)), 0))

    return _by_group(len(rows), counts, run, jnp.zeros_like(padded))[: len(rows)]


def _forward(p: tuple[Params, ...], rows: Array, counts: Array) -> tuple[Array, Any]:
    return _sorted_rows(p, rows, counts), (p, rows, counts)


def _backward(kept: Any, dy: Array) -> tuple[Any, Array, None]:
    p, rows, counts = kept
    padded, dy = (jnp.pad(a, ((0, len(rows)), (0, 0))) for a in (rows, dy))

    def run(e: int, size: int, slices: Slices, place: Array, carry: Any) -> Any:
        dx, dp = carry
        _, pull = jax.vjp(layers.mlp, p[e], slices(padded))
        mine, drows = pull(slices(dy))
        return _add(dx, place, drows), (*dp[:e], mine, *dp[e + 1 :])

    dx, dp = _by_group(len(rows), counts, run, jax.tree.map(jnp.zeros_like, (padded, p)))
    return dp, dx[: len(rows)], None


_sorted_rows.defvjp(_forward, _backward)
