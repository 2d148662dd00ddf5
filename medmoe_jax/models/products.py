"""Products of tiles of rows, each with the matrix of its expert: kernels for TPU and GPU.

All take rows [R, K] in tiles that belong to one expert each (`tiles.layout`), kernels [E, K, N] and
sizes i32[E], the rows of each expert. Rows behind those of the last expert give zero and cost
nothing. `R` is a multiple of the tile and so are the sizes.

Source: the TPU kernels are those of `jax.experimental.pallas.ops.tpu.megablox`, with tile sizes of
our own.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Protocol

import jax
import jax.numpy as jnp

from medmoe_jax.models.layers import Array

VMEM = 13 * 2**20  # bytes of a TPU core's vector memory (16 MiB are usable) for one kernel's blocks


class Product(Protocol):
    """rows [R, K], kernels [E, K, N], sizes i32[E] -> [R, N] in the dtype of rows."""

    def __call__(self, rows: Array, kernels: Array, sizes: Array, *, tile: int) -> Array: ...


def plain(rows: Array, kernels: Array, sizes: Array, *, tile: int) -> Array:
    """The product as XLA has it: right everywhere, at the cost of all experts where XLA has no
    kernel for it (GPU and CPU)."""
    del tile
    return jax.lax.ragged_dot(rows, kernels, sizes)


def _blocks(size: int, limit: int) -> list[int]:
    """Block lengths for a dimension: divisors that are multiples of 128 where there are any."""
    whole = [n for n in range(128, min(size, limit) + 1, 128) if size % n == 0]
    return whole or [n for n in (128, 256, 512) if n < size + 128]


@cache
def blocks(
    rows: int, k: int, n: int, tile: int, n_experts: int, itemsize: int
) -> tuple[int, int, int]:
    """Block sizes (rows, K, N) of rows [rows, k] @ kernels [n_experts, k, n] on a TPU.

    Those that fit into VMEM and read least. With the whole of K in one block, an expert's kernel
    stays there for all of its tiles; else it is read for every tile.
    """

    def cost(block: tuple[int, int]) -> tuple[float, int]:
        bk, bn = block
        held = 2 * itemsize * (tile * bk + bk * bn + tile * bn) + 4 * tile * bn
        if held > VMEM:
            return float("inf"), 0
        times = n_experts if bk >= k else rows // tile
        return rows * k * -(-n // bn) + times * k * n, -bk * bn

    return (tile, *min(((bk, bn) for bk in _blocks(k, k) for bn in _blocks(n, n)), key=cost))


@cache
def blocks_of_weights(k: int, n: int, tile: int, itemsize: int) -> tuple[int, int, int]:
    """Block sizes (rows, K, N) of the kernels' gradient, rows^T [k, R] @ dy [R, n], on a TPU."""

    def cost(block: tuple[int, int]) -> tuple[float, int]:
        bk, bn = block
        held = (2 * itemsize + 4) * (tile * bk + tile * bn + bk * bn)
        if held > VMEM:
            return float("inf"), 0
        return k * -(-n // bn) + n * -(-k // bk), -bk * bn

    return (tile, *min(((bk, bn) for bk in _blocks(k, k) for bn in _blocks(n, n)), key=cost))


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _tpu(rows: Array, kernels: Array, sizes: Array, tile: int, interpret: bool) -> Array:
    return _tpu_rows(rows, kernels, sizes, tile, interpret, transposed=False)


def _with_rest(sizes: Array, rows: int) -> Array:
    """sizes and one more group, that of the rows which no expert owns: it is skipped."""
    return jnp.append(sizes, rows - sizes.sum()).astype(jnp.int32)


def _tpu_rows(
    rows: Array, kernels: Array, sizes: Array, tile: int, interpret: bool, transposed: bool
) -> Array:
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    (r, k), n = rows.shape, kernels.shape[1 if transposed else 2]
    return gmm(
        rows,
        kernels,
        _with_rest(sizes, r),
        preferred_element_type=rows.dtype,
        tiling=blocks(r, k, n, tile, len(kernels), rows.dtype.itemsize),
        transpose_rhs=transposed,
        interpret=interpret,
    )


def _tpu_forward(
    rows: Array, kernels: Array, sizes: Array, tile: int, interpret: bool
) -> tuple[Array, tuple[Array, Array, Array]]:
    return _tpu(rows, kernels, sizes, tile, interpret), (rows, kernels, sizes)


def _tpu_backward(
    tile: int, interpret: bool, kept: tuple[Array, Array, Array], dy: Array
) -> tuple[Array, Array, None]:
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    rows, kernels, sizes = kept
    n_experts, k, n = kernels.shape
    drows = _tpu_rows(dy, kernels, sizes, tile, interpret, transposed=True)
    dkernels = tgmm(
        rows.swapaxes(0, 1),
        dy,
        _with_rest(sizes, len(rows)),
        preferred_element_type=kernels.dtype,
        tiling=blocks_of_weights(k, n, tile, rows.dtype.itemsize),
        num_actual_groups=n_experts,
        interpret=interpret,
    )
    return drows, dkernels, None


_tpu.defvjp(_tpu_forward, _tpu_backward)


def tpu(rows: Array, kernels: Array, sizes: Array, *, tile: int, interpret: bool = False) -> Array:
    """The product on a TPU, and its derivatives: megablox."""
    return _tpu(rows, kernels, sizes, tile, interpret)
