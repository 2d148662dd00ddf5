"""Each expert on its own tokens, laid out in tiles: the form for many tokens on a TPU and a GPU,
and in training on a CPU.

The (token, expert) pairs are sorted by expert into a buffer of rows. The rows of an expert begin at
a multiple of the tile, so that every tile belongs to one expert and the products of `products.py`
need no masks. Tiles that no expert owns are not computed. No token is dropped.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from medmoe_jax.models import layers, quantized
from medmoe_jax.models.layers import Array, Params
from medmoe_jax.models.products import Kernels, Product

TILES = (512, 256, 128)  # rows of a tile
WASTE = 0.25  # share of the rows that may be padding before smaller tiles are chosen


class Layout(NamedTuple):
    """Where every pair lies in a buffer of R rows."""

    sizes: Array  # i32[E], rows of each expert, padding included: multiples of the tile
    source: Array  # i32[R], pair in a row; T * K: none
    place: Array  # i32[T * K], row of a pair; R: none


def tile_rows(pairs: int, n_experts: int) -> int:
    """Rows of a tile for so many (token, expert) pairs."""
    fits = (size for size in TILES if n_experts * size <= WASTE * pairs)
    return next(fits, TILES[-1])


def layout(choice: Array, n_experts: int, tile: int) -> Layout:
    """Lays pairs out by expert.

    Args:
      choice: i32[P], the expert of each pair; E stands for none.
      n_experts: E.
      tile: rows of a tile.
    """
    pairs = len(choice)
    # Every expert may leave all but one row of its last tile empty.
    rows = (pairs + n_experts * (tile - 1)) // tile * tile
    hot = choice[:, None] == jnp.arange(n_experts)[None]
    before = jnp.cumsum(hot, axis=0, dtype=jnp.int32)
    counts = before[-1]
    sizes = -(-counts // tile) * tile
    starts = jnp.cumsum(sizes) - sizes
    place = jnp.where(hot, starts[None] + before - 1, 0).sum(-1)
    place = jnp.where(hot.any(-1), place, rows)
    source = jnp.full(rows, pairs, jnp.int32).at[place].set(jnp.arange(pairs), mode="drop")
    return Layout(sizes, source, place)


@jax.custom_vjp
def _take(a: Array, index: Array, back: Array) -> Array:
    """Rows a[index], zeros where the index is len(a).

    `back` i32[len(a), J] says where each row of `a` went (len(index): nowhere), so that the
    derivative is a gather as well: a scatter is slow on both platforms.
    """
    return a.at[index].get(mode="fill", fill_value=0)


def _take_forward(a: Array, index: Array, back: Array) -> tuple[Array, Array]:
    return _take(a, index, back), back


def _take_backward(back: Array, dy: Array) -> tuple[Array, None, None]:
    return dy.at[back].get(mode="fill", fill_value=0).sum(1), None, None


_take.defvjp(_take_forward, _take_backward)


def tiled(
    p: Params,
    x: Array,
    choice: Array,
    weight: Array,
    n_experts: int,
    product: Product,
    tile: int = 0,
) -> Array:
    """The expert sum with grouped matrix products. Arguments and result as in
    `experts.reference`; `p` is stacked, its kernels may be lists of E arrays. `tile`: rows of a
    tile; 0 = `tile_rows`."""
    b, t, d = x.shape
    k = choice.shape[-1]
    tile = tile or tile_rows(b * t * k, n_experts)
    where = layout(choice.reshape(-1), n_experts, tile)
    pairs = where.place.reshape(-1, k)
    # The token of pair n is n // k; that of the pair "none" is one behind the last.
    rows = _take(x.reshape(-1, d), where.source // k, pairs)
    share = _take(weight.astype(x.dtype).reshape(-1, 1), where.source, where.place[:, None])
    y = _mlp(p, rows, share, where.sizes, tile, product)
    return _take(y, where.place, where.source[:, None]).reshape(b, t, k, d).sum(-2)


def _hidden(share: Array, *before: Array) -> Array:
    """share [R, 1] times the hidden layer of an FFN: of GELU's argument, or of SwiGLU's two."""
    if len(before) == 2:
        return share * (jax.nn.silu(before[0]) * before[1])
    return share * jax.nn.gelu(*before, approximate=True)


@jax.custom_vjp
def _thrifty_hidden(share: Array, *before: Array) -> Array:
    """`_hidden`, its derivatives in an order in which those by `before` can take the place of the
    one that is given."""
    return _hidden(share, *before)


def _hidden_forward(share: Array, *before: Array) -> tuple[Array, tuple[Array, ...]]:
    return _hidden(share, *before), (share, *before)


def _hidden_backward(kept: tuple[Array, ...], dy: Array) -> tuple[Array, ...]:
    share, *before = kept
    dshare = (dy * _hidden(jnp.ones_like(share), *before)).sum(-1, keepdims=True)
    dy, dshare = jax.lax.optimization_barrier((dy, dshare))
    _, pull = jax.vjp(lambda *before: _hidden(share, *before), *before)
    return dshare, *pull(dy)


_thrifty_hidden.defvjp(_hidden_forward, _hidden_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _quantized(kernel: Any, rows: Array, sizes: Array, tile: int, product: Product) -> Array:
    """The product with quantized kernels: those of one layer are floats while it is computed, and
    again in the backward pass, which keeps them as they are."""
    # Floats of this layer, now, and not of all layers in front of the loop over them.
    kernel, rows = jax.lax.optimization_barrier((kernel, rows))
    w = layers.cast(quantized.dequantize(kernel), rows.dtype)
    return product(rows, w, sizes, tile=tile)


def _quantized_forward(
    kernel: Any, rows: Array, sizes: Array, tile: int, product: Product
) -> tuple[Array, tuple[Any, Array]]:
    return _quantized(kernel, rows, sizes, tile, product), (kernel, sizes)


def _quantized_backward(
    tile: int, product: Product, kept: tuple[Any, Array], dy: Array
) -> tuple[None, Array, None]:
    (kernel, sizes), dy = jax.lax.optimization_barrier((kept, dy))
    w = layers.cast(quantized.dequantize(kernel), dy.dtype)
    # A linear function of the rows: any will do.
    rows = jnp.zeros((len(dy), w.shape[-2]), dy.dtype)
    _, pull = jax.vjp(lambda rows: product(rows, w, sizes, tile=tile), rows)
    return None, *pull(dy), None


_quantized.defvjp(_quantized_forward, _quantized_backward)


def _mlp(p: Params, rows: Array, share: Array, sizes: Array, tile: int, product: Product) -> Array:
    """share [R, 1] times `layers.mlp` of each row with the parameters of its expert.

    The share enters in front of the last product: the backward pass then needs nothing of what is
    behind it, so with rematerialisation that product is not done again.
    """
    ends = jnp.cumsum(sizes)[None]
    number = jnp.arange(len(rows))[:, None]
    owner = ((number >= ends - sizes[None]) & (number < ends)).astype(rows.dtype)  # [R, E], 0 or 1

    def grouped(rows: Array, kernels: Kernels) -> Array:
        return product(rows, kernels, sizes, tile=tile)

    def times(p: Params, rows: Array) -> Array:
        kernel = p["kernel"]
        y: Array
        if quantized.is_quantized(kernel):
            y = _quantized(kernel, quantized.filled(kernel, rows), sizes, tile, product)
        elif isinstance(kernel, list):
            y = grouped(rows, [layers.cast(each, rows.dtype) for each in kernel])
        else:
            y = grouped(rows, layers.cast(kernel, rows.dtype))
        return y + layers.low_rank(p, rows, grouped) if "lora_a" in p else y

    def plus(bias: Array | None, y: Array, owner: Array) -> Array:
        # A product, because the derivative of a gather of biases is a scatter.
        if bias is None:
            return y
        return y + jnp.matmul(owner, bias.astype(y.dtype), precision="highest")

    # Numbers of 16 bits are those of accelerators, where memory is what there is too little of.
    thrifty = rows.dtype != jnp.float32

    def rest(p: Params, biases: list[Array | None], *before: Array) -> Array:
        before = tuple(plus(b, y, owner) for b, y in zip(biases, before, strict=True))
        hidden = (_thrifty_hidden if thrifty else _hidden)(share, *before)
        return plus(p.get("bias"), times(p, hidden), share * owner)

    if thrifty:  # the backward pass computes the hidden layer again
        rest = jax.checkpoint(rest)
    first, last = (("gate", "up"), "down") if "gate" in p else (("fc1",), "fc2")
    before = [checkpoint_name(times(p[k], rows), layers.EXPERTS) for k in first]
    y = rest(p[last], [p[k].get("bias") for k in first], *before)
    return checkpoint_name(y, layers.EXPERTS)
