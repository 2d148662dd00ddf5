"""Mixture of domain experts with a frozen router and a meta expert that is always on. Next stop:
`optim.py`.

    out = sum_k w_k expert_k(x) + meta(x)                                   (paper equation 4)

The router is a small network in float32 that reads each token. Top-1 weighs its expert by the raw
softmax probability; top-2 renormalises the two probabilities. No token is ever dropped.

Source: official `TopKGate`, `top1gating`, `top2gating` and `MoE.forward`. Deliberate differences:
dropless for any number of experts (the official top-2 can drop tokens above 8 experts), no noise at
inference, and padding does not count in the load-balancing loss unless asked for.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from medmoe_jax.config import LlmConfig, MoeConfig
from medmoe_jax.models import experts, layers
from medmoe_jax.models.layers import Array, Leaf, Params

HASHED, HASHED_STEPS = 8, 4.0  # leading dimensions of a token that are hashed, and steps of a unit


class Routing(NamedTuple):
    """What the router decided for every token."""

    logits: Array  # f32[B, T, E]
    choice: Array  # i32[B, T, K], first choice first; K = top_k (all experts if uniform)
    weight: Array  # f32[B, T, K]
    aux: Array  # f32[], load-balancing loss of the layer, without its coefficient


def router_leaves(
    width: int, n_experts: int, depth: int, stack: tuple[int, ...] = ()
) -> dict[str, dict[str, Leaf]]:
    """Parameters fc1 .. fcDEPTH of a router: hidden layers keep `width`."""
    outs = [width] * (depth - 1) + [n_experts]
    return {
        f"fc{i}": layers.linear_leaves(width, out, bias=True, stack=stack, std=width**-0.5)
        for i, out in enumerate(outs, start=1)
    }


def leaves(llm: LlmConfig, moe: MoeConfig, stack: tuple[int, ...]) -> dict[str, Any]:
    """Parameters of MoE layers, stacked along the leading axes `stack` (then E for the experts)."""
    tree: dict[str, Any] = {
        "router": router_leaves(llm.width, moe.experts, moe.router_layers, stack),
        "experts": layers.mlp_leaves(llm.family, llm.width, llm.ffn, (*stack, moe.experts)),
    }
    if moe.meta:
        tree["meta"] = layers.mlp_leaves(llm.family, llm.width, llm.ffn, stack)
    if moe.use_residual:
        tree["coefficient"] = layers.linear_leaves(llm.width, 2, bias=True, stack=stack)
    return tree


def router_logits(p: Params, x: Array) -> Array:
    """Scores of the experts, in float32 with bias; GELU between layers where there are several.

    Args:
      p: fc1 (, fc2, fc3), each kernel and bias.
      x: [..., D], any float dtype.

    Returns:
      f32[..., E].
    """
    p32 = jax.tree.map(lambda a: a.astype(jnp.float32), p)
    # Products of float32 are rounded to 8 bits on a TPU and to 11 on a GPU unless this is said.
    with jax.default_matmul_precision("highest"):
        x = layers.linear(p32["fc1"], x.astype(jnp.float32))
        for i in range(2, len(p32) + 1):
            x = layers.linear(p32[f"fc{i}"], layers.gelu(x))
    return x


def route(logits: Array, top_k: int, counted: Array, noise_key: Array | None = None) -> Routing:
    """Chooses experts and weights.

    Args:
      logits: f32[B, T, E].
      top_k: 1 or 2.
      counted: bool[B, T], tokens that count in the load-balancing loss.
      noise_key: with top-2, Gumbel noise is added to the scores of the second choice (official
        training).

    Returns:
      Routing; ties go to the lower index. The loss is E * sum_e mean(prob_e) * mean(first choice is
      e).
    """
    n_experts = logits.shape[-1]
    probs = jax.nn.softmax(logits, axis=-1)
    first = jnp.argmax(logits, axis=-1)
    first_hot = jax.nn.one_hot(first, n_experts, dtype=jnp.float32)
    p1 = jnp.take_along_axis(probs, first[..., None], -1)
    if top_k == 1:
        choice, weight = first[..., None], p1
    else:
        scores = (
            logits if noise_key is None else logits + jax.random.gumbel(noise_key, logits.shape)
        )
        second = jnp.argmax(jnp.where(first_hot > 0, -jnp.inf, scores), axis=-1)
        p2 = jnp.take_along_axis(probs, second[..., None], -1)
        choice = jnp.stack([first, second], -1)
        weight = jnp.concatenate([p1, p2], -1)
        weight = weight / jnp.maximum(p1 + p2, jnp.finfo(jnp.float32).eps)
    share = counted.astype(jnp.float32)[..., None]
    total = jnp.maximum(share.sum(), 1.0)
    aux = (
        n_experts
        * jnp.sum((probs * share).sum((0, 1)) * (first_hot * share).sum((0, 1)))
        / total**2
    )
    return Routing(logits, choice, weight, aux)


def reassigned(routing: Routing, x: Array, how: str) -> Routing:
    """Routing that does not look at the modality: what the router's choice is held against.

    The router's weights keep their sum, so that the routed part is as large as it was; only who
    works changes.

    Args:
      routing: what the router decided.
      x: [B, T, D], the tokens.
      how: router changes nothing. random gives a token to experts that a hash of its hidden state
        names: fixed for one token, the same for each expert, without meaning. uniform lets all
        experts work with equal weights.

    Source: the hash is after Roller et al. 2021, "Hash layers for large sparse models"; there
      words are hashed, here hidden states, coarsely, so that rounding does not matter.
    """
    if how == "router":
        return routing
    n_experts = routing.logits.shape[-1]
    if how == "uniform":
        every = jnp.broadcast_to(jnp.arange(n_experts), routing.logits.shape)
        share = routing.weight.sum(-1, keepdims=True) / n_experts
        return routing._replace(choice=every, weight=jnp.broadcast_to(share, every.shape))
    coarse = jnp.floor(HASHED_STEPS * x[..., :HASHED].astype(jnp.float32)).astype(jnp.int32)
    word = jnp.zeros(x.shape[:-1], jnp.uint32)
    for i in range(coarse.shape[-1]):
        word = (word ^ coarse[..., i].astype(jnp.uint32)) * jnp.uint32(0x9E3779B1)
        word = word ^ (word >> 15)
    first = word % n_experts
    # The second of two is one of the others, each as often.
    second = (first + 1 + (word // n_experts) % (n_experts - 1)) % n_experts
    chosen = jnp.stack([first, second], -1)[..., : routing.choice.shape[-1]]
    return routing._replace(choice=chosen.astype(routing.choice.dtype))


def combine_weights(routing: Routing) -> Array:
    """f32[B, T, E]: weight of each expert's output, zero where not chosen."""
    hot = jax.nn.one_hot(routing.choice, routing.logits.shape[-1], dtype=jnp.float32)
    return (hot * routing.weight[..., None]).sum(-2)


