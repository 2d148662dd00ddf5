"""The product of one row with a matrix, as in decoding a single answer.

On a GPU XLA writes it as a multiplication and a sum where the matrix has fewer than ten million
numbers, and then writes the products, as large as the matrix and rounded to its dtype, to the main
memory: three times the bytes. Two rows are a matrix product to it, which reads the matrix once.
So the row is given twice; a copy is read where the row is, a row of zeros would be written first.

Source: `ShouldStrengthReduceDotToReduce` of XLA's GpuAlgebraicSimplifier.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

Array = jax.Array


def product(form: Callable[[Array, Array], Array], x: Array, kernel: Array) -> Array:
    """form(x, kernel): a product of rows x [..., K] with a matrix [K, N], of any dtypes."""
    if x.size > x.shape[-1]:
        return form(x, kernel)
    return jax.lax.platform_dependent(x, kernel, cuda=partial(twice, form), default=form)


def twice(form: Callable[[Array, Array], Array], x: Array, kernel: Array) -> Array:
    """The product of the one row of x [..., K], given twice."""
    rows = jnp.broadcast_to(x.reshape(1, -1), (2, x.size))
    return form(rows, kernel)[:1].reshape(*x.shape[:-1], -1)
