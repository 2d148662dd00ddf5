"""Attention of a sequence to itself: the TPU's kernel against the plain form; what falls back."""

from __future__ import annotations

import logging
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models

from medmoe_jax.models import attention, fallback, layers, medmoe
from medmoe_jax.plan import hlo

pytestmark = pytest.mark.usefixtures("quick_compile")

SPLASH, WIDTH = partial(attention.splash, interpret=True), 16
# Two samples and padding behind them; padding in front; nothing but padding.
SEGMENTS = ((1,) * 50 + (2,) * 70, (0,) * 30 + (1,) * 90, (0,) * 120)


def inputs(t: int, heads: int, kv_heads: int, width: int) -> tuple[Any, ...]:
    """q, k, v and segments of SEGMENTS, padded at the end to t places."""
    rng = np.random.default_rng(t)
    q, k, v = (
        jnp.asarray(rng.standard_normal((len(SEGMENTS), t, n, width)), jnp.float32)
        for n in (heads, kv_heads, kv_heads)
    )
    segments = np.zeros((len(SEGMENTS), t), np.int32)
    segments[:, : len(SEGMENTS[0])] = SEGMENTS
    return q, k, v, segments


@pytest.mark.parametrize(("t", "heads", "kv_heads", "width"), [(200, 4, 2, 16), (384, 2, 2, 80)])
def test_splash_is_plain_attention(t: int, heads: int, kv_heads: int, width: int) -> None:
    """Values and gradients, padding included; lengths that are and are not whole blocks."""
    *qkv, segments = inputs(t, heads, kv_heads, width)

    def gradient(form: Any) -> Any:
        def total(*qkv: Any) -> Any:
            y = form(*qkv, segments)
            return jnp.sin(y).sum(), y

        return jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(*qkv)

    (_, want), want_gradient = gradient(attention.plain)
    (_, have), have_gradient = gradient(SPLASH)
    np.testing.assert_allclose(have, want, atol=1e-5)
    for a, b in zip(have_gradient, want_gradient, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("single", [False, True])
def test_what_cudnn_is_asked_for(single: bool) -> None:
    """The same as the plain form: with segments as a bias, and with lengths where every row is one
    sample with padding behind it."""
    q, k, v, segments = inputs(130, 4, 2, 16)
    if single:
        segments = (np.arange(130)[None] < np.array([[130], [77], [0]])).astype(np.int32)
    lengths = jnp.asarray(segments.sum(1)) if single else None
    have = attention.cudnn(q, k, v, segments, lengths, implementation="xla")
    want = attention.plain(q, k, v, segments)
    rows = slice(0, 2)  # the last one is nothing but padding
    np.testing.assert_allclose(have[rows], want[rows], atol=1e-5)
    assert np.isfinite(have).all()


def test_lengths_are_told_of_rows_of_one_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not of packed ones."""
    cfg = small_models.config()
    params, batch = small_models.params(cfg), small_models.batch(cfg)
    told = []

    def listen(q: Any, k: Any, v: Any, segments: Any, lengths: Any) -> Any:
        told.append(lengths)
        return attention.plain(q, k, v, segments)

    monkeypatch.setattr(attention, "attend_causal", listen)
    with jax.disable_jit():
        medmoe.forward(params, cfg, batch)
    assert len(told) == cfg.llm.layers
    for lengths in told:
        np.testing.assert_array_equal(lengths, batch["mask"].sum(1))
    told.clear()
    packed = batch | {"segments": batch["mask"].astype(np.int32)}
    jax.eval_shape(lambda batch: medmoe.forward(params, cfg, batch), packed)
    assert told and not [lengths for lengths in told if lengths is not None]


@cache
def layers_of_attention(form: Any, policy: str) -> tuple[Any, Any, Any]:
    """Queries, weights of layers (attention and a product), and the program of both gradients."""
    q, k, v, segments = (a[:1] for a in inputs(128, 2, 2, WIDTH))

    def layer(x: Any, w: Any) -> tuple[Any, None]:
        return form(x, k, v, segments) @ w, None

    def total(x: Any, weights: Any) -> Any:
        return jnp.sin(jax.lax.scan(layers.remat(layer, policy), x, weights)[0]).sum()

    weights = jnp.stack([(i + 1) * jnp.eye(WIDTH) for i in range(3)])
    return q, weights, jax.jit(jax.grad(total, (0, 1))).lower(q, weights).compile()


@pytest.mark.parametrize(
    ("form", "policy", "products"),
    [
        (attention.plain, "full", 2 + 2 + 2),  # forward, again, gradients of weights and queries
        (attention.plain, "attention", 2 + 1 + 2),  # the scores are needed once more
        pytest.param(SPLASH, "full", 2 + 2 + 3, marks=pytest.mark.slow),
        (SPLASH, "attention", 2 + 3),  # its backward pass computes the scores itself
    ],
)
def test_attention_is_not_done_again(form: Any, policy: str, products: int) -> None:
    """Where rematerialisation keeps what it gives: products of the compiled program, gradients."""
    q, weights, program = layers_of_attention(form, policy)
    linear = 3 * 2 * q.size * WIDTH
    want = len(weights) * (linear + products * 2 * q.size * q.shape[1])
    assert hlo.work(program.as_text()).flops == want
    *_, obvious = layers_of_attention(attention.plain, "none")
    for a, b in zip(program(q, weights), obvious(q, weights), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_no_place_sees_another_sample() -> None:
    """Changing a place changes the later ones of its sample alone."""
    q, k, v, segments = inputs(124, 2, 1, 8)
    before = attention.attend_causal(q, k, v, segments)
    after = attention.attend_causal(q, k, v.at[:, 20].add(1.0), segments)
    moved = np.asarray(jnp.abs(after - before).max((2, 3)) > 1e-6)
    assert np.flatnonzero(moved[0]).tolist() == list(range(20, 50))


def test_a_kernel_that_cannot_be_used_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    fallback.say.cache_clear()
    q, k, v, segments = inputs(121, 2, 1, 8)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            attention.attend_causal(q, k, v, segments)
            attention.attend_causal(*(a.astype(jnp.bfloat16) for a in (q, k, v)), segments)
    lines = [record.message for record in caplog.records]
    assert sum("16-bit numbers, not for float32" in line for line in lines) == 1
    assert sum("even number of places, not for 121" in line for line in lines) == 1
