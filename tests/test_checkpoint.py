"""The model folder: what is written is what is read, and damaged or foreign folders are named."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from medmoe_jax import checkpoint, presets, resume, stored
from medmoe_jax.checkpoint import CheckpointError, ModelMeta
from medmoe_jax.config import MoeConfig
from medmoe_jax.step import State


def tree() -> dict[str, Any]:
    """A parameter tree with every dtype, an empty stack and one-element leaves."""
    rng = np.random.default_rng(0)
    return {
        "a": {
            "f32": rng.normal(size=(2, 3, 5)).astype(np.float32),
            "f16": rng.normal(size=(7,)).astype(np.float16),
            "bf16": rng.normal(size=(4, 3)).astype(ml_dtypes.bfloat16),
        },
        "b": {"fc1": {"kernel": np.float32([[1.5]])}},
    }


def meta() -> ModelMeta:
    """Meta data with every field set."""
    return ModelMeta(
        stage="stage3",
        model=presets.model("tiny", MoeConfig(placement="0,3", top_k=2)),
        dtypes={"x.weight": "float16"},
        torch_config={"model_type": "moe_llava_phi", "nested": {"a": [1, None, 1e-5]}},
        clip_config={"hidden_act": "quick_gelu"},
        history=["made", "trained"],
    )


def assert_same(a: Any, b: Any) -> None:
    """Same structure, dtypes and bits, as numpy arrays."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert type(x) is np.ndarray and x.dtype == y.dtype and x.shape == y.shape
        assert x.tobytes() == np.asarray(y).tobytes()


def test_round_trip(tmp_path: Path) -> None:
    checkpoint.save_model(tmp_path / "model", tree(), meta())
    params, again = checkpoint.load_model(tmp_path / "model")
    assert_same(params, tree())
    assert again == meta() == checkpoint.read_meta(tmp_path / "model")
    data = json.loads((tmp_path / "model/config.json").read_text())
    assert data["format"] == "medmoe_jax" and data["version"] == 1
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["config.json", "params"]


def test_jax_arrays(tmp_path: Path) -> None:
    params = jax.tree.map(jnp.asarray, tree())
    checkpoint.save_model(tmp_path, params, meta())
    assert_same(checkpoint.load_model(tmp_path)[0], tree())


def test_leaves_larger_than_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "CHUNK_BYTES", 1000)
    params = {"x": np.arange(6000, dtype=np.float32).reshape(3, 40, 50)}
    checkpoint.save_model(tmp_path, params, meta())
    assert_same(checkpoint.load_model(tmp_path)[0], params)
    files = [p for p in (tmp_path / "params/x").iterdir() if not p.name.startswith(".")]
    assert len(files) > 10  # one a chunk


def test_a_model_is_replaced_and_keeps_its_assets(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    checkpoint.save_model(first, tree(), meta())
    (first / "tokenizer").mkdir()
    (first / "tokenizer/tokenizer.json").write_text("{}")
    (first / "preprocessor_config.json").write_text("[]")
    checkpoint.save_model(second, {"other": np.ones(3)}, meta())
    assert not (second / "tokenizer").exists()
    checkpoint.save_model(second, tree(), meta(), assets_from=first)
    assert_same(checkpoint.load_model(second)[0], tree())
    assert (second / "tokenizer/tokenizer.json").read_text() == "{}"
    assert (second / "preprocessor_config.json").read_text() == "[]"
    checkpoint.save_model(first, {"other": np.ones(3)}, meta(), assets_from=first)
    assert (first / "tokenizer/tokenizer.json").read_text() == "{}"


def test_an_interrupted_write_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save_model(tmp_path, tree(), meta())

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.json, "dumps", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save_model(tmp_path, {"other": np.ones(3)}, meta())
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="interrupted"):
        checkpoint.load_model(tmp_path)
    checkpoint.save_model(tmp_path, tree(), meta())
    assert_same(checkpoint.load_model(tmp_path)[0], tree())


