"""Products of tiles of rows, each with the matrix of its expert: kernels for TPU and GPU.

All take rows [R, K] in tiles that belong to one expert each (`tiles.layout`), kernels [E, K, N] and
sizes i32[E], the rows of each expert. Rows behind those of the last expert give zero and cost
nothing. `R` is a multiple of the tile and so are the sizes. The kernels may also be a list of E
arrays [K, N], as in generation: they are read where they lie, and copied into one array only where
something is derived.

Source: the TPU kernels are those of `jax.experimental.pallas.ops.tpu.megablox`, with block sizes of
our own; that for separate kernels is in `one_expert.py`. Those for a GPU are Triton kernels by way
of Pallas.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from medmoe_jax.models import fallback, one_expert
from medmoe_jax.models.layers import Array

VMEM = 13 * 2**20  # bytes of a TPU core's vector memory (16 MiB are usable) for one kernel's blocks

Kernels = Array | list[Array]
Form = Callable[[Array, Any, Array], Array]  # rows, kernels, sizes -> the product


class Product(Protocol):
    """rows [R, K], kernels [E, K, N], sizes i32[E] -> [R, N] in the dtype of rows."""

    def __call__(self, rows: Array, kernels: Kernels, sizes: Array, *, tile: int) -> Array: ...


def plain(rows: Array, kernels: Kernels, sizes: Array, *, tile: int) -> Array:
    """The product as XLA has it: right everywhere, at the cost of all experts where XLA has no
    kernel for it (GPU and CPU)."""
    del tile
    return jax.lax.ragged_dot(rows, together(kernels), sizes)


def together(kernels: Kernels) -> Array:
    """The kernels as one array [E, K, N]."""
    return jnp.stack(kernels) if isinstance(kernels, list) else kernels


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _apart(form: Form, whole: Form, rows: Array, kernels: list[Array], sizes: Array) -> Array:
    """The product of `form`, for separate kernels; derived as `whole`, for one array."""
    return form(rows, kernels, sizes)


def _apart_forward(
    form: Form, whole: Form, rows: Array, kernels: list[Array], sizes: Array
) -> tuple[Array, tuple[Array, list[Array], Array]]:
    return form(rows, kernels, sizes), (rows, kernels, sizes)


def _apart_backward(
    form: Form, whole: Form, kept: tuple[Array, list[Array], Array], dy: Array
) -> tuple[Array, list[Array], None]:
    rows, kernels, sizes = kept
    _, pull = jax.vjp(lambda rows, kernels: whole(rows, kernels, sizes), rows, together(kernels))
    drows, dkernels = pull(dy)
    return drows, list(dkernels), None


_apart.defvjp(_apart_forward, _apart_backward)


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
    # What follows is not mixed into the last step of the product, which can then do it in place.
    y = jax.lax.optimization_barrier(_tpu(rows, kernels, sizes, tile, interpret))
    return y, (rows, kernels, sizes)


def _tpu_backward(
    tile: int, interpret: bool, kept: tuple[Array, Array, Array], dy: Array
) -> tuple[Array, Array, None]:
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    rows, kernels, sizes = kept
    n_experts, k, n = kernels.shape
    dkernels = tgmm(
        rows.swapaxes(0, 1),
        dy,
        _with_rest(sizes, len(rows)),
        preferred_element_type=kernels.dtype,
        tiling=blocks_of_weights(k, n, tile, rows.dtype.itemsize),
        num_actual_groups=n_experts,
        interpret=interpret,
    )
    # In this order, so that the rows' memory is free for their gradient.
    dy, dkernels = jax.lax.optimization_barrier((dy, dkernels))
    drows = _tpu_rows(dy, kernels, sizes, tile, interpret, transposed=True)
    return drows, dkernels, None


_tpu.defvjp(_tpu_forward, _tpu_backward)


def _tpu_each(rows: Array, kernels: list[Array], sizes: Array, tile: int, interpret: bool) -> Array:
    """A call for each expert, which writes its own tiles of one buffer and reads nothing of it."""
    (r, k), n = rows.shape, kernels[0].shape[1]
    block = blocks(r, k, n, tile, len(kernels), rows.dtype.itemsize)
    ends, y = jnp.cumsum(sizes), None
    run = partial(one_expert.product, block=block, experts=len(kernels), interpret=interpret)
    for kernel, start, size in zip(kernels, ends - sizes, sizes, strict=True):
        y = run(rows, kernel, start // tile, size // tile, y)
    assert y is not None
    return jnp.where((jnp.arange(r) < ends[-1])[:, None], y, 0)


def tpu(
    rows: Array, kernels: Kernels, sizes: Array, *, tile: int, interpret: bool = False
) -> Array:
    """The product on a TPU, and its derivatives: megablox."""
    rest = {"tile": tile, "interpret": interpret}
    if isinstance(kernels, list):
        return _apart(partial(_tpu_each, **rest), partial(tpu, **rest), rows, kernels, sizes)
    return _tpu(rows, kernels, sizes, tile, interpret)


GPU_TILE = 128  # rows of a block on a GPU: every tile is a multiple of it


def _gpu_blocks(k: int, n: int) -> tuple[int, int]:
    """Block sizes (K, N) on a GPU, powers of two that divide; 0 where there is none."""
    return tuple(
        next((size for size in sizes if length % size == 0), 0)
        for length, sizes in ((k, (64, 32, 16)), (n, (128, 64, 32, 16)))
    )  # pyright: ignore[reportReturnType]


def _gpu_rows(
    rows: Array, kernels: Kernels, sizes: Array, interpret: bool, transposed: bool
) -> Array:
    """rows @ kernels (or their transposes): a program for each block of the result."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    stacked = not isinstance(kernels, list)
    arrays = [kernels] if stacked else kernels
    (r, k), n = rows.shape, arrays[0].shape[-2 if transposed else -1]
    bk, bn = _gpu_blocks(k, n)
    ends = jnp.cumsum(sizes)
    first = jnp.arange(0, r, GPU_TILE)
    owner = (first[:, None] >= ends[None]).sum(-1).astype(jnp.int32)  # E: nobody

    def body(owner_ref: Any, rows_ref: Any, *refs: Any) -> None:
        *kernel_refs, out_ref = refs
        e = owner_ref[0]
        total = jnp.zeros((GPU_TILE, bn), jnp.float32)
        for i, ref in enumerate(kernel_refs):
            # Of all these loops the owner's alone has any rounds.
            mine = e < len(kernels) if stacked else e == i

            def add(step: Array, total: Array, ref: Any = ref) -> Array:
                part = pl.ds(step * bk, bk)
                place = (slice(None), part) if transposed else (part, slice(None))
                kernel = ref[(e, *place) if stacked else place]
                return total + triton.dot(rows_ref[:, part], kernel.T if transposed else kernel)

            total = jax.lax.fori_loop(0, mine.astype(jnp.int32) * (k // bk), add, total)
        out_ref[...] = total.astype(out_ref.dtype)

    stack = (len(kernels),) if stacked else ()
    shape = (*stack, bn, k) if transposed else (*stack, k, bn)

    def place(i: Array, j: Array) -> tuple[Any, ...]:
        return (*(0 for _ in stack), *((j, 0) if transposed else (0, j)))

    return pl.pallas_call(
        body,
        grid=(r // GPU_TILE, n // bn),
        in_specs=[
            pl.BlockSpec((1,), lambda i, j: (i,)),
            pl.BlockSpec((GPU_TILE, k), lambda i, j: (i, 0)),
            *(pl.BlockSpec(shape, place) for _ in arrays),
        ],
        out_specs=pl.BlockSpec((GPU_TILE, bn), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((r, n), rows.dtype),
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=3),
        interpret=interpret,
        name="grouped_product",
    )(owner, rows, *arrays)


def _gpu_weights(rows: Array, dy: Array, sizes: Array, dtype: Any, interpret: bool) -> Array:
    """rows^T @ dy of each expert: a program for each block of the result."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    (r, k), n = rows.shape, dy.shape[1]
    _, bk = _gpu_blocks(k, k)
    step, bn = _gpu_blocks(GPU_TILE, n)
    ends = jnp.cumsum(sizes)

    def body(start_ref: Any, end_ref: Any, rows_ref: Any, dy_ref: Any, out_ref: Any) -> None:
        def add(i: Array, total: Array) -> Array:
            part = pl.ds(i * step, step)
            return total + triton.dot(rows_ref[part, :].T, dy_ref[part, :])

        zeros = jnp.zeros((bk, bn), jnp.float32)
        total = jax.lax.fori_loop(start_ref[0] // step, end_ref[0] // step, add, zeros)
        out_ref[...] = total.astype(out_ref.dtype)

    return pl.pallas_call(
        body,
        grid=(len(sizes), k // bk, n // bn),
        in_specs=[
            pl.BlockSpec((1,), lambda e, i, j: (e,)),
            pl.BlockSpec((1,), lambda e, i, j: (e,)),
            pl.BlockSpec((r, bk), lambda e, i, j: (0, i)),
            pl.BlockSpec((r, bn), lambda e, i, j: (0, j)),
        ],
        out_specs=pl.BlockSpec((None, bk, bn), lambda e, i, j: (e, i, j)),
        out_shape=jax.ShapeDtypeStruct((len(sizes), k, n), dtype),
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=3),
        interpret=interpret,
        name="grouped_product_of_weights",
    )((ends - sizes).astype(jnp.int32), ends.astype(jnp.int32), rows, dy)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _gpu(rows: Array, kernels: Array, sizes: Array, interpret: bool) -> Array:
    return _gpu_rows(rows, kernels, sizes, interpret, transposed=False)


def _gpu_forward(
    rows: Array, kernels: Array, sizes: Array, interpret: bool
) -> tuple[Array, tuple[Array, Array, Array]]:
    return _gpu(rows, kernels, sizes, interpret), (rows, kernels, sizes)


def _gpu_backward(
    interpret: bool, kept: tuple[Array, Array, Array], dy: Array
) -> tuple[Array, Array, None]:
    rows, kernels, sizes = kept
    drows = _gpu_rows(dy, kernels, sizes, interpret, transposed=True)
    return drows, _gpu_weights(rows, dy, sizes, kernels.dtype, interpret), None


_gpu.defvjp(_gpu_forward, _gpu_backward)


def gpu(
    rows: Array, kernels: Kernels, sizes: Array, *, tile: int, interpret: bool = False
) -> Array:
    """The product on an NVIDIA GPU, and its derivatives: Triton kernels for whole blocks."""
    assert tile % GPU_TILE == 0
    k, n = (kernels[0] if isinstance(kernels, list) else kernels).shape[-2:]
    if not all(_gpu_blocks(size, size)[0] for size in (k, n)):
        fallback.say("gpu", f"every expert is run on every token: 16 does not divide {k} or {n}")
        return plain(rows, kernels, sizes, tile=tile)
    if isinstance(kernels, list):
        form = partial(_gpu_rows, interpret=interpret, transposed=False)
        whole = partial(gpu, tile=tile, interpret=interpret)
        return _apart(form, whole, rows, kernels, sizes)
    return _gpu(rows, kernels, sizes, interpret)