def moe_layer(
    p: Params,
    cfg: MoeConfig,
    x: Array,
    counted: Array,
    noise_key: Array | None = None,
) -> tuple[Array, Routing]:
    """The feed-forward part of a MoE layer.

    Args:
      p: one layer's `router`, `experts`, `meta` and, with use_residual, `coefficient`.
      cfg: top_k, routing, meta, use_residual.
      x: [B, T, D], input of the FFN.
      counted: bool[B, T], see `route`.
      noise_key: see `route`.

    Returns:
      [B, T, D] in the dtype of x, and the routing.
    """
    chex.assert_equal_shape_prefix([x, counted], 2)
    with jax.named_scope("moe"):
        routing = route(router_logits(p["router"], x), cfg.top_k, counted, noise_key)
        routing = reassigned(routing, x, cfg.routing)
        y = experts.mixture(
            p["experts"], x, routing.choice, routing.weight, routing.logits.shape[-1]
        )
        if not cfg.meta:
            return y, routing
        meta = _meta(p["meta"], x)
        if cfg.use_residual:
            # The official "residual MLP" shares its parameters with the meta expert, which is added
            # once more.
            mix = jax.nn.softmax(layers.linear(p["coefficient"], x), axis=-1)
            y = y * mix[..., :1] + meta * mix[..., 1:]
        return y + meta, routing


def _meta(p: Params, x: Array) -> Array:
    """The meta expert. In 16 bits, as on accelerators, its hidden layer is computed again in the
    backward pass."""
    if x.dtype == jnp.float32:
        return layers.mlp(p, x)
    save = jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims
    return jax.checkpoint(layers.mlp, policy=save)(p, x)


class MoeLayer(nn.Module):
    """Holds one MoE layer's parameters; `moe_layer` is the mathematics."""

    llm: LlmConfig
    cfg: MoeConfig

    @nn.compact
    def tree(self) -> Params:
        """The parameters of one layer as a nested dict."""
        return {
            k: self.param(k, layers.initialise, v)
            for k, v in leaves(self.llm, self.cfg, ()).items()
        }

    def __call__(self, x: Array, counted: Array) -> tuple[Array, Routing]:
        """[B, T, D], bool[B, T] -> [B, T, D] and the routing."""
        return moe_layer(self.tree(), self.cfg, x, counted)
