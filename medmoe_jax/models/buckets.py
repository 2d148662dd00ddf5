"""Products of rows, each with the matrix of its expert, on a CPU: a `products.Product` without a
kernel of its own.

XLA wants a static number of rows, so the group of an expert is cut into pieces of a few static
sizes, and a piece is computed together with what follows it. Each size is a loop, of no rounds or
one for a piece that ends a group, which writes into the result in place: the branches of
`lax.switch` copy all of it for every expert, and what they do beside products runs on one thread.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from medmoe_jax.models import grouped
from medmoe_jax.models.layers import Array
from medmoe_jax.models.products import Kernels, together

Piece = Callable[[Array, Array, Array, int, bool, Array], Array]


def piece_sizes(rows: int, n_experts: int) -> list[int]:
    """Static sizes of pieces of a group, multiples of the first; the last holds all rows, or a
    likely group."""
    unit = grouped.unit(rows, n_experts)
    return [unit * i for i in range(1, grouped.BUCKETS + 1) if unit * (i - 1) < rows]


def _over_pieces(piece: Piece, y: Array, rows: int, counts: Array) -> Array:
    """What the pieces of all groups make of y, one after the other.

    Args:
      piece: makes y of (expert, first row, end of the group, size, whether the expert had a piece
        before, y). It may spoil what belongs to later rows.
      y: what there is at first.
      rows: R.
      counts: i32[E], rows of each group.
    """
    sizes, ends = piece_sizes(rows, len(counts)), jnp.cumsum(counts)
    largest = sizes[-1]

    def group(e: Array, y: Array) -> Array:
        start, end = ends[e] - counts[e], ends[e]
        whole = jnp.maximum(counts[e] - 1, 0) // largest  # pieces in front of the last one
        last = start + whole * largest

        # Rows that depend on the round keep XLA from computing them in front of the loop.
        def step(size: int, first: Array, again: bool, i: Array, y: Array) -> Array:
            return piece(e, first + i * size, end, size, again, y)

        for less, size in itertools.pairwise([0, *sizes]):
            fits = (end - last > less) & (end - last <= size)
            y = jax.lax.fori_loop(0, fits.astype(jnp.int32), partial(step, size, last, False), y)
        if largest < rows:
            y = jax.lax.fori_loop(0, whole, partial(step, largest, start, True), y)
        return y

    return jax.lax.fori_loop(0, len(counts), group, y)


def _padded(rows: Array, n_experts: int) -> Array:
    """rows [R, K] and zeros behind them, as many as the last piece may reach too far."""
    return jnp.pad(rows, ((0, piece_sizes(len(rows), n_experts)[0] - 1), (0, 0)))


def _rows(rows: Array, kernels: Array, counts: Array, axis: int) -> Array:
    """rows [R, K] times the axis `axis` of the kernels: [R, N]."""
    given = _padded(rows, len(counts))

    def piece(e: Array, start: Array, _end: Array, size: int, _again: bool, y: Array) -> Array:
        mine = jax.lax.dynamic_slice_in_dim(given, start, size)
        kernel = jax.lax.dynamic_index_in_dim(kernels, e, keepdims=False)
        product = jax.lax.dot_general(mine, kernel, (((1,), (axis - 1,)), ((), ())))
        # What is wrong behind the group is overwritten by the next one.
        return jax.lax.dynamic_update_slice_in_dim(y, product, start, 0)

    y = jnp.zeros((len(given), kernels.shape[3 - axis]), rows.dtype)
    y = _over_pieces(piece, y, len(rows), counts)[: len(rows)]
    return jnp.where((jnp.arange(len(rows)) < counts.sum())[:, None], y, 0)


def _weights(rows: Array, dy: Array, counts: Array) -> Array:
    """rows^T [K, R] @ dy [R, N] of each expert: [E, K, N]."""
    given, back = _padded(rows, len(counts)), _padded(dy, len(counts))

    def piece(e: Array, start: Array, end: Array, size: int, again: bool, y: Array) -> Array:
        x, dx = (jax.lax.dynamic_slice_in_dim(a, start, size) for a in (given, back))
        # Rows of the next group are in the slices as well.
        found = x.T @ jnp.where((start + jnp.arange(size) < end)[:, None], dx, 0)
        if again:
            found += jax.lax.dynamic_index_in_dim(y, e, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(y, found, e, 0)

    y = jnp.zeros((len(counts), rows.shape[1], dy.shape[1]), dy.dtype)
    return _over_pieces(piece, y, len(rows), counts)


@jax.custom_vjp
def _product(rows: Array, kernels: Array, sizes: Array) -> Array:
    """The derivative is written out because loops of unknown length have none."""
    return _rows(rows, kernels, sizes, 1)


def _forward(rows: Array, kernels: Array, sizes: Array) -> tuple[Array, Any]:
    return _rows(rows, kernels, sizes, 1), (rows, kernels, sizes)


def _backward(kept: tuple[Array, Array, Array], dy: Array) -> tuple[Array, Array, None]:
    rows, kernels, sizes = kept
    return _rows(dy, kernels, sizes, 2), _weights(rows, dy, sizes), None


_product.defvjp(_forward, _backward)


def cpu(rows: Array, kernels: Kernels, sizes: Array, *, tile: int) -> Array:
    """The product on a CPU, and its derivatives. Any `tile` will do, 1 wastes no rows."""
    del tile
    return _product(rows, together(kernels), sizes)
