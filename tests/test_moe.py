"""The MoE layer against the equation written out token by token, and against real routers."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models
from safetensors.numpy import load_file

from medmoe_jax.checkpoint import load_router
from medmoe_jax.config import ConfigError, LlmConfig, MoeConfig
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


def ffn(p: Any, x: np.ndarray) -> np.ndarray:
    """One feed-forward network on one token, from its formula."""
    if "gate" in p:
        gate = x @ p["gate"]["kernel"]
        return (gate / (1 + np.exp(-gate)) * (x @ p["up"]["kernel"])) @ p["down"]["kernel"]
    h = x @ p["fc1"]["kernel"] + p["fc1"]["bias"]
    h = h / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    return h @ p["fc2"]["kernel"] + p["fc2"]["bias"]


def slow_layer(p: Any, cfg: MoeConfig, x: np.ndarray) -> tuple[np.ndarray, list[list[int]]]:
    """Paper equation 4 in float64, one token after the other: outputs and chosen experts."""
    out, choices = [], []
    for token in x:
        scores = token
        for i in range(1, cfg.router_layers + 1):
            scores = erf_gelu(scores) if i > 1 else scores
            scores = scores @ p["router"][f"fc{i}"]["kernel"] + p["router"][f"fc{i}"]["bias"]
        share = np.exp(scores) / np.exp(scores).sum()
        experts = np.argsort(-share)[: cfg.top_k].tolist()
        total = share[experts].sum() if cfg.top_k == 2 else 1.0
        y = np.zeros(WIDTH)
        for e in experts:
            y += share[e] / total * ffn(jax.tree.map(lambda a, e=e: a[e], p["experts"]), token)
        if cfg.meta:
            meta = ffn(p["meta"], token)
            if cfg.use_residual:
                two = np.exp(token @ p["coefficient"]["kernel"] + p["coefficient"]["bias"])
                y = y * two[0] / two.sum() + meta * two[1] / two.sum()
            y += meta
        out.append(y)
        choices.append(experts)
    return np.stack(out), choices


@pytest.mark.parametrize("name", CASES)
def test_layer_is_the_equation(name: str) -> None:
    """Output, and gradients in input and all parameters, router included."""
    family, cfg = CASES[name]
    rng = np.random.default_rng(1)
    p = layer_params(family, cfg)
    x = rng.standard_normal((TOKENS, WIDTH)).astype(np.float32)
    weights = rng.standard_normal((TOKENS, WIDTH))

    def total(p: Any, x: Any) -> Any:
        y, routing = moe.moe_layer(p, cfg, x[None], jnp.ones((1, TOKENS), bool))
        return (y[0] * jnp.float32(weights)).sum(), (y[0], routing)

    fast = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))
    (_, (y, routing)), gradient = fast(p, x)
    exact = jax.tree.map(np.float64, (p, x))
    want, choices = slow_layer(exact[0], cfg, exact[1])
    assert routing.choice[0].tolist() == choices
    np.testing.assert_allclose(y, want, atol=1e-5)
    used = {e for experts in choices for e in experts}
    assert len(used) > 1
    for part in ("router", "experts", "meta", "coefficient", "x"):  # slope along a random line
        if part != "x" and part not in p:
            continue
        direction = jax.tree.map(
            lambda a: 1e-6 * rng.standard_normal(a.shape), exact[1] if part == "x" else p[part]
        )

        def moved(sign: int, part: str = part, direction: Any = direction) -> float:
            new_p, new_x = exact
            if part == "x":
                new_x = new_x + sign * direction
            else:
                new_p = new_p | {
                    part: jax.tree.map(lambda a, d: a + sign * d, new_p[part], direction)
                }
            return float((slow_layer(new_p, cfg, new_x)[0] * weights).sum())

        slope = (moved(1) - moved(-1)) / 2e-6
        ours = gradient[1] if part == "x" else gradient[0][part]
        products = jax.tree.map(lambda g, d: (g * d).sum() / 1e-6, ours, direction)
        assert sum(jax.tree.leaves(products)) == pytest.approx(slope, rel=2e-4, abs=2e-4), part
        assert abs(slope) > 1e-3
    for leaf in jax.tree.leaves(gradient[0]["experts"]):
        assert all(not np.any(leaf[e]) for e in set(range(cfg.experts)) - used)


@functools.partial(jax.jit, static_argnums=1)
def route(logits: Any, top_k: int, counted: Any, key: Any = None) -> moe.Routing:
    return moe.route(logits, top_k, counted, key)


def routed(logits: list[list[float]], top_k: int, key: Any = None) -> moe.Routing:
    """Routing of the tokens of one row that all count."""
    array = np.asarray(logits, np.float32)[None]
    return jax.device_get(route(array, top_k, np.ones(array.shape[:2], bool), key))


def test_weights() -> None:
    logits = np.log([[0.1, 0.6, 0.3], [0.5, 0.2, 0.3]]).tolist()
    one = routed(logits, 1)
    np.testing.assert_allclose(one.weight[0], [[0.6], [0.5]], rtol=1e-6)
    assert one.choice[0].tolist() == [[1], [0]]
    two = routed(logits, 2)
    np.testing.assert_allclose(two.weight[0], [[6 / 9, 3 / 9], [5 / 8, 3 / 8]], rtol=1e-6)
    assert two.choice[0].tolist() == [[1, 2], [0, 2]]
    np.testing.assert_allclose(
        jax.jit(moe.combine_weights)(two)[0], [[0, 6 / 9, 3 / 9], [5 / 8, 0, 3 / 8]], rtol=1e-6
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
    rows = [np.log([0.5, 0.3, 0.15, 0.05]).tolist()] * tokens
    key = jax.random.key(0)
    noisy = routed(rows, 2, key)
    assert not noisy.choice[0, :, 0].any()
    frequency = np.bincount(noisy.choice[0, :, 1], minlength=4) / tokens
    np.testing.assert_allclose(frequency, [0, 0.6, 0.3, 0.1], atol=0.03)
    share = np.array([0.5, 0.3, 0.15, 0.05])[np.asarray(noisy.choice[0])]
    np.testing.assert_allclose(noisy.weight[0], share / share.sum(1, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(noisy.aux, routed(rows, 2).aux, rtol=1e-6)
    assert (routed(rows, 2).choice[0] == np.array([0, 1])).all()
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
        some = route(logits, top_k, counted).aux
        np.testing.assert_allclose(some, expected(logits[counted]), rtol=1e-6)
        every = route(logits, top_k, np.ones((2, 6), bool)).aux
        np.testing.assert_allclose(every, expected(logits.reshape(-1, 3)), rtol=1e-6)
        assert abs(every - some) > 1e-3
    noise = 7 * rng.standard_normal(logits.shape).astype(np.float32)
    other = np.where(counted[..., None], logits, noise)
    assert route(other, 2, counted).aux == route(logits, 2, counted).aux
    assert route(logits, 1, np.zeros((2, 6), bool)).aux == 0


def test_router_is_float32_whatever_the_activations_are() -> None:
    p = layer_params("phi", MoeConfig())
    x = jnp.asarray(np.random.default_rng(3).standard_normal((1, TOKENS, WIDTH)), jnp.bfloat16)
    logits = jax.jit(moe.router_logits)(p["router"], x)
    assert logits.dtype == jnp.float32
    want = np.float32(x) @ p["router"]["fc1"]["kernel"] + p["router"]["fc1"]["bias"]
    np.testing.assert_allclose(logits, want, rtol=1e-5, atol=1e-6)
    layer = jax.jit(moe.moe_layer, static_argnums=1)
    y, routing = layer(p, MoeConfig(), x, np.ones((1, TOKENS), bool))
    assert y.dtype == jnp.bfloat16 and routing.weight.dtype == jnp.float32
    stored = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), p["router"])
    assert jax.eval_shape(moe.router_logits, stored, x).dtype == jnp.float32


def test_router_is_not_rounded_on_accelerators() -> None:
    """There XLA rounds what products of float32 read, unless it is told not to."""
    p = layer_params("phi", MoeConfig(router_layers=2))["router"]
    program = str(jax.make_jaxpr(moe.router_logits)(p, jnp.ones((1, 3, WIDTH), jnp.bfloat16)))
    exact = program.count("(Precision.HIGHEST, Precision.HIGHEST)")
    assert exact == program.count("= dot_general[") == 2


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
    p = load_router(fixtures / f"routers/{family}_router.pth")
    x = golden[f"{family}.x"][None]
    logits = moe.router_logits(p, jnp.asarray(x))
    np.testing.assert_allclose(logits[0], golden[f"{family}.router_logits"], atol=2e-5)
    for top_k in (1, 2):
        routing = route(logits, top_k, np.ones(x.shape[:2], bool))
        want = golden[f"{family}.top{top_k}.combine_dense"]
        weights = np.asarray(moe.combine_weights(routing)[0])
        assert ((weights > 0) == (want > 0)).all()
        np.testing.assert_allclose(weights, want, atol=2e-5)
        counts = np.bincount(routing.choice[0, :, 0], minlength=4)
        assert counts.tolist() == golden[f"{family}.top{top_k}.exp_counts"].tolist()
        np.testing.assert_allclose(routing.aux, golden[f"{family}.top{top_k}.l_aux"], atol=1e-5)
