"""Products of rows, each with the matrix of its expert, on a CPU: a `products.Product` without a
kernel of its own.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from medmoe_jax.models.grouped import by_size, group_sizes, over_groups, padded
from medmoe_jax.models.layers import Array
from medmoe_jax.models.products import Kernels, together


def _rows(rows: Array, kernels: Array, sizes: Array, axis: int) -> Array:
    """rows [R, K] times the axis `axis` of the kernels: [R, N]."""

    def run(e: int, mine: Array) -> Array:
        return jax.lax.dot_general(mine, kernels[e], (((1,), (axis - 1,)), ((), ())))

    return over_groups(rows, sizes, kernels.shape[3 - axis], run)


@jax.custom_vjp
def _product(rows: Array, kernels: Array, sizes: Array) -> Array:
    """The derivative is written out because that of `lax.switch` keeps what every branch would
    need, filled with zeros, which costs more than the products."""
    return _rows(rows, kernels, sizes, 1)


def _forward(rows: Array, kernels: Array, sizes: Array) -> tuple[Array, Any]:
    return _rows(rows, kernels, sizes, 1), (rows, kernels, sizes)


def _backward(kept: tuple[Array, Array, Array], dy: Array) -> tuple[Array, Array, None]:
    rows, kernels, sizes = kept
    static = group_sizes(len(rows), len(sizes))
    given, back, starts = padded(rows, static), padded(dy, static), jnp.cumsum(sizes) - sizes
    found = []
    for e in range(len(sizes)):

        def run(size: int, e: int = e) -> Array:
            x, dx = (jax.lax.dynamic_slice_in_dim(a, starts[e], size) for a in (given, back))
            # Rows of the next group are in the slices as well.
            return x.T @ jnp.where((jnp.arange(size) < sizes[e])[:, None], dx, 0)

        def empty() -> Array:
            return jnp.zeros(kernels.shape[1:], dy.dtype)

        found.append(by_size(static, sizes[e], run, empty))
    return _rows(dy, kernels, sizes, 2), jnp.stack(found), None


_product.defvjp(_forward, _backward)


def cpu(rows: Array, kernels: Kernels, sizes: Array, *, tile: int) -> Array:
    """The product on a CPU, and its derivatives. Any `tile` will do, 1 wastes no rows."""
    del tile
    return _product(rows, together(kernels), sizes)
