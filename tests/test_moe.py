"""The MoE layer against the equation written out token by token, and against real routers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models
from safetensors.numpy import load_file

from medmoe_jax.config import ConfigError, LlmConfig, MoeConfig
from medmoe_jax.convert import read_router
from medmoe_jax.models import moe

pytestmark = pytest.mark.usefixtures("quick_compile")

WIDTH, FFN, TOKENS = 8, 12, 5
CASES = {
    "top-1, meta": ("phi", MoeConfig(experts=4)),
    "top-1, no meta, two experts": ("stablelm", MoeConfig(experts=2, meta=False)),
    "top-1, residual, five experts": ("stablelm", MoeConfig(experts=5, use_residual=True)),
    "top-2, meta, two experts": ("phi", MoeConfig(experts=2, top_k=2)),
    "top-2, residual": ("phi", MoeConfig(experts=3, top_k=2, use_residual=True)),
    "top-2, no meta, deep router": ("phi", MoeConfig(3, 2, meta=False, router_layers=2)),
    "top-2, nine experts, deeper router": ("stablelm", MoeConfig(9, 2, router_layers=3)),
}


def layer_params(family: str, cfg: MoeConfig) -> Any:
    llm = LlmConfig(family=family, width=WIDTH, ffn=FFN, heads=1, kv_heads=1)
    return small_models.fill(moe.leaves(llm, cfg, ()), seed=cfg.experts)


def erf_gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def ffn(p: Any, x: Any) -> Any:
    """One feed-forward network on one token, from its formula."""
    if "gate" in p:
        gate = x @ p["gate"]["kernel"]
        return (gate / (1 + jnp.exp(-gate)) * (x @ p["up"]["kernel"])) @ p["down"]["kernel"]
    h = x @ p["fc1"]["kernel"] + p["fc1"]["bias"]
    h = h / 2 * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    return h @ p["fc2"]["kernel"] + p["fc2"]["bias"]


def chosen(p: Any, cfg: MoeConfig, x: np.ndarray) -> list[int]:
    """The experts of one token, best first, in float64."""
    for i in range(1, cfg.router_layers + 1):
        x = erf_gelu(x) if i > 1 else x
        x = x @ np.float64(p[f"fc{i}"]["kernel"]) + p[f"fc{i}"]["bias"]
    return np.argsort(-x)[: cfg.top_k].tolist()


def slow_layer(p: Any, cfg: MoeConfig, x: Any, choices: list[list[int]]) -> Any:
    """Paper equation 4, one token after the other."""
    out = []
    for token, experts in zip(x, choices, strict=True):
        scores = token
        for i in range(1, cfg.router_layers + 1):
            scores = jax.nn.gelu(scores, approximate=False) if i > 1 else scores
            scores = scores @ p["router"][f"fc{i}"]["kernel"] + p["router"][f"fc{i}"]["bias"]
        share = jnp.exp(scores) / jnp.exp(scores).sum()
        total = sum(share[e] for e in experts) if cfg.top_k == 2 else 1.0
        y = jnp.zeros(WIDTH)
        for e in experts:
            y += share[e] / total * ffn(jax.tree.map(lambda a, e=e: a[e], p["experts"]), token)
        if cfg.meta:
            meta = ffn(p["meta"], token)
            if cfg.use_residual:
                two = jnp.exp(token @ p["coefficient"]["kernel"] + p["coefficient"]["bias"])
                y = y * two[0] / two.sum() + meta * two[1] / two.sum()
            y += meta
        out.append(y)
    return jnp.stack(out)


@pytest.mark.parametrize("name", CASES)
def test_layer_is_the_equation(name: str) -> None:
    """Output, and gradients in input and all parameters, router included."""
    family, cfg = CASES[name]
    p = layer_params(family, cfg)
    x = np.random.default_rng(1).standard_normal((TOKENS, WIDTH)).astype(np.float32)
    choices = [chosen(p["router"], cfg, np.float64(token)) for token in x]
    weights = np.random.default_rng(2).standard_normal((TOKENS, WIDTH)).astype(np.float32)

    @jax.jit
    def fast(p: Any, x: Any) -> Any:
        y, routing = moe.moe_layer(p, cfg, x[None], jnp.ones((1, TOKENS), bool))
        return (y[0] * weights).sum(), (y[0], routing)

    @jax.jit
    def slow(p: Any, x: Any) -> Any:
        y = slow_layer(p, cfg, x, choices)
        return (y * weights).sum(), y

    (_, (y, routing)), gradient = jax.value_and_grad(fast, (0, 1), has_aux=True)(p, x)
    (_, want), wanted = jax.value_and_grad(slow, (0, 1), has_aux=True)(p, x)
    assert routing.choice[0].tolist() == choices
    np.testing.assert_allclose(y, want, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-5), gradient, wanted)
    assert np.abs(gradient[0]["router"]["fc1"]["kernel"]).max() > 1e-3 or cfg.experts == 2
    unused = set(range(cfg.experts)) - {e for experts in choices for e in experts}
    for leaf in jax.tree.leaves(gradient[0]["experts"]):
        assert all(not np.any(leaf[e]) for e in unused)


def routed(logits: list[list[float]], top_k: int, key: Any = None) -> moe.Routing:
    """Routing of the tokens of one row that all count."""
    array = jnp.asarray(logits)[None]
    return moe.route(array, top_k, jnp.ones(array.shape[:2], bool), key)


def test_weights() -> None:
    logits = np.log([[0.1, 0.6, 0.3], [0.5, 0.2, 0.3]]).tolist()
    one = routed(logits, 1)
    np.testing.assert_allclose(one.weight[0], [[0.6], [0.5]], rtol=1e-6)
    assert one.choice[0].tolist() == [[1], [0]]
    two = routed(logits, 2)
    np.testing.assert_allclose(two.weight[0], [[6 / 9, 3 / 9], [5 / 8, 3 / 8]], rtol=1e-6)
    assert two.choice[0].tolist() == [[1, 2], [0, 2]]
    np.testing.assert_allclose(
        moe.combine_weights(two)[0], [[0, 6 / 9, 3 / 9], [5 / 8, 0, 3 / 8]], rtol=1e-6
    )


def test_ties_go_to_the_lower_index() -> None:
    logits = [[0.0, 0.0, 0.0], [-1.0, 2.0, 2.0], [2.0, -1.0, 2.0]]
    assert routed(logits, 1).choice[0, :, 0].tolist() == [0, 1, 0]
    assert routed(logits, 2).choice[0].tolist() == [[0, 1], [1, 2], [0, 2]]


def test_extreme_scores_stay_finite() -> None:
    """One expert with all the probability: its weight is one, the other's zero."""
    for top_k in (1, 2):
        routing = routed([[300.0, -300.0, -301.0]], top_k)
        assert routing.weight[0, 0].tolist() == [1.0, 0.0][:top_k]
        assert np.isfinite(routing.aux)


