"""The product of the rows of one expert with its matrix on a TPU, written where they belong among
those of all experts: for experts that are arrays of their own, as in generation.

Megablox can do it too, but reads what it is to leave as it is: the result has to hold zeros first
and is read once, which with many rows is more bytes than copying the experts into one array.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


def product(
    rows: Array,
    kernel: Array,
    first: Array,
    tiles: Array,
    y: Array | None,
    *,
    block: tuple[int, int, int],
    experts: int,
    interpret: bool = False,
) -> Array:
    """Some tiles of rows @ kernel, in y.

    Args:
      rows: [R, K].
      kernel: [K, N].
      first: i32[], number of the first of the tiles.
      tiles: i32[], how many.
      y: [R, N], whose other tiles stay as they are; its memory is used again. None: they are not
        written, and may hold anything.
      block: sizes of blocks along R (a tile, which divides R), K and N.
      experts: so many share the rows, equally as far as the compiler knows.
      interpret: see `pallas_call`.

    Returns:
      [R, N] in the dtype of rows.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    (r, k), n, (tile, bk, bn) = rows.shape, kernel.shape[1], block
    steps = pl.cdiv(k, bk)

    def body(first_ref: Any, rows_ref: Any, kernel_ref: Any, *refs: Any) -> None:
        out_ref, total_ref = refs[-2:]
        del first_ref
        step = pl.program_id(2)

        def inside(a: Array, axis: int) -> Array:
            """Without what the last block has beyond the matrix."""
            if k % bk == 0:
                return a
            place = step * bk + jax.lax.broadcasted_iota(jnp.int32, a.shape, axis)
            return jnp.where(place < k, a, 0)

        @pl.when(step == 0)
        def begin() -> None:
            total_ref[...] = jnp.zeros_like(total_ref)

        factors = inside(rows_ref[...], 1), inside(kernel_ref[...], 0)
        total_ref[...] += jnp.dot(*factors, preferred_element_type=jnp.float32)

        @pl.when(step == steps - 1)
        def end() -> None:
            out_ref[...] = total_ref[...].astype(out_ref.dtype)

    before = [] if y is None else [y]
    return pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(n, bn), tiles, steps),
            in_specs=[
                pl.BlockSpec((tile, bk), lambda j, i, step, first: (first[0] + i, step)),
                pl.BlockSpec((bk, bn), lambda j, i, step, first: (step, j)),
                *(pl.BlockSpec(memory_space=pl.ANY) for _ in before),
            ],
            out_specs=pl.BlockSpec((tile, bn), lambda j, i, step, first: (first[0] + i, j)),
            scratch_shapes=[pltpu.VMEM((tile, bn), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((r, n), rows.dtype),
        input_output_aliases={3: 0} if before else {},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * r * k * n // experts,
            bytes_accessed=(k * n + r * (k + n) // experts) * rows.dtype.itemsize,
            transcendentals=0,
        ),
        interpret=interpret,
        name="product_of_one_expert",  # `plan.hlo` finds it by this name
    )(first[None].astype(jnp.int32), rows, kernel, *before)