def test_another_programs_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "phi"}')
    with pytest.raises(CheckpointError, match="belongs to something else"):
        checkpoint.save_model(tmp_path, tree(), meta())
    with pytest.raises(CheckpointError, match="to-jax"):
        checkpoint.load_model(tmp_path)
    assert (tmp_path / "config.json").read_text() == '{"model_type": "phi"}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "no JSON object"),
        ('{"format": "medmoe_jax", "version": 2}', "version 2"),
        ('{"format": "medmoe_jax", "version": 1}', "stage"),
        ('{"format": "medmoe_jax", "version": 1, "stage": "x", "model": {}}', "vision"),
    ],
)
def test_damaged_config(tmp_path: Path, content: str, message: str) -> None:
    checkpoint.save_model(tmp_path, tree(), meta())
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message) as error:
        checkpoint.load_model(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


def test_damaged_params(tmp_path: Path) -> None:
    checkpoint.save_model(tmp_path, tree(), meta())
    (tmp_path / "params").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="params does not exist"):
        checkpoint.load_model(tmp_path)
    (tmp_path / "elsewhere").rename(tmp_path / "params")
    (tmp_path / "params/a.bf16/0.0").unlink()  # one chunk
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load_model(tmp_path)
    (tmp_path / "params").rename(tmp_path / "elsewhere")
    (tmp_path / "params").mkdir()
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load_model(tmp_path)


@pytest.mark.parametrize("layers", [1, 3])
def test_router_files(tmp_path: Path, layers: int) -> None:
    torch = pytest.importorskip("torch")
    state = {}
    for i in range(1, layers + 1):
        state[f"fc{i}.weight"] = torch.randn(4 if i == layers else 6, 6).half()
        state[f"fc{i}.bias"] = torch.randn(4 if i == layers else 6)
    torch.save(state, tmp_path / "router.pth")
    router = checkpoint.load_router(tmp_path / "router.pth")
    assert list(router) == [f"fc{i}" for i in range(1, layers + 1)]
    last = router[f"fc{layers}"]
    assert last["kernel"].shape == (6, 4) and last["kernel"].dtype == np.float32
    np.testing.assert_array_equal(last["kernel"].T, state[f"fc{layers}.weight"].float().numpy())
    checkpoint.save_model(tmp_path / "model", tree() | {"router": router}, meta())
    assert_same(checkpoint.load_router(tmp_path / "model"), router)


def test_files_that_are_no_routers(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    file = tmp_path / "router.pth"
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoint.load_router(file)
    for content in ({}, {"a": torch.ones(1)}, {"fc1.weight": torch.ones(1, 2)}, [1, 2], {"x": 1}):
        torch.save(content, file)
        with pytest.raises(CheckpointError, match=r"router\.pth"):
            checkpoint.load_router(file)
    file.write_bytes(b"not a pickle")
    with pytest.raises(CheckpointError, match=r"router\.pth"):
        checkpoint.load_router(file)
    checkpoint.save_model(tmp_path / "model", tree(), meta())
    with pytest.raises(CheckpointError, match="holds no router"):
        checkpoint.load_router(tmp_path / "model")


# Where one array cannot be read Orbax closes the loop that TensorStore may still tell of others.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("file", ["state/_METADATA", "iterator/metadata", "state/d/*"])
def test_a_damaged_checkpoint_of_training_leaves_the_one_before(tmp_path: Path, file: str) -> None:
    states = [State(jnp.int32(n), {"a": jnp.full((8, 8), n)}, {}) for n in (1, 2)]
    with closing(resume.Checkpoints(tmp_path, keep=2)) as checkpoints:
        for state in states:
            checkpoints.save(state, {"next_batch": int(state.step)})
    newest = tmp_path / "checkpoints" / "2"
    for damaged in newest.glob(file):
        damaged.write_bytes(damaged.read_bytes()[:10])
    told = pytest.raises(CheckpointError, match=r"checkpoints/2 cannot be read .* remove this")
    with closing(resume.Checkpoints(tmp_path, keep=2)) as checkpoints, told:
        checkpoints.restore(2, states[0])
    shutil.rmtree(newest)
    with closing(resume.Checkpoints(tmp_path, keep=2)) as checkpoints:
        assert checkpoints.latest() == 1
        state, place = checkpoints.restore(1, states[1])
    np.testing.assert_array_equal(state.train["a"], np.ones((8, 8)))
    assert place == {"next_batch": 1}
