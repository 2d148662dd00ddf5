"""Weights as small integers: `Int8` and `Int4` stand in a parameter tree where a kernel was.

Both are plain pairs of arrays with the stack axes of the kernel in front, so that slicing a layer
or an expert out, `jit` and `device_put` treat them as any other parameters. qwix 0.1.8 has such a
type too, `QArray`. It is not used here: its product with float activations first writes the whole
matrix out as floats, which takes twenty times as long as `product` for one token on a CPU; there
its int4 takes a byte a number; and its groups must divide the matrix.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from medmoe_jax.models import int4_rows

Array = jax.Array

INT8_MAX = 127  # symmetric: -128 is not used
INT4_MAX = 7  # likewise
AT_ONCE = 1 << 20  # weights that exist as floats at a time on a CPU: what its caches hold


class Int8(NamedTuple):
    """A kernel [*stack, in, out] with one step size for each output."""

    values: Array  # i8[*stack, in, out]
    scale: Array  # f32[*stack, out]


class Int4(NamedTuple):
    """A kernel [*stack, in, out] with a step size for each group of inputs and output.

    A byte holds two numbers on every platform: input j of a group in its low half, input j + g/2
    in its high half. The last group is filled up with zeros.
    """

    values: Array  # i8[*stack, groups, g/2, out]
    scale: Array  # f32[*stack, groups, out]


def is_quantized(leaf: Any) -> bool:
    """Whether this is a quantized kernel; also an `is_leaf` for functions on trees."""
    return isinstance(leaf, (Int8, Int4))


def outline(kernel: Any) -> tuple[int, ...]:
    """[*stack, in, out] as it can be shared out: whole groups of inputs where there are groups.
    Of any other leaf its shape."""
    if isinstance(kernel, Int4):
        return tuple(kernel.scale.shape)
    return tuple(kernel.values.shape if isinstance(kernel, Int8) else kernel.shape)


def inputs(kernel: Any) -> int:
    """Inputs of a kernel, quantized or not, or groups of them: what can be shared out."""
    return outline(kernel)[-2]


def split(kernel: Any, spec: P) -> Any:
    """The specs of a leaf that is split like `spec`, which has an entry for each axis of
    `outline`."""
    specs: Any = (spec,)
    if isinstance(kernel, Int8):
        specs = spec, P(*spec[:-2], spec[-1])
    elif isinstance(kernel, Int4):
        specs = P(*spec[:-1], None, spec[-1]), spec
    return type(kernel)(*specs) if is_quantized(kernel) else spec


def _rounded(w: Array, largest: int) -> tuple[Array, Array]:
    """f32[..., n, out] -> i8 multiples of a step and the step f32[..., out]; zeros for zeros."""
    step = jnp.abs(w).max(-2) / largest
    safe = jnp.where(step == 0, 1.0, step)[..., None, :]
    return jnp.clip(jnp.round(w / safe), -largest, largest).astype(jnp.int8), step


def to_int8(kernel: Array) -> Int8:
    """Rounds a kernel [in, out] to the next multiple of max |column| / 127."""
    return Int8(*_rounded(kernel.astype(jnp.float32), INT8_MAX))


def to_int4(kernel: Array, group: int) -> Int4:
    """Rounds a kernel [in, out] to the next multiple of max |group| / 7.

    Args:
      kernel: [in, out].
      group: inputs that share a step size; even.
    """
    n, out = kernel.shape
    filled = jnp.pad(kernel.astype(jnp.float32), ((0, -n % group), (0, 0)))
    values, scale = _rounded(filled.reshape(-1, group, out), INT4_MAX)
    low, high = values[:, : group // 2], values[:, group // 2 :]
    return Int4((high << 4) | (low & 15), scale)


def _halves(values: Array) -> tuple[Array, Array]:
    """The numbers in the low and in the high halves of bytes; shifts keep the sign."""
    return (values << 4) >> 4, values >> 4


def dequantize(kernel: Int8 | Int4) -> Array:
    """The kernel that is meant, f32[*stack, in, out]; of Int4 with the zeros of the last group."""
    if isinstance(kernel, Int8):
        return kernel.values.astype(jnp.float32) * kernel.scale[..., None, :]
    values = jnp.concatenate(_halves(kernel.values), -2).astype(jnp.float32)
    w = values * kernel.scale[..., None, :]
    return w.reshape(*w.shape[:-3], -1, w.shape[-1])


def _dot(x: Array, values: Array) -> Array:
    """[N, n] times integers [n, out] in the dtype of x, summed in float32."""
    return jax.lax.dot(x, values.astype(x.dtype), preferred_element_type=jnp.float32)


def _whole(kernel: Int8 | Int4, x: Array) -> Array:
    """[N, in] -> f32[N, out] in one product, which accelerators fuse with the conversion."""
    # The barrier ties the weights to x. Else the conversion does not depend on the token, and
    # compilers move it in front of the loop over tokens: all weights as floats, all the time.
    kernel, x = jax.lax.optimization_barrier((kernel, x))
    if isinstance(kernel, Int8):
        return _dot(x, kernel.values) * kernel.scale[None]
    return _dot(x, dequantize(kernel))


def _int8_steps(kernel: Int8, x: Array) -> Array:
    """As `_whole`, with few rows of the weights as floats at a time."""
    n, out = kernel.values.shape
    # No fewer rows than tokens: the sum that every step updates is then no larger than the weights.
    # Two steps at least: a single one would be no loop to the compiler (see `_whole`).
    rows = min(-(-n // 2), max(32, AT_ONCE // out, len(x)))

    def add(i: Array, y: Array) -> Array:
        # The last step begins early enough to be whole, and skips what was added before.
        start = jnp.minimum(i * rows, n - rows)
        fresh = (start + jnp.arange(rows) >= i * rows).astype(x.dtype)
        part = jax.lax.dynamic_slice_in_dim(x, start, rows, 1) * fresh[None]
        return y + _dot(part, jax.lax.dynamic_slice_in_dim(kernel.values, start, rows))

    y = jax.lax.fori_loop(0, -(-n // rows), add, jnp.zeros((len(x), out), jnp.float32))
    return y * kernel.scale[None]


def _int4_steps(kernel: Int4, x: Array) -> Array:
    """As `_whole`, with one group of the weights as floats at a time."""
    groups, half, out = kernel.values.shape
    x = x.reshape(len(x), groups, 2, half)

    def add(i: Array, y: Array) -> Array:
        part = jax.lax.dynamic_index_in_dim(x, i, 1, keepdims=False)
        low, high = _halves(jax.lax.dynamic_index_in_dim(kernel.values, i, keepdims=False))
        scale = jax.lax.dynamic_index_in_dim(kernel.scale, i)
        return y + (_dot(part[:, 0], low) + _dot(part[:, 1], high)) * scale

    return jax.lax.fori_loop(0, groups, add, jnp.zeros((len(x), out), jnp.float32))


def product(kernel: Int8 | Int4, x: Array) -> Array:
    """x @ kernel without a copy of the weights in the dtype of x.

    Factors are in the dtype of x; products are summed in float32, where the step sizes are
    multiplied in. A CPU goes through the weights in steps, and the step sizes follow the products,
    as they do for Int4 and few rows on a GPU (`int4_rows.py`). Elsewhere, for weights over several
    devices, and where the result is larger than the weights anyhow, it is one product, before which
    those of Int4 are multiplied to the weights (in float32, rounded to the dtype of x).

    It can be differentiated by x. What the backward pass keeps for that is the kernel as it is.

    Args:
      kernel: of one matrix, without stack axes.
      x: [..., in].

    Returns:
      [..., out] in the dtype of x.
    """
    y = _product(kernel, filled(kernel, x.reshape(-1, x.shape[-1])))
    return y.reshape(*x.shape[:-1], -1)


def filled(kernel: Int8 | Int4, rows: Array) -> Array:
    """Rows [N, in] with zeros behind them where the last group of the kernel has some."""
    if isinstance(kernel, Int8):
        return rows
    groups, half = kernel.values.shape[-3:-1]
    return jnp.pad(rows, ((0, 0), (0, 2 * groups * half - rows.shape[-1])))


@jax.custom_vjp
def _product(kernel: Int8 | Int4, x: Array) -> Array:
    """`product` for rows [N, in]. Without a derivative of its own the backward pass would keep the
    weights as floats: those of all layers, if it computes nothing again."""
    if len(x) >= x.shape[-1] or jax.sharding.get_abstract_mesh().size > 1:
        return _whole(kernel, x).astype(x.dtype)
    forms: dict[str, Any] = {"cpu": _int8_steps if isinstance(kernel, Int8) else _int4_steps}
    if isinstance(kernel, Int4) and int4_rows.fits(kernel.values, len(x)):
        forms["cuda"] = lambda kernel, x: int4_rows.product(kernel.values, kernel.scale, x)
    return jax.lax.platform_dependent(kernel, x, **forms, default=_whole).astype(x.dtype)


def _product_forward(kernel: Int8 | Int4, x: Array) -> tuple[Array, Int8 | Int4]:
    return _product(kernel, x), kernel


def _product_backward(kernel: Int8 | Int4, dy: Array) -> tuple[None, Array]:
    kernel, dy = jax.lax.optimization_barrier((kernel, dy))  # as in `_whole`
    if isinstance(kernel, Int8):
        w, slope = kernel.values, dy * kernel.scale[None]
    else:
        w, slope = dequantize(kernel), dy
    # Its rows times the rows of the weights.
    dx = jax.lax.dot_general(
        slope.astype(dy.dtype),
        w.astype(dy.dtype),
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    return None, dx.astype(dy.dtype)


_product.defvjp(_product_forward, _product_backward)
