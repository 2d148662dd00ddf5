"""Routing that does not look at the modality, and the experts of modalities."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models

from medmoe_jax import losses
from medmoe_jax.config import ConfigError, MoeConfig
from medmoe_jax.models import experts, layers, moe

pytestmark = pytest.mark.usefixtures("quick_compile")
LLM = small_models.config("phi", MoeConfig()).llm
ALL_TOKENS = np.ones((4, 50), bool)


def routed(how: str, top_k: int, x: np.ndarray) -> tuple[moe.Routing, moe.Routing]:
    """What the router says, and what becomes of it."""
    logits = jax.random.normal(jax.random.key(1), (*x.shape[:2], 4))
    before = moe.route(logits, top_k, jnp.asarray(ALL_TOKENS))
    return before, moe.reassigned(before, jnp.asarray(x), how)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((4, 50, LLM.width)).astype(np.float32)


@pytest.mark.parametrize("top_k", [1, 2])
def test_random_routing_keeps_the_weights(top_k: int, tokens: np.ndarray):
    before, after = routed("random", top_k, tokens)
    np.testing.assert_array_equal(after.weight, before.weight)
    assert after.choice.shape == before.choice.shape
    counts = np.bincount(np.asarray(after.choice).reshape(-1), minlength=4)
    assert counts.min() > 0.15 * counts.sum()  # every expert about as often
    agree = float(np.mean(after.choice[..., 0] == before.choice[..., 0]))
    assert agree < 0.4  # chance is 0.25
    if top_k == 2:
        assert np.all(after.choice[..., 0] != after.choice[..., 1])
        pairs = np.asarray(after.choice)
        step = (pairs[..., 1] - pairs[..., 0]) % 4
        assert np.bincount(step.reshape(-1), minlength=4)[1:].min() > 0.2 * step.size


def test_random_routing_is_fixed_for_a_token(tokens: np.ndarray):
    _, whole = routed("random", 1, tokens)
    logits = jax.random.normal(jax.random.key(2), (4, 10, 4))
    part = moe.route(logits, 1, jnp.ones((4, 10), bool))
    again = moe.reassigned(part, jnp.asarray(tokens[:, 20:30] * (1 + 1e-6)), "random")
    assert np.mean(again.choice == whole.choice[:, 20:30]) > 0.97


@pytest.mark.parametrize("top_k", [1, 2])
def test_uniform_routing_is_the_mean_of_the_experts(top_k: int, tokens: np.ndarray):
    cfg = MoeConfig(top_k=top_k, routing="uniform", meta=False)
    p = small_models.fill(
        jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32),
            moe.leaves(LLM, cfg, ()),
            is_leaf=lambda leaf: isinstance(leaf, layers.Leaf),
        )
    )
    y, routing = moe.moe_layer(p, cfg, jnp.asarray(tokens), jnp.asarray(ALL_TOKENS))
    each = [layers.mlp(experts.expert(p["experts"], e), jnp.asarray(tokens)) for e in range(4)]
    plain = moe.route(
        moe.router_logits(p["router"], jnp.asarray(tokens)), top_k, jnp.asarray(ALL_TOKENS)
    )
    wanted = plain.weight.sum(-1)[..., None] * sum(each) / 4
    np.testing.assert_allclose(y, wanted, atol=1e-5)
    assert routing.choice.shape[-1] == cfg.active == 4
    assert MoeConfig(top_k=top_k).active == top_k


def test_the_router_decides_by_default(tokens: np.ndarray):
    before, after = routed("router", 2, tokens)
    assert after is before
    with pytest.raises(ConfigError, match=r"moe\.routing 'fair' is unknown"):
        MoeConfig(routing="fair").validate(4)


def test_modalities_share_experts_where_these_are_fewer():
    labels = jnp.array([[-1, 0, 1], [2, 3, -1]])
    np.testing.assert_array_equal(losses.expert_of(labels, 2), [[-1, 0, 1], [0, 1, -1]])
    np.testing.assert_array_equal(losses.expert_of(labels, 6), labels)
