"""Casts of kernels: what they give, and that XLA leaves them in the loop over layers. Products of
one row."""

from __future__ import annotations

from typing import Any

import compilers
import jax
import jax.numpy as jnp
import layer_costs
import numpy as np
import pytest

from medmoe_jax.models import layers, one_row, quantized
from medmoe_jax.plan import hlo_text, targets

pytestmark = pytest.mark.usefixtures("quick_compile")


def test_a_cast_is_a_conversion() -> None:
    """Bit for bit, for halfway cases and numbers beyond all as well, and so is the derivative."""
    rng = np.random.default_rng(0)
    numbers = rng.standard_normal(4096) * 10.0 ** rng.integers(-40, 38, 4096)
    halfway = (1 + 2.0**-8 + np.arange(64) * 2.0**-7) * 2.0 ** rng.integers(-126, 127, 64)
    odd = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, 3.4e38]
    x = jnp.asarray(np.concatenate([numbers, halfway, odd]), jnp.float32)
    for dtype in (jnp.bfloat16, jnp.float32, jnp.float16):
        have, pull = jax.vjp(lambda a, dtype=dtype: layers.cast(a, dtype), x)
        want = x.astype(dtype)
        assert have.dtype == dtype
        np.testing.assert_array_equal(np.asarray(have, np.float32), np.asarray(want, np.float32))
        (back,) = pull(want)
        np.testing.assert_array_equal(back, np.asarray(want, np.float32))
    half = x.astype(jnp.bfloat16)
    assert layers.cast(half, jnp.float32).dtype == jnp.float32
    packed = quantized.to_int8(jnp.ones((4, 4)))
    assert layers.cast(packed, jnp.bfloat16) is packed


@pytest.mark.slow
@pytest.mark.tpu
def test_no_stack_of_casts() -> None:
    """A TPU's compiler would hold all layers' weights in 16 bits during the whole loop."""
    compilers.need("v5e:1x1")
    targets.prepare("v5e:1x1")
    place = jax.sharding.SingleDeviceSharding(targets.load("v5e:1x1").devices[0])
    depth, width = 6, 1024

    def stacks(cast: Any) -> int:
        def loss(weights: Any, x: Any) -> Any:
            def layer(x: Any, w: Any) -> tuple[Any, None]:
                return x + jnp.tanh(x @ cast(w, x.dtype)), None

            y, _ = jax.lax.scan(layers.remat(layer, "full"), x, weights)
            return (y.astype(jnp.float32) ** 2).sum()

        shapes = (
            jax.ShapeDtypeStruct((depth, width, width), jnp.float32, sharding=place),
            jax.ShapeDtypeStruct((512, width), jnp.bfloat16, sharding=place),
        )
        traced = jax.jit(jax.grad(loss)).trace(*shapes)
        text = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
        computations, _ = hlo_text.parse(text)
        return sum(
            op.kind == "convert" and op.shapes[0].dims == (depth, width, width)
            for computation in computations.values()
            for op in computation.values()
        )

    assert stacks(lambda w, dtype: w.astype(dtype)) > 0
    assert stacks(layers.cast) == 0


@pytest.mark.parametrize("shape", [(5,), (1, 5), (1, 1, 5)])
def test_one_row_twice(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal(shape), rng.standard_normal((5, 7))
    have = one_row.twice(jnp.matmul, jnp.asarray(x), jnp.asarray(kernel))
    assert have.shape == (*shape[:-1], 7)
    np.testing.assert_allclose(have, x @ kernel, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.tpu
def test_one_row_reads_matrices_once_on_a_gpu() -> None:
    """Phi-2's projections of a token to queries, keys and values."""
    compilers.need("h200:1")
    targets.prepare("h200:1")
    target, width = targets.load("h200:1"), 2560

    def read(linear: Any) -> float:
        def run(x: Any, scale: Any, kernels: Any) -> Any:
            h = layers.layer_norm({"scale": scale, "bias": scale}, x, 1e-5)
            return [linear({"kernel": kernel}, h) for kernel in kernels]

        shapes = ((1, 1, width), (width,), *[(width, width)] * 3)
        x, scale, *kernels = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
        moved = layer_costs.costs(run, target, x, scale, kernels)["traffic"]
        return moved / (3 * 2 * width * width)

    assert read(lambda p, x: x @ p["kernel"]) > 1.9
    assert read(layers.linear) < 1.05
