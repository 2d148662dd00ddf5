"""Block sizes of the TPU's kernels for the models' layers."""

from __future__ import annotations

import pytest

from medmoe_jax.models import products

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
