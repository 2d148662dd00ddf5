"""Pure functions shared by the vision tower and the decoder, and the axis legend of the models.

Axes: B batch, T sequence (queries), S keys, I image tokens, D width, N heads, K key/value heads, H
head dimension, F FFN width, E experts, V vocabulary, L layers.

Parameters are plain dicts. A module's parameters are described once, by a nested dict of `Leaf`;
the Flax modules hold them and call these functions. Weights are cast to the dtype of the
activations where they are used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from medmoe_jax import sharding
from medmoe_jax.models import one_row, quantized

Array = jax.Array
Params = dict[str, Any]


@dataclass(frozen=True)
class Leaf:
    """One parameter: its shape and the standard deviation it starts with (`const` for a
    constant).
    """

    shape: tuple[int, ...]
    std: float = 0.02
    const: float | None = None

    def initialise(self, key: Array) -> Array:
        """f32 array of `shape`."""
        if self.const is not None:
            return jnp.full(self.shape, self.const, jnp.float32)
        return self.std * jax.random.normal(key, self.shape, jnp.float32)


def initialise(key: Array, leaves: Any) -> Any:
    """Arrays (f32) for a nested dict of `Leaf`; every parameter gets a random key of its own."""
    flat, treedef = jax.tree.flatten(leaves, is_leaf=lambda x: isinstance(x, Leaf))
    keys = jax.random.split(key, len(flat))
    return jax.tree.unflatten(
        treedef, [leaf.initialise(k) for leaf, k in zip(flat, keys, strict=True)]
    )


def norm_leaves(width: int, stack: tuple[int, ...] = ()) -> dict[str, Leaf]:
    """Parameters of a layer norm over `width`, stacked along the leading axes `stack`."""
    return {"scale": Leaf((*stack, width), const=1.0), "bias": Leaf((*stack, width), const=0.0)}


def linear_leaves(
    d_in: int, d_out: int, *, bias: bool, stack: tuple[int, ...] = (), std: float = 0.02
) -> dict[str, Leaf]:
    """Parameters of a linear layer: kernel [*stack, d_in, d_out] and, if `bias`, bias [*stack,
    d_out].
    """
    leaves = {"kernel": Leaf((*stack, d_in, d_out), std=std)}
    if bias:
        leaves["bias"] = Leaf((*stack, d_out), const=0.0)
    return leaves


class Master(NamedTuple):
    """A kernel that trains in float32 and is used in 16 bits, for `cast`.

    Its gradient comes in 16 bits, in which it is computed anyway; in float32 the gradients of all
    layers would take twice the memory. So `shadow` is what a derivative is taken by: what has the
    gradient of the weight in the dtype that it is used in.
    """

    weight: Array  # f32[...]
    shadow: Array  # of the same shape; its numbers are never read


def cast(kernel: Any, dtype: Any) -> Any:
    """A kernel in `dtype`, or a quantized one as it is; for weights in a scan over layers.

    XLA moves a plain conversion of a slice in front of the loop, and then holds all layers in 16
    bits beside the float32 weights. It does not do so if they are rounded first, which changes
    neither the result nor the derivative.
    """
    if isinstance(kernel, (quantized.Int8, quantized.Int4)):
        return kernel
    if isinstance(kernel, Master):
        return _of_shadow(*kernel)
    if kernel.dtype == jnp.float32 and dtype == jnp.bfloat16:
        return _rounded(kernel)
    return kernel.astype(dtype)


@jax.custom_jvp
def _rounded(a: Array) -> Array:
    return jax.lax.reduce_precision(a, exponent_bits=8, mantissa_bits=7).astype(jnp.bfloat16)


@_rounded.defjvp
def _rounded_jvp(given: tuple[Array], change: tuple[Array]) -> tuple[Array, Array]:
    return _rounded(*given), change[0].astype(jnp.bfloat16)


@jax.custom_jvp
def _of_shadow(weight: Array, shadow: Array) -> Array:
    return _rounded(weight)


@_of_shadow.defjvp
def _of_shadow_jvp(given: tuple[Array, Array], change: tuple[Array, Array]) -> tuple[Array, Array]:
    return _rounded(given[0]), change[1]


def linear(p: Params, x: Array) -> Array:
    """x [..., d_in] -> [..., d_out] in the dtype of x; the kernel may be quantized, and have an
    adapter beside it."""
    kernel, x = p["kernel"], sharding.rows_of_gradient(x)
    if quantized.is_quantized(kernel):
        y = quantized.product(kernel, x)
    else:
        # In 32 bits, those of a CPU, as a matrix: with more axes XLA transposes there what the
        # kernel's gradient is made of, and computes it again for that.
        rows = x.reshape(-1, x.shape[-1]) if x.dtype == jnp.float32 else x
        y = one_row.product(jnp.matmul, rows, cast(kernel, x.dtype))
        y = y.reshape(*x.shape[:-1], y.shape[-1])
    if "lora_a" in p:
        y += low_rank(p, x, jnp.matmul)
    if "bias" not in p:
        return y
    bias = p["bias"].astype(x.dtype)
    return y + bias.reshape((1,) * (y.ndim - 1) + bias.shape)


def low_rank(p: Params, x: Array, product: Callable[[Array, Array], Array]) -> Array:
    """What an adapter adds to a linear layer: dropout(x) A B.

    Args:
      p: `lora_a` [*stack, d_in, r], `lora_b` [*stack, r, d_out] (scaled, see `lora.active`), and in
        training `dropout` f32[*stack, 2]: the share to drop, and a seed.
      x: [..., d_in].
      product: of rows and a (stack of) matrices.
    """
    if "dropout" in p:
        rate, seed = p["dropout"].reshape(-1, 2)[0]
        kept = _hashed(seed, x.shape) >= rate
        x = jnp.where(kept, x / (1 - rate).astype(x.dtype), 0)
    return product(product(x, p["lora_a"].astype(x.dtype)), p["lora_b"].astype(x.dtype))


def _hashed(seed: Array, shape: tuple[int, ...]) -> Array:
    """f32 numbers in [0, 1) that look random: a hash of each place and the seed.

    `jax.random` would do, but takes minutes to compile in the many branches of `grouped`.

    Source: the function lowbias32 of https://github.com/skeeto/hash-prospector.
    """

    def mixed(h: Array) -> Array:
        h = (h ^ (h >> 16)) * jnp.uint32(0x7FEB352D)
        h = (h ^ (h >> 15)) * jnp.uint32(0x846CA68B)
        return h ^ (h >> 16)

    place = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    h = mixed(mixed(place) + seed.astype(jnp.uint32))
    return (h >> 8).astype(jnp.float32) * jnp.float32(2**-24)  # 24 bits: exact, and below one


def layer_norm(p: Params, x: Array, eps: float) -> Array:
    """Layer norm over the last axis, statistics in float32, result in the dtype of x."""
    x32 = x.astype(jnp.float32)
    mean = x32.mean(-1, keepdims=True)
    var = jnp.square(x32 - mean).mean(-1, keepdims=True)
    shape = (1,) * (x.ndim - 1) + (x.shape[-1],)
    scale = p["scale"].astype(jnp.float32).reshape(shape)
    bias = p["bias"].astype(jnp.float32).reshape(shape)
    return ((x32 - mean) * jax.lax.rsqrt(var + eps) * scale + bias).astype(x.dtype)


def quick_gelu(x: Array) -> Array:
    """x * sigmoid(1.702 x), CLIP's activation."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: Array) -> Array:
    """Exact (erf) GELU."""
    return jax.nn.gelu(x, approximate=False)


