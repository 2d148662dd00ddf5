"""Few rows times a matrix of 4 bits on a GPU: the kernel, interpreted, and what it takes."""

from __future__ import annotations

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from medmoe_jax.models import fallback, int4_rows, quantized

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.mark.parametrize(
    ("d_in", "d_out", "group", "rows", "dtype"),
    [(160, 48, 32, 3, "float32"), (101, 32, 32, 1, "float32"), (128, 32, 64, 20, "bfloat16")],
)
def test_product(d_in: int, d_out: int, group: int, rows: int, dtype: str) -> None:
    """Several blocks and groups, a last group that is filled up, and more rows than a power of
    two."""
    rng = np.random.default_rng(0)
    kernel = quantized.to_int4(jnp.asarray(rng.standard_normal((d_in, d_out)), jnp.float32), group)
    x = jnp.asarray(rng.standard_normal((rows, d_in)), dtype)
    assert int4_rows.fits(kernel.values, rows)
    have = int4_rows.product(*kernel, quantized.filled(kernel, x), interpret=True)
    want = np.asarray(x, np.float32) @ np.asarray(quantized.dequantize(kernel))[:d_in]
    assert have.dtype == jnp.float32
    np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-4)


def test_programs_share_the_groups() -> None:
    """All of them equally, and no more programs than it takes."""
    assert int4_rows.parts(groups=20, blocks=320) == 1
    assert int4_rows.parts(groups=80, blocks=80) == 2
    assert int4_rows.parts(groups=45, blocks=64) == 3
    assert int4_rows.parts(groups=4, blocks=1) == 4


def test_what_falls_back(caplog: pytest.LogCaptureFixture) -> None:
    """More rows silently, for they are another case; matrices with a word in the log."""
    fallback.say.cache_clear()
    shapes = [(4, 64, 256), (4, 48, 256), (4, 8, 256), (4, 64, 40)]
    matrices = [jax.ShapeDtypeStruct(shape, jnp.int8) for shape in shapes]
    with caplog.at_level(logging.INFO):
        assert not int4_rows.fits(matrices[0], int4_rows.FEW + 1)
        assert [int4_rows.fits(m, 8) for m in matrices] == [True, False, False, False]
        assert not int4_rows.fits(matrices[1], 8)
    assert len(caplog.records) == 3
    assert "groups of 96 inputs are no power of two from 32 on" in caplog.records[0].message


def test_a_gpu_takes_it() -> None:
    """And no other product."""
    x = jnp.ones((8, 256), jnp.bfloat16)
    kernel = quantized.to_int4(jnp.ones((256, 64)), 128)
    # JAX 0.11 asks for which GPU, 0.10 does not.
    gpu = AbstractDevice(device_kind="NVIDIA H100", num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=gpu)):
        traced = jax.jit(quantized.product).trace(kernel, x)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "product_of_int4" in text and "stablehlo.dot_general" not in text
