"""The product of few rows with a matrix of 4 bits on an NVIDIA GPU, as in decoding.

XLA has no product that takes bytes of two numbers each: it writes the numbers out as floats first,
or the products of every group of inputs, which for several rows is many times what it reads. Here
they become floats in registers.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from medmoe_jax.models import fallback

Array = jax.Array

FEW = 64  # rows up to which the bytes of the matrix are what counts
LEAST = 16  # rows and inputs of a product that a GPU's matrix units take
COLUMNS = (32, 16)  # outputs of a program; 32 bytes are what a GPU reads at once
PROGRAMS = 128  # at least, so that nearly every multiprocessor of a large GPU has one


def fits(values: Any, rows: int) -> bool:
    """Whether `product` is to be used; where few rows would, but cannot, the log says so.

    Args:
      values: i8[groups, g/2, out] or its shape, see `quantized.Int4`.
      rows: rows of the other factor.
    """
    _, half, out = values.shape
    if rows > FEW:
        return False
    if half < LEAST or half & (half - 1) or out % COLUMNS[-1]:
        fallback.say(
            "gpu",
            "a matrix of 4 bits is written out as floats for each product: its groups of "
            f"{2 * half} inputs are no power of two from {2 * LEAST} on, or {COLUMNS[-1]} does not "
            f"divide its {out} outputs",
        )
        return False
    return True


def parts(groups: int, blocks: int) -> int:
    """How many programs share the groups of a block of outputs: a divisor of their number."""
    divisors = [n for n in range(1, groups + 1) if groups % n == 0]
    return next((n for n in divisors if n * blocks >= PROGRAMS), groups)


def product(values: Array, scale: Array, x: Array, *, interpret: bool = False) -> Array:
    """x @ matrix, summed in float32, the step sizes multiplied in behind the products of a group.

    Args:
      values: i8[groups, g/2, out], as of `quantized.Int4`; `fits`.
      scale: f32[groups, out].
      x: [N, groups * g].
      interpret: see `pallas_call`.

    Returns:
      f32[N, out].
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    groups, half, out = values.shape
    n = max(LEAST, pl.next_power_of_2(len(x)))
    bn = next(size for size in COLUMNS if out % size == 0)
    shares = parts(groups, out // bn)
    each = groups // shares
    rows = jnp.pad(x, ((0, n - len(x)), (0, 0)))

    def body(rows_ref: Any, values_ref: Any, scale_ref: Any, out_ref: Any) -> None:
        first = pl.program_id(1) * each

        def add(i: Array, total: Array) -> Array:
            group = first + i
            both = values_ref[group].astype(jnp.int32)
            low, high = (both << 28) >> 28, both >> 4  # shifts keep the sign

            def times(start: int, numbers: Array) -> Array:
                part = rows_ref[:, pl.ds(group * 2 * half + start, half)]
                return triton.dot(part, numbers.astype(rows.dtype))

            return total + (times(0, low) + times(half, high)) * scale_ref[group][None]

        total = jax.lax.fori_loop(0, each, add, jnp.zeros((n, bn), jnp.float32))
        out_ref[...] = total

    found = pl.pallas_call(
        body,
        grid=(out // bn, shares),
        in_specs=[
            pl.BlockSpec(rows.shape, lambda j, part: (0, 0)),
            pl.BlockSpec((groups, half, bn), lambda j, part: (0, 0, j)),
            pl.BlockSpec((groups, bn), lambda j, part: (0, j)),
        ],
        out_specs=pl.BlockSpec((None, n, bn), lambda j, part: (part, 0, j)),
        out_shape=jax.ShapeDtypeStruct((shares, n, out), jnp.float32),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=4),
        interpret=interpret,
        name="product_of_int4",  # `plan.hlo` finds it by this name
    )(rows, values, scale)
    return found.sum(0)[: len(x)]
