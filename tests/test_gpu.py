"""What runs on an NVIDIA GPU, on one: the kernels and the models that are made of them.

In 16 bits the references are computed in float32 from the same numbers, in which errors of a
result are those of rounding it: `near` bounds their norm.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models

from medmoe_jax import losses
from medmoe_jax.config import MoeConfig
from medmoe_jax.models import (
    attention,
    experts,
    fallback,
    int4_rows,
    layers,
    medmoe,
    one_row,
    quantized,
)

pytestmark = pytest.mark.gpu

ROUNDING = 2**-8  # of a number in bfloat16


@pytest.fixture(autouse=True)
def gpu() -> None:
    """Skips where there is none."""
    if jax.default_backend() != "gpu":
        pytest.skip(f"JAX runs on a {jax.default_backend()} here")


def near(have: Any, want: Any, bound: float, least: float = 1e-30) -> None:
    """The norm of the error is below `bound` times that of what is wanted, or `least`."""
    have, want = (np.asarray(a, np.float32) for a in (have, want))
    assert np.isfinite(have).all()
    error = np.linalg.norm(have - want) / max(np.linalg.norm(want), least)
    assert error < bound, f"{error:.1e}"


def half(tree: Any) -> Any:
    """Floats as bfloat16."""
    return jax.tree.map(lambda a: jnp.asarray(a).astype(jnp.bfloat16), tree)


@pytest.mark.parametrize(
    ("family", "width", "ffn", "tokens", "n_experts", "top_k", "apart"),
    [
        ("stablelm", 512, 1408, 2000, 4, 1, False),
        ("phi", 320, 1280, 700, 4, 1, True),
        ("phi", 128, 144, 129, 3, 2, False),
        ("stablelm", 64, 80, 1000, 6, 2, True),
        ("phi", 128, 256, 300, 1, 1, False),
    ],
)
def test_grouped_products(
    family: str, width: int, ffn: int, tokens: int, n_experts: int, top_k: int, apart: bool
) -> None:
    """The expert sum and its derivatives; of stacked experts and of separate ones."""
    p = half(small_models.fill(layers.mlp_leaves(family, width, ffn, (n_experts,))))
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((1, tokens, width)), jnp.bfloat16)
    weight = jnp.asarray(rng.uniform(0.1, 1, (1, tokens, top_k)), jnp.float32)
    wanted = jnp.asarray(rng.standard_normal(x.shape), jnp.float32)

    def fast(p: Any, x: Any, choice: Any, weight: Any) -> Any:
        split = experts.separate(p, n_experts, 1) if apart else p
        return experts.mixture(split, x, choice, weight, n_experts)

    def gradient(form: Any, *given: Any) -> Any:
        def total(p: Any, x: Any, weight: Any, choice: Any) -> Any:
            y = form(p, x, choice, weight)
            return (y.astype(jnp.float32) * wanted).sum(), y

        return jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(*given)

    single = jax.tree.map(lambda a: a.astype(jnp.float32), (p, x))
    for kind in ("mixed", "one", "none"):
        choice = small_models.choices(kind, tokens, n_experts, top_k)
        with jax.default_matmul_precision("highest"):
            slow = partial(experts.reference, n_experts=n_experts)
            (_, want), want_gradient = gradient(slow, *single, weight, choice)
        (_, have), have_gradient = gradient(fast, p, x, weight, choice)
        near(have, want, 4 * ROUNDING)
        for a, b in zip(*map(jax.tree.leaves, (have_gradient, want_gradient)), strict=True):
            near(a, b, 6 * ROUNDING)


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 4, 64), (4, 4, 80), (8, 2, 64)])
@pytest.mark.parametrize("length", [200, 512])
@pytest.mark.parametrize("single", [False, True])
def test_attention(heads: int, kv_heads: int, width: int, length: int, single: bool) -> None:
    """cuDNN's values and gradients. Rows of several samples and padding at either end, or of one
    sample with padding behind it; the last row is nothing but padding."""
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.standard_normal((3, length, n, width)), jnp.bfloat16)
        for n in (heads, kv_heads, kv_heads)
    )
    segments = np.zeros((3, length), np.int32)
    if single:
        segments[0], segments[1, : length // 3] = 1, 1
    else:
        segments[0, : length // 2], segments[0, length // 2 : -length // 4] = 1, 2
        segments[1, length // 5 :] = 1
    lengths = jnp.asarray(segments.sum(1)) if single else None
    wanted = jnp.asarray(rng.standard_normal(q.shape), jnp.float32).at[2].set(0)

    def gradient(form: Any, *qkv: Any) -> Any:
        def total(*qkv: Any) -> Any:
            y = form(*qkv, segments)
            return (y.astype(jnp.float32) * wanted).sum(), y

        run = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True)).lower(*qkv).compile()
        return run(*qkv), run.as_text()

    causal = partial(attention.attend_causal, lengths=lengths)
    ((_, have), have_gradient), program = gradient(causal, q, k, v)
    assert "fmha" in program
    assert np.isfinite(np.asarray(have, np.float32)).all()
    floats = (a.astype(jnp.float32) for a in (q, k, v))
    with jax.default_matmul_precision("highest"):
        ((_, want), want_gradient), _ = gradient(attention.plain, *floats)
    near(have[:2], want[:2], 2 * ROUNDING)
    for a, b in zip(have_gradient, want_gradient, strict=True):
        near(a, b, 4 * ROUNDING)


@pytest.mark.parametrize(("d_in", "d_out", "group"), [(640, 2560, 128), (1408, 512, 64)])
@pytest.mark.parametrize("rows", [1, 3, 8, 64])
def test_four_bits(d_in: int, d_out: int, group: int, rows: int) -> None:
    """The product of few rows with a matrix of 4 bits."""
    rng = np.random.default_rng(0)
    kernel = quantized.to_int4(jnp.asarray(rng.standard_normal((d_in, d_out)), jnp.float32), group)
    x = jnp.asarray(rng.standard_normal((rows, d_in)), jnp.bfloat16)
    assert int4_rows.fits(kernel.values, rows)
    have = jax.jit(quantized.product)(kernel, x)
    want = np.asarray(x, np.float32) @ np.asarray(quantized.dequantize(kernel))[:d_in]
    near(have, want, 2 * ROUNDING)


def test_one_row() -> None:
    """The product of a single row."""
    rng = np.random.default_rng(0)
    x, kernel = (
        jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for s in ((1, 2048), (2048, 2048))
    )
    have = jax.jit(partial(one_row.product, jnp.matmul))(x, kernel)
    near(have, np.asarray(x, np.float32) @ np.asarray(kernel, np.float32), 2 * ROUNDING)


@pytest.mark.parametrize("family", ["phi", "stablelm"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_a_model_is_that_of_the_cpu(family: str, top_k: int) -> None:
    """Losses and gradients of a batch in float32."""
    cfg = small_models.config(family, MoeConfig(4, top_k), layers=4)
    params, batch = small_models.params(cfg), small_models.batch(cfg)

    def total(params: Any, given: Any) -> Any:
        hidden, _ = medmoe.forward(params, cfg, given)
        loss, _ = losses.answer_loss(hidden, lambda h: medmoe.logits(params, h), given["labels"], 0)
        return loss.sum()

    found = []
    for device in (jax.devices("cpu")[0], jax.devices("gpu")[0]):
        with jax.default_device(device), jax.default_matmul_precision("highest"):
            found.append(jax.device_get(jax.jit(jax.value_and_grad(total))(params, batch)))
    for have, want in zip(*map(jax.tree.leaves, found[::-1]), strict=True):
        # The gradient of CLIP's key biases is zero: they move all scores of a query alike.
        near(have, want, 1e-4, least=1e-2)


def test_nothing_falls_back(caplog: pytest.LogCaptureFixture) -> None:
    """The full sizes run on kernels: a fallback would be a warning."""
    fallback.say.cache_clear()
    with caplog.at_level(logging.INFO):
        for family, width, ffn, head in (("phi", 2560, 10240, 80), ("stablelm", 2048, 5632, 64)):
            found = layers.mlp_leaves(family, width, ffn, (4,))
            p = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), found)
            shape = jax.ShapeDtypeStruct((2, 2048, width), jnp.bfloat16)
            choice = jax.ShapeDtypeStruct((2, 2048, 1), jnp.int32)
            weight = jax.ShapeDtypeStruct((2, 2048, 1), jnp.float32)
            run = partial(experts.mixture, n_experts=4)
            jax.eval_shape(run, p, shape, choice, weight)
            qkv = (jax.ShapeDtypeStruct((2, 2048, 32, head), jnp.bfloat16),) * 3
            segments = jax.ShapeDtypeStruct((2, 2048), jnp.int32)
            jax.eval_shape(attention.attend_causal, *qkv, segments)
    assert not [r for r in caplog.records if "GPU" in r.getMessage()]