def test_noise_moves_the_second_choice_only() -> None:
    """Gumbel noise draws the second expert from the softmax of what is left."""
    tokens = 4000
    logits = jnp.log(jnp.asarray([0.5, 0.3, 0.15, 0.05]))
    rows = jnp.broadcast_to(logits, (tokens, 4)).tolist()
    key = jax.random.key(0)
    noisy = routed(rows, 2, key)
    assert not noisy.choice[0, :, 0].any()
    frequency = np.bincount(noisy.choice[0, :, 1], minlength=4) / tokens
    np.testing.assert_allclose(frequency, [0, 0.6, 0.3, 0.1], atol=0.03)
    share = np.array([0.5, 0.3, 0.15, 0.05])[np.asarray(noisy.choice[0])]
    np.testing.assert_allclose(noisy.weight[0], share / share.sum(1, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(noisy.aux, routed(rows, 2).aux, rtol=1e-6)
    assert (routed(rows, 2).choice[0] == jnp.array([0, 1])).all()
    one, other = routed(rows, 1, key), routed(rows, 1)
    assert (one.choice == other.choice).all() and (one.weight == other.weight).all()
    assert MoeConfig().noise is False


def test_load_balancing_loss() -> None:
    """E * sum_e mean(probability of e) * mean(e is the first choice), padding left out or not."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((2, 6, 3)).astype(np.float32)
    counted = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]], bool)

    def expected(rows: np.ndarray) -> float:
        share = np.exp(rows) / np.exp(rows).sum(-1, keepdims=True)
        first = np.eye(3)[rows.argmax(-1)]
        return 3 * float((share.mean(0) * first.mean(0)).sum())

    for top_k in (1, 2):
        some = moe.route(jnp.asarray(logits), top_k, jnp.asarray(counted)).aux
        np.testing.assert_allclose(some, expected(logits[counted]), rtol=1e-6)
        every = moe.route(jnp.asarray(logits), top_k, jnp.ones((2, 6), bool)).aux
        np.testing.assert_allclose(every, expected(logits.reshape(-1, 3)), rtol=1e-6)
        assert abs(every - some) > 1e-3
    other = np.where(counted[..., None], logits, 7 * rng.standard_normal(logits.shape))
    same = moe.route(jnp.asarray(other, jnp.float32), 2, jnp.asarray(counted)).aux
    assert same == moe.route(jnp.asarray(logits), 2, jnp.asarray(counted)).aux
    assert moe.route(jnp.asarray(logits), 1, jnp.zeros((2, 6), bool)).aux == 0


def test_router_is_float32_whatever_the_activations_are() -> None:
    p = layer_params("phi", MoeConfig())
    x = jnp.asarray(np.random.default_rng(3).standard_normal((1, TOKENS, WIDTH)), jnp.bfloat16)
    logits = moe.router_logits(p["router"], x)
    assert logits.dtype == jnp.float32
    want = np.float32(x) @ p["router"]["fc1"]["kernel"] + p["router"]["fc1"]["bias"]
    np.testing.assert_allclose(logits, want, rtol=1e-5, atol=1e-6)
    y, routing = moe.moe_layer(p, MoeConfig(), x, jnp.ones((1, TOKENS), bool))
    assert y.dtype == jnp.bfloat16 and routing.weight.dtype == jnp.float32
    stored = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), p["router"])
    assert moe.router_logits(stored, x).dtype == jnp.float32


def test_settings_that_cannot_work() -> None:
    for cfg, message in (
        (MoeConfig(experts=1), "at least 2"),
        (MoeConfig(top_k=3), "top_k is 3"),
        (MoeConfig(router_layers=4), "router_layers is 4"),
        (MoeConfig(meta=False, use_residual=True), "meta"),
    ):
        with pytest.raises(ConfigError, match=message):
            cfg.validate(4)


@pytest.mark.parametrize("family", ["phi", "stablelm"])
def test_real_routers(fixtures: Path, family: str) -> None:
    """The published routers give what the official gate gives."""
    pytest.importorskip("torch", reason="needs the extra medmoe_jax[torch]")
    golden = load_file(fixtures / "real_router/io.safetensors")
    p = read_router(fixtures / f"routers/{family}_router.pth")
    x = golden[f"{family}.x"][None]
    logits = moe.router_logits(p, jnp.asarray(x))
    np.testing.assert_allclose(logits[0], golden[f"{family}.router_logits"], atol=2e-5)
    for top_k in (1, 2):
        routing = moe.route(logits, top_k, jnp.ones(x.shape[:2], bool))
        want = golden[f"{family}.top{top_k}.combine_dense"]
        weights = np.asarray(moe.combine_weights(routing)[0])
        assert ((weights > 0) == (want > 0)).all()
        np.testing.assert_allclose(weights, want, atol=2e-5)
        counts = np.bincount(routing.choice[0, :, 0], minlength=4)
        assert counts.tolist() == golden[f"{family}.top{top_k}.exp_counts"].tolist()
        np.testing.assert_allclose(routing.aux, golden[f"{family}.top{top_k}.l_aux"], atol=1e-5)
