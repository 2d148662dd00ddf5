"""Block sizes of the kernels for the models' layers, and what falls back."""

from __future__ import annotations

import logging

import jax.numpy as jnp
import numpy as np
import pytest

from medmoe_jax.models import fallback, products

PHI2, STABLELM = (2560, 10240), (2048, 5632)


@pytest.mark.parametrize("tile", [128, 256, 512])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("sizes", [PHI2, PHI2[::-1], STABLELM, STABLELM[::-1], (344, 128), (8, 12)])
def test_blocks_fit(sizes: tuple[int, int], itemsize: int, tile: int) -> None:
    """Into the memory of a core, and whole numbers of them into the models' matrices."""
    k, n = sizes
    rows, bk, bn = products.blocks(16 * tile, k, n, tile, 4, itemsize)
    held = 2 * itemsize * (tile * bk + bk * bn + tile * bn) + 4 * tile * bn
    assert rows == tile and held <= products.VMEM
    _, wk, wn = products.blocks_of_weights(k, n, tile, itemsize)
    held = (2 * itemsize + 4) * (tile * wk + tile * wn + wk * wn)
    assert held <= products.VMEM
    for block, whole in ((bk, k), (bn, n), (wk, k), (wn, n)):
        assert block % 128 == 0
        assert whole % block == 0 or whole % 128


@pytest.mark.parametrize(("k", "n"), [PHI2, PHI2[::-1], STABLELM, STABLELM[::-1]])
def test_arithmetic_outweighs_memory(k: int, n: int) -> None:
    """With 16-bit numbers and tiles of 512 rows a TPU v5e (197 TFLOP/s, 819 GB/s) is not slowed
    down by what the blocks read."""
    tile, rows, n_experts = 512, 8192, 1
    _, bk, bn = products.blocks(rows, k, n, tile, n_experts, 2)
    times = n_experts if bk == k else rows // tile
    read = 2 * (rows * k * n // bn + times * k * n + rows * n)
    assert 2 * rows * k * n / 197e12 > read / 819e9
    _, bk, bn = products.blocks_of_weights(k, n, tile, 2)
    read = 2 * (rows * k * n // bn + rows * n * k // bk + k * n)
    assert 2 * rows * k * n / 197e12 > read / 819e9


@pytest.mark.parametrize(("sizes", "n"), [((256, 0, 128), 256), ((256,), 200)])
def test_separate_experts_on_a_tpu(
    sizes: tuple[int, ...], n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several blocks along each axis, the last one of K in part; an expert without rows, and rows
    without an expert, which are zero. A last block of N in part has a case of its own with one
    expert, because JAX 0.11 cannot interpret it in memory that several kernels write."""
    monkeypatch.setattr(products, "blocks", lambda *_: (128, 128, 128))
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((512, 300)).astype(np.float32)
    kernels = rng.standard_normal((len(sizes), 300, n)).astype(np.float32)
    want, end = np.zeros((512, n), np.float32), 0
    for kernel, size in zip(kernels, sizes, strict=True):
        want[end : end + size] = rows[end : end + size] @ kernel
        end += size
    have = products.tpu(rows, list(kernels), jnp.asarray(sizes), tile=128, interpret=True)
    np.testing.assert_allclose(have, want, atol=1e-4, rtol=1e-5)


def test_odd_widths_fall_back_on_a_gpu(caplog: pytest.LogCaptureFixture) -> None:
    fallback.say.cache_clear()
    rows, kernels = jnp.ones((128, 8)), jnp.arange(1.0, 3.0)[:, None, None] * jnp.ones((2, 8, 12))
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            y = products.gpu(rows, kernels, jnp.array([0, 128]), tile=128)
    np.testing.assert_array_equal(y, np.full((128, 12), 16.0))
    assert [r.message for r in caplog.records] == [
        "On a GPU every expert is run on every token: 16 does not divide 8 or 12"
    ]