def mlp_leaves(
    family: str, width: int, ffn: int, stack: tuple[int, ...] = ()
) -> dict[str, dict[str, Leaf]]:
    """Parameters of a feed-forward network: phi fc1, fc2 with biases; stablelm gate, up, down
    without.
    """
    if family == "phi":
        return {
            "fc1": linear_leaves(width, ffn, bias=True, stack=stack),
            "fc2": linear_leaves(ffn, width, bias=True, stack=stack),
        }
    return {
        "gate": linear_leaves(width, ffn, bias=False, stack=stack),
        "up": linear_leaves(width, ffn, bias=False, stack=stack),
        "down": linear_leaves(ffn, width, bias=False, stack=stack),
    }


def mlp(p: Params, x: Array) -> Array:
    """Feed-forward network: fc2(gelu_tanh(fc1 x)), or with `gate`, down(silu(gate x) * up x).

    x [..., D].
    """
    if "gate" in p:
        return linear(p["down"], jax.nn.silu(linear(p["gate"], x)) * linear(p["up"], x))
    return linear(p["fc2"], jax.nn.gelu(linear(p["fc1"], x), approximate=True))


def rope(x: Array, positions: Array, rotary_dim: int, theta: float) -> Array:
    """Rotary embedding on the first `rotary_dim` dimensions of each head, halves rotated (NeoX
    style).

    Args:
      x: [B, T, N, H].
      positions: i32[B, T].
      rotary_dim: even number of leading dimensions that rotate; the rest passes.
      theta: base of the frequencies.

    Returns:
      [B, T, N, H] in the dtype of x; angles are computed in float32.
    """
    half = rotary_dim // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency[None, None, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = x[..., :half].astype(jnp.float32), x[..., half:rotary_dim].astype(jnp.float32)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    return jnp.concatenate([rotated.astype(x.dtype), x[..., rotary_dim:]], -1)


# Names of what `remat` may keep: products with experts' weights, and what attention computes.
EXPERTS, ATTENTION = "experts", "attention"
REMAT = ("none", "dots", "experts", "attention", "full")  # policies, see `remat`
CUDNN = "dot_product_attention_fwd_wrapper"  # JAX's primitive, whose results bear no such name


def remat(body: Callable, policy: str) -> Callable:
    """`body` with its intermediates recomputed in the backward pass.

    Args:
      body: a function for `jax.lax.scan`.
      policy: `none` keeps everything, `dots` products with weights and what attention gives,
        `experts` products with experts' weights only, `attention` what attention gives alone,
        `full` nothing.

    Raises:
      ValueError: unknown policy.
    """
    policies = jax.checkpoint_policies
    either, names = policies.save_from_both_policies, policies.save_only_these_names
    experts = names(EXPERTS)
    attention = either(names(ATTENTION), lambda primitive, *_, **__: primitive.name == CUDNN)
    # Kernels and loops hide the experts' products from the policy for products.
    products = either(policies.checkpoint_dots_with_no_batch_dims, experts)
    kept = {
        "full": None,
        "attention": attention,
        "experts": experts,
        "dots": either(products, attention),
    }
    if policy == "none":
        return body
    if policy not in kept:
        raise ValueError(
            f"remat {policy!r} is unknown; use 'none', 'dots', 'experts', 'attention' or 'full'"
        )
    return jax.checkpoint(body, prevent_cse=False, policy=kept[policy])
