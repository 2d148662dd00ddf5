"""Kernels of 8 and 4 bits: the numbers that are stored, and products with them."""

from __future__ import annotations

import functools
from typing import Any

import compilers
import jax
import jax.numpy as jnp
import layer_costs
import numpy as np
import pytest

from medmoe_jax.models import layers, quantized
from medmoe_jax.plan import targets

BITS = (8, 4)


def kernel(d_in: int, d_out: int, seed: int = 0) -> np.ndarray:
    """Normal numbers with columns of unlike size; the second one is zero."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((d_in, d_out)) * np.exp(rng.standard_normal(d_out))
    w[:, 1] = 0
    return w.astype(np.float32)


def steps_of(w: np.ndarray, bits: int, group: int) -> np.ndarray:
    """The step size of each number: the largest of its column (and group) / 127 or / 7."""
    n = len(w)
    width, most = (n, 127) if bits == 8 else (group, 7)
    blocks = [np.abs(w[i : i + width]).max(0) for i in range(0, n, width)]
    return np.repeat(np.stack(blocks) / np.float32(most), width, axis=0)[:n]


def rounded(w: np.ndarray, bits: int, group: int) -> np.ndarray:
    """w to the next multiple of its step."""
    step = steps_of(w, bits, group)
    return np.round(w / np.where(step == 0, 1, step)) * step


@functools.partial(jax.jit, static_argnums=(1, 2))
def stored(w: Any, bits: int, group: int) -> Any:
    """w as `quantize` stores it."""
    return quantized.to_int8(w) if bits == 8 else quantized.to_int4(w, group)


CASES = [(8, 6, 50), (4, 6, 48), (4, 6, 50), (4, 128, 50), (8, 6, 1), (4, 2, 1)]


@pytest.mark.parametrize(("bits", "group", "d_in"), CASES)
def test_numbers_are_rounded_to_the_next_step(bits: int, group: int, d_in: int) -> None:
    w = kernel(d_in, 7)
    small = stored(w, bits, group)
    back = np.asarray(quantized.dequantize(small))
    np.testing.assert_allclose(back[:d_in], rounded(w, bits, group), rtol=1e-6)
    assert not back[d_in:].any() and not back[:, 1].any()
    step = steps_of(w, bits, group)
    assert (np.abs(back[:d_in] - w) <= step * 0.5001).all()
    # the largest number of a column or group is kept
    top = np.abs(w).argmax(0)
    np.testing.assert_allclose(back[top, range(7)], w[top, range(7)], rtol=1e-6)
    assert small.values.dtype == jnp.int8 and small.scale.dtype == jnp.float32
    numbers = small.values.size
    assert numbers == (7 * d_in if bits == 8 else 7 * group // 2 * -(-d_in // group))


@pytest.mark.parametrize("rows", [1, 3, 120])  # 120: more tokens than inputs, one product
@pytest.mark.parametrize(("bits", "d_in"), [(8, 100), (8, 101), (4, 96), (4, 101), (8, 1)])
def test_product(bits: int, d_in: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In steps and at once, whether steps and groups divide the width or not."""
    monkeypatch.setattr(quantized, "AT_ONCE", 1)
    w = kernel(d_in, 7)
    x = np.random.default_rng(1).standard_normal((rows, d_in)).astype(np.float32)
    y = np.asarray(quantized.product(stored(w, bits, 32), jnp.asarray(x)))
    np.testing.assert_allclose(y, x @ rounded(w, bits, 32), rtol=1e-5, atol=1e-4)
    bound = np.abs(x) @ steps_of(w, bits, 32) / 2
    assert (np.abs(y - x @ w) <= bound * 1.001 + 1e-4).all()
    assert np.abs(y - x @ w).max() > 1e-4 or d_in == 1


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rows", [2, 64])
def test_linear_in_bfloat16(bits: int, rows: int) -> None:
    """The bias is added, and the result has the activations' shape and dtype."""
    w, bias = kernel(40, 8), np.linspace(-3, 3, 8, dtype=np.float32)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((1, rows, 40)), jnp.bfloat16)
    y = layers.linear({"kernel": stored(w, bits, 8), "bias": bias}, x)
    want = np.asarray(x, np.float32) @ rounded(w, bits, 8)
    assert y.dtype == jnp.bfloat16 and y.shape == (1, rows, 8)
    np.testing.assert_allclose(np.asarray(y, np.float32), want + bias, rtol=0.02, atol=0.2)
    without = layers.linear({"kernel": stored(w, bits, 8)}, x)
    np.testing.assert_allclose(np.asarray(without, np.float32), want, rtol=0.02, atol=0.2)


