"""Adapters in weights on disk: the same numbers as in memory, and no more is read than is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import small_models

from medmoe_jax import checkpoint, lora
from medmoe_jax.checkpoint import ModelMeta
from medmoe_jax.lora.merged import Merged
from medmoe_jax.stored import Stored

STACK, D_IN, D_OUT, RANK, SCALE = (3, 4), 10, 6, 2, 1.5


def adapter(rng: np.random.Generator) -> dict[str, np.ndarray]:
    a = rng.normal(size=(*STACK, D_IN, RANK)).astype(np.float32)
    return {lora.A: a, lora.B: rng.normal(size=(*STACK, RANK, D_OUT)).astype(np.float32)}


@pytest.fixture(params=[np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
def kernel(request: Any, tmp_path: Path) -> tuple[np.ndarray, Any]:
    """W + scale A B by hand, and the same from disk."""
    rng = np.random.default_rng(3)
    w = rng.normal(size=(*STACK, D_IN, D_OUT)).astype(request.param)
    checkpoint.save_model(tmp_path, {"kernel": w}, ModelMeta("base", small_models.config("phi")))
    beside = adapter(rng)
    product = np.einsum("...ir,...ro->...io", beside[lora.A], beside[lora.B])
    want = (w.astype(np.float32) + SCALE * product).astype(w.dtype)
    return want, lora.merge(checkpoint.open_model(tmp_path)[0] | beside, SCALE)["kernel"]


INDICES = [
    (),
    1,
    (2, 3),
    slice(1, None),
    np.array([2, 0]),
    (slice(None), slice(1, 3), slice(2, 9), slice(0, 4)),
    (1, slice(None), slice(5, 10)),
]


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_a_part_is_that_of_the_sum(kernel: tuple[np.ndarray, Merged], index: Any) -> None:
    """Also of parts of parts."""
    want, have = kernel
    part, found = want[index], have[index]
    assert (found.shape, found.dtype, found.nbytes) == (part.shape, part.dtype, part.nbytes)
    close(np.asarray(found), part)
    close(np.asarray(found[1:2]), part[1:2])


def test_repeated_and_multiplied(kernel: tuple[np.ndarray, Merged]) -> None:
    want, have = kernel
    more = (have[np.array([0, 2])] * np.float32(0.5)).repeated(3) * np.float32(4)
    close(np.asarray(more), np.repeat(want[[0, 2]][:, None] * np.asarray(2, want.dtype), 3, 1))
    close(np.asarray(more[1, 2, 3]), want[2, 3] * np.asarray(2, want.dtype))


def test_a_matrix_is_cut_by_slices(kernel: tuple[np.ndarray, Merged]) -> None:
    with pytest.raises(AssertionError):
        kernel[1][0, 0, 3]


def test_only_the_part_is_read(
    kernel: tuple[np.ndarray, Merged], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    original = Stored._read

    def noted(leaf: Stored) -> np.ndarray:
        read.append(leaf.size)
        return original(leaf)

    monkeypatch.setattr(Stored, "_read", noted)
    part = kernel[1][2, 1:3]
    assert read == []
    np.asarray(part)
    assert read == [2 * D_IN * D_OUT]


def test_a_merged_model_is_written_as_it_is_read(
    kernel: tuple[np.ndarray, Merged], tmp_path: Path
) -> None:
    folder, meta = tmp_path / "out", ModelMeta("base", small_models.config("phi"))
    checkpoint.save_model(folder, {"kernel": kernel[1]}, meta)
    again = np.asarray(checkpoint.open_model(folder)[0]["kernel"])
    np.testing.assert_array_equal(again, np.asarray(kernel[1]))


def close(have: np.ndarray, want: np.ndarray) -> None:
    """Equal but for the order of the sums, of which bfloat16 can see a last bit."""
    assert have.dtype == want.dtype
    bound = 1e-6 if have.dtype == np.float32 else 2**-7
    a, b = have.astype(np.float32), want.astype(np.float32)
    np.testing.assert_allclose(a, b, rtol=bound, atol=bound)
