"""Parameters on disk: what is read of them, and that pieces make up the whole."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import small_models
import tensorstore
from flax.traverse_util import flatten_dict
from jax.sharding import SingleDeviceSharding

from medmoe_jax import checkpoint, generate, placement, sharding, stored, upcycle
from medmoe_jax.checkpoint import CheckpointError, ModelMeta
from medmoe_jax.config import MoeConfig
from medmoe_jax.models import moe
from medmoe_jax.stored import Stored

DENSE = small_models.config("phi", layers=4)


def bytes_read() -> int:
    """What TensorStore has read from files so far, in this process."""
    (metric,) = tensorstore.experimental_collect_matching_metrics(
        "/tensorstore/kvstore/file/bytes_read"
    )
    return metric["values"][0]["value"]


def save(folder: Path, params: dict[str, Any]) -> dict[str, Any]:
    """The same parameters on disk."""
    checkpoint.save_model(folder, params, ModelMeta("base", DENSE))
    return checkpoint.open_model(folder)[0]


@pytest.fixture
def leaf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[np.ndarray, Stored]:
    """An array and the same on disk, a matrix a file."""
    monkeypatch.setattr(stored, "CHUNK_BYTES", 1000)
    array = np.arange(6 * 4 * 60, dtype=np.float32).reshape(6, 4, 60)
    return array, save(tmp_path, {"x": array})["x"]


@pytest.mark.parametrize(
    "index",
    [
        2,
        slice(1, 5),
        slice(1, None, 2),
        np.array([3, 0]),
        (slice(0, 2), slice(None), slice(30, 60)),
        (slice(None), slice(2, 4)),
    ],
    ids=str,
)
def test_a_part_is_that_of_the_array(leaf: tuple[np.ndarray, Stored], index: Any) -> None:
    """Also a part of a part, which begins at 0 again."""
    array, whole = leaf
    want, have = array[index], whole[index]
    assert (have.shape, have.dtype, have.ndim) == (want.shape, want.dtype, want.ndim)
    assert (have.size, have.nbytes, len(have)) == (want.size, want.nbytes, len(want))
    np.testing.assert_array_equal(np.asarray(have), want)
    np.testing.assert_array_equal(np.asarray(have[1:2]), want[1:2])
    np.testing.assert_array_equal(np.asarray(have, np.int32), want.astype(np.int32))


def test_repeated_and_multiplied(leaf: tuple[np.ndarray, Stored]) -> None:
    array, whole = leaf
    more = whole[np.array([1, 5])].repeated(3)
    want = np.repeat(array[[1, 5]][:, None], 3, 1)
    assert more.shape == want.shape
    np.testing.assert_array_equal(np.asarray(more), want)
    np.testing.assert_array_equal(np.asarray(more[1, 2]), array[5])
    half = more * np.float32(0.5)
    np.testing.assert_array_equal(np.asarray(half[0, 1:3]), want[0, 1:3] / 2)


def test_nothing_else_is_read(leaf: tuple[np.ndarray, Stored]) -> None:
    """Opening and selecting read no numbers, and reading those files alone that hold them."""
    _, whole = leaf
    before = bytes_read()
    part = whole[4]
    assert bytes_read() == before
    np.asarray(part)
    assert bytes_read() - before == part.nbytes
    np.asarray(whole.repeated(4)[2:3])
    assert bytes_read() - before == 2 * part.nbytes


@pytest.mark.parametrize("most", [1, 100, 250, 1000, 10**6])
@pytest.mark.parametrize("shape", [(5, 3, 20), (7,), (), (0, 4)])
def test_pieces(shape: tuple[int, ...], most: int) -> None:
    """Every number is in one piece, and no piece is larger than it may be."""
    chunk = tuple(min(size, 2) or 1 for size in shape)
    seen = np.zeros(shape, int)
    for piece in stored.pieces(shape, 4, chunk, most):
        seen[piece] += 1
        assert 4 * seen[piece].size <= max(most, 4 * math.prod(chunk))
    assert (seen == 1).all()


def test_files_are_no_larger_than_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever wrote them: the host, a device, or a copy of another folder."""
    monkeypatch.setattr(stored, "CHUNK_BYTES", 1000)
    params = {"x": np.ones((2, 30, 20), np.float32), "y": np.ones((5, 3), np.float32)}
    for name, tree in (
        ("host", params),
        ("device", jax.device_put(params)),
        ("copy", save(tmp_path / "first", params)),
    ):
        again = save(tmp_path / name, tree)
        files = [p for p in (tmp_path / name / "params/x").iterdir() if p.name[0] != "."]
        assert max(file.stat().st_size for file in files) <= 1000
        for key, value in params.items():
            np.testing.assert_array_equal(np.asarray(again[key]), value)


def test_a_copy_that_is_another_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dense model becomes a MoE model, on disk too, without ever being read as a whole."""
    monkeypatch.setattr(stored, "CHUNK_BYTES", 500)
    monkeypatch.setattr(stored, "PIECE_BYTES", 800)
    params = small_models.params(DENSE)
    params["vision"] = jax.tree.map(lambda a: a.astype(ml_dtypes.bfloat16), params["vision"])
    mixture = MoeConfig(experts=3, top_k=2, placement="1,3", use_residual=True)
    router = small_models.fill(moe.router_leaves(DENSE.llm.width, 3, 1))
    args = DENSE, mixture, router, "function_preserving"
    want = flatten_dict(upcycle.upcycle(params, *args)[0], sep="/")
    tree, _ = upcycle.upcycle(save(tmp_path / "dense", params), *args)
    have = flatten_dict(save(tmp_path / "moe", tree), sep="/")
    assert have.keys() == want.keys()
    for path, value in want.items():
        found = np.asarray(have[path])
        assert found.dtype == value.dtype, path
        np.testing.assert_array_equal(found, value, err_msg=path)


def test_lost_file(leaf: tuple[np.ndarray, Stored], tmp_path: Path) -> None:
    _, whole = leaf
    (tmp_path / "params/x/2.0.0").unlink()
    np.asarray(whole[3])
    with pytest.raises(CheckpointError, match=r"params/x cannot be read .*copy the whole"):
        np.asarray(whole)


class Read:
    """Notes the sizes of what is read of a tree."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        original = Stored.__array__

        def noted(leaf: Stored, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
            self.sizes.append(leaf.nbytes)
            return original(leaf, dtype, copy)

        monkeypatch.setattr(Stored, "__array__", noted)


def test_training_and_generation_read_leaf_by_leaf(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything once; at a time a leaf on the way to training, a matrix to generation."""
    cfg = small_models.config("stablelm", MoeConfig(), layers=4)
    params = small_models.params(cfg)
    tree = save(tmp_path, params)
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    read = Read(monkeypatch)
    here = SingleDeviceSharding(jax.devices()[0])
    flat = flatten_dict(params, sep="/")
    for path, leaf in flatten_dict(tree, sep="/").items():
        np.testing.assert_array_equal(np.asarray(sharding.put(leaf, here)), flat[path])
    assert sum(read.sizes) == whole
    read.sizes.clear()
    ready = placement.placed(generate.for_generation(tree, cfg), cfg, np.float32)
    assert sum(read.sizes) == whole
    assert max(read.sizes) == max(leaf.nbytes for leaf in jax.tree.leaves(ready))
    assert max(read.sizes) < max(leaf.nbytes for leaf in jax.tree.leaves(params))