def test_one_program_for_all_weights_of_a_shape() -> None:
    traced = []

    @jax.jit
    def run(p: Any, x: Any) -> Any:
        traced.append(1)
        return layers.linear(p, x)

    x = jnp.ones((2, 30))
    found = [run({"kernel": jax.device_put(stored(kernel(30, 4, s), 4, 8))}, x) for s in (0, 1)]
    assert len(traced) == 1 and np.abs(np.asarray(found[0] - found[1])).max() > 0.1


def loop(kernels: Any, x: Any) -> Any:
    """A loop over tokens whose number is not known, as in generation."""

    def body(carry: Any) -> Any:
        n, x = carry
        for each in kernels:
            x = jnp.tanh(layers.linear({"kernel": each}, x))
        return n + 1, x

    return jax.lax.while_loop(lambda c: (c[0] < 9) & (c[1].sum() > 0), body, (jnp.int32(0), x))[1]


@pytest.mark.parametrize("bits", BITS)
def test_no_copy_of_the_weights_as_floats(bits: int) -> None:
    """Decoding takes a share of one matrix in memory, not the matrices, on the CPU."""
    n, count = 1024, 4
    w = jax.ShapeDtypeStruct((n, n), jnp.float32)
    small = jax.eval_shape(lambda w: stored(w, bits, 128), w)
    args = (small,) * count, jax.ShapeDtypeStruct((1, n), jnp.float32)
    memory = jax.jit(loop).lower(*args).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 4 * n * n * 0.6
    assert memory.argument_size_in_bytes < count * n * n * bits / 8 * 1.1


@pytest.mark.parametrize(("bits", "platform"), [(8, "cuda"), (8, "tpu"), (4, "tpu")])
def test_accelerators_get_one_product_behind_a_barrier(bits: int, platform: str) -> None:
    """The conversion cannot move out of the loop over tokens, and is next to the product."""
    small = stored(kernel(256, 256), bits, 128)
    traced = jax.jit(loop).trace((small,), jnp.ones((1, 256), jnp.bfloat16))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.while") == 1 and text.count("stablehlo.dot_general") == 1
    assert text.count("stablehlo.optimization_barrier") == 1
    barrier, product = (text.index(f"stablehlo.{n}") for n in ("optimization_b", "dot_general"))
    assert barrier < product


@pytest.mark.slow
@pytest.mark.tpu
@pytest.mark.parametrize(("bits", "rows", "most"), [(8, 1, 1.4), (4, 1, 1.4), (4, 8, 1.5)])
def test_a_gpu_reads_the_small_numbers(bits: int, rows: int, most: float) -> None:
    """And does not write floats."""
    compilers.need("h200:1")
    targets.prepare("h200:1")
    n = 2048
    w = jax.ShapeDtypeStruct((n, n), jnp.float32)
    small = jax.eval_shape(lambda w: stored(w, bits, 128), w)
    x = jax.ShapeDtypeStruct((rows, n), jnp.bfloat16)
    moved = layer_costs.costs(quantized.product, targets.load("h200:1"), small, x)["traffic"]
    assert moved < most * n * n * bits / 8
