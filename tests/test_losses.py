"""The losses against their formulas."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medmoe_jax import losses

pytestmark = pytest.mark.usefixtures("quick_compile")


def test_answer_loss_in_chunks() -> None:
    """Values and gradients do not depend on the chunk; rows without labels count nothing."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((3, 11, 4)), jnp.float32)
    head = jnp.asarray(rng.standard_normal((4, 7)), jnp.float32)
    labels = np.where(rng.random((3, 11)) < 0.6, rng.integers(0, 7, (3, 11)), -100)
    labels[2] = -100

    def total(hidden: Any, head: Any, chunk: int) -> Any:
        rows, counts = losses.answer_loss(hidden, lambda h: h @ head, jnp.asarray(labels), chunk)
        return rows.sum(), (rows, counts)

    run = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True), static_argnums=2)
    (_, (rows, counts)), gradient = run(hidden, head, 0)
    scores = np.asarray(hidden @ head, np.float64)
    want, number = np.zeros(3), np.zeros(3, int)
    for b, t in zip(*np.nonzero(labels[:, 1:] >= 0), strict=True):
        share = np.exp(scores[b, t]) / np.exp(scores[b, t]).sum()
        want[b] -= np.log(share[labels[b, t + 1]])
        number[b] += 1
    np.testing.assert_allclose(rows, want, rtol=1e-5)
    assert counts.tolist() == number.tolist() and not rows[2] and not gradient[0][2].any()
    for chunk in (4, 11):
        (_, (other, same)), gradients = run(hidden, head, chunk)
        np.testing.assert_allclose(other, rows, rtol=1e-6)
        assert same.tolist() == counts.tolist()
        for a, b in zip(gradient, gradients, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)


def test_router_loss_levels() -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((2, 3, 4, 3)).astype(np.float32)
    mask = np.array([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]], bool)
    modality = np.array([2, -1, 0], np.int32)

    def minus_log(scores: np.ndarray, target: int) -> float:
        return float(np.log(np.exp(scores).sum()) - scores[target])

    arrays = jnp.asarray(logits), jnp.asarray(mask), jnp.asarray(modality)
    loss = jax.jit(losses.router_loss, static_argnums=3)
    rows, counts = loss(*arrays, "token")
    want = [
        sum(minus_log(logits[n, b, t], modality[b]) for n in range(2) for t in places)
        for b, places in ((0, range(3)), (2, range(1)))
    ]
    np.testing.assert_allclose(rows, [want[0], 0, want[1]], rtol=1e-5)
    assert counts.tolist() == [6, 0, 2]
    rows, counts = loss(*arrays, "sample")
    want = [minus_log(logits[:, b, :n].mean((0, 1)), modality[b]) for b, n in ((0, 3), (2, 1))]
    np.testing.assert_allclose(rows, [want[0], 0, want[1]], rtol=1e-5)
    assert counts.tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match="'word' is unknown; use 'token' or 'sample'"):
        losses.router_loss(*arrays, "word")
    posterior = np.asarray(jax.jit(losses.posterior)(*arrays[:2]))
    logs = logits[:, 0, :3] - np.log(np.exp(logits[:, 0, :3]).sum(-1, keepdims=True))
    want = np.exp(logs.mean((0, 1)))
    np.testing.assert_allclose(posterior[0], want / want.sum(), rtol=1e-5)
