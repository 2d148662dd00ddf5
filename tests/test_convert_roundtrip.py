"""PyTorch -> JAX -> PyTorch gives every tensor back to the bit, and an unchanged config.json."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch_folders as folders  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from medmoe_jax.checkpoint import load_model  # noqa: E402
from medmoe_jax.convert import (  # noqa: E402
    to_jax,
    to_torch,
    torch_files,
)

GOLDEN = (
    "phi_top1",
    "phi_top2",
    "phi_dense_stage2",
    "stablelm_top1",
    "stablelm_top2",
    "stablelm_dense_stage2",
)


def load(folder: Path) -> folders.Tensors:
    """All tensors of a written folder, sharded or not."""
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def assert_same(ours: folders.Tensors, theirs: folders.Tensors) -> None:
    """Same keys, dtypes and bits."""
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype, key
        as_bytes = [t.contiguous().flatten().view(torch.uint8) for t in (ours[key], tensor)]
        assert torch.equal(*as_bytes), key


def round_trip(src: Path, tmp: Path, **options: str) -> Path:
    """Converts to JAX and back; returns the written PyTorch folder."""
    to_jax(src, tmp / "jax", **options)
    to_torch(tmp / "jax", tmp / "torch")
    return tmp / "torch"


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_folders_come_back(fixtures: Path, tmp_path: Path, name: str, kind: str) -> None:
    src = tmp_path / "src"
    unused = "pytorch_model.bin" if kind == "safetensors" else "model.safetensors"
    shutil.copytree(fixtures / name, src, ignore=shutil.ignore_patterns("*io.safetensors"))
    (src / unused).unlink()
    out = round_trip(src, tmp_path)
    assert_same(load(out), load_file(fixtures / name / "model.safetensors"))
    assert_same(load(out / "clip"), load_file(fixtures / name / "clip" / "model.safetensors"))
    for file in ("config.json", "generation_config.json", "clip/config.json"):
        assert json.loads((out / file).read_text()) == json.loads((src / file).read_text()), file
    file = "clip/preprocessor_config.json"
    assert (out / file).read_bytes() == (src / file).read_bytes()


PLACEMENTS = {
    "sparse": (0, 2),
    "first_half": (0, 1),
    "second_half": (2, 3),
    "dense": (0, 1, 2, 3),
    "1": (1,),
    "0,3": (0, 3),
}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_placement(tmp_path: Path, placement: str) -> None:
    mode = placement if placement.isalpha() or "_" in placement else "second_half"
    spec = folders.Spec(moe_layers=PLACEMENTS[placement], moe_mode=mode)
    tensors = folders.write_official(tmp_path / "src", spec)
    out = round_trip(tmp_path / "src", tmp_path)
    assert_same(load(out), tensors)
    _, meta = load_model(tmp_path / "jax")
    assert meta.model.moe is not None and meta.model.moe.placement == placement
    assert json.loads((out / "config.json").read_text()) == folders.config(spec)


SPECS = {
    "phi-residual": folders.Spec(moe_layers=(1, 2), experts=2, residual=True, top_k=2),
    "phi-mha": folders.Spec(kv_heads=4, projector="linear"),
    "stablelm": folders.Spec("stablelm", projector="mlp3x_gelu"),
    "stablelm-residual": folders.Spec("stablelm", moe_layers=(0, 2), residual=True),
    "stablelm-six": folders.Spec("stablelm", moe_layers=(0, 2), experts=6, qkv_bias=False),
}


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", SPECS)
def test_every_form(tmp_path: Path, name: str, shards: int, kind: str) -> None:
    tensors = folders.write_official(tmp_path / "src", SPECS[name], kind=kind, shards=shards)
    out = round_trip(tmp_path / "src", tmp_path)
    assert_same(load(out), tensors)
    assert json.loads((out / "config.json").read_text()) == folders.config(SPECS[name])


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_dtype(tmp_path: Path, dtype: torch.dtype, kind: str) -> None:
    spec = folders.Spec(moe_layers=(0, 2))
    tensors = folders.write_official(tmp_path / "src", spec, dtype, kind=kind)
    out = round_trip(tmp_path / "src", tmp_path)
    assert_same(load(out), tensors)
    params, _ = load_model(tmp_path / "jax")
    kernel = params["llm"]["lm_head"]["kernel"]
    assert kernel.dtype.name == str(dtype).removeprefix("torch.")
    name = kernel.dtype.name
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == name


def test_vision_tower_in_half_precision(tmp_path: Path) -> None:
    """Float32 language model and CLIP folder, float16 copy of the tower in the checkpoint."""
    spec = folders.Spec()
    tensors = folders.write_official(tmp_path / "src", spec, clip_dtype=torch.float16)
    out = round_trip(tmp_path / "src", tmp_path)
    assert_same(load(out), tensors)
    assert_same(load(out / "clip"), load_file(tmp_path / "src/clip/model.safetensors"))
    params, _ = load_model(tmp_path / "jax")
    assert params["vision"]["layers"]["fc1"]["kernel"].dtype == np.float32


def test_mixed_dtypes_in_one_leaf(tmp_path: Path) -> None:
    """Layers of one stacked leaf in float16, bfloat16 and float32."""
    spec = folders.Spec()
    tensors = folders.write_official(tmp_path / "src", spec)
    key = "model.layers.{}.mlp.fc1.weight"
    tensors[key.format(0)] = tensors[key.format(0)].half()
    tensors[key.format(1)] = tensors[key.format(1)].bfloat16()
    tower = load_file(tmp_path / "src/clip/model.safetensors")
    name = "vision_model.encoder.layers.1.mlp.fc1.weight"
    tower[name] = tower[name].bfloat16()
    tensors[folders.INNER + name] = tower[name].float()
    folders.write_weights(tmp_path / "src", tensors)
    folders.write_weights(tmp_path / "src/clip", tower)
    out = round_trip(tmp_path / "src", tmp_path)
    assert_same(load(out), tensors)
    assert_same(load(out / "clip"), tower)
    params, meta = load_model(tmp_path / "jax")
    assert params["llm"]["mlp"]["fc1"]["kernel"].dtype == np.float32
    assert meta.dtypes[key.format(0)] == "float16"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_unusual_numbers(tmp_path: Path, dtype: torch.dtype) -> None:
    """NaN with a payload, infinities, negative zero and subnormals keep their bits."""
    tensors = folders.write_official(tmp_path / "src", folders.Spec(), dtype)
    word = torch.int32 if dtype == torch.float32 else torch.int16
    generator = torch.Generator().manual_seed(3)
    for tensor in tensors.values():
        bits = tensor.view(word)
        bits.random_(torch.iinfo(word).min, torch.iinfo(word).max, generator=generator)
    tower = {k.removeprefix(folders.INNER): v for k, v in tensors.items() if folders.INNER in k}
    folders.write_weights(tmp_path / "src", tensors)
    folders.write_weights(tmp_path / "src/clip", tower)
    out = round_trip(tmp_path / "src", tmp_path)
    assert_same(load(out), tensors)
    assert_same(load(out / "clip"), tower)


def test_jax_torch_jax(tmp_path: Path) -> None:
    """The other direction: a model folder comes back as it was."""
    spec = folders.Spec("stablelm", moe_layers=(1, 3), residual=True)
    folders.write_official(tmp_path / "src", spec, torch.bfloat16)
    out = round_trip(tmp_path / "src", tmp_path)
    to_jax(out, tmp_path / "again")
    first, meta = load_model(tmp_path / "jax")
    second, again = load_model(tmp_path / "again")
    assert again.model == meta.model and again.torch_config == meta.torch_config
    compare = lambda a, b: np.testing.assert_array_equal(a.view("u2"), b.view("u2"))  # noqa: E731
    torch.utils._pytree.tree_map(compare, first, second)


def test_places_of_tensors(tmp_path: Path) -> None:
    """Some tensors by hand: transposed kernels, the convolution, the stacking of the experts."""
    spec = folders.Spec(moe_layers=(1, 3))
    t = {k: v.numpy() for k, v in folders.write_official(tmp_path / "src", spec).items()}
    to_jax(tmp_path / "src", tmp_path / "jax")
    params, _ = load_model(tmp_path / "jax")
    llm = params["llm"]
    np.testing.assert_array_equal(
        llm["layers"]["attn"]["k"]["kernel"][2], t["model.layers.2.self_attn.k_proj.weight"].T
    )
    np.testing.assert_array_equal(
        llm["mlp"]["fc1"]["kernel"][1], t["model.layers.2.mlp.fc1.weight"].T
    )
    expert = "model.layers.3.mlp.deepspeed_moe.experts.deepspeed_experts.2.fc2"
    np.testing.assert_array_equal(
        llm["moe"]["experts"]["fc2"]["kernel"][1, 2], t[f"{expert}.weight"].T
    )
    np.testing.assert_array_equal(
        llm["moe"]["router"]["fc1"]["bias"][1], t["model.layers.3.mlp.deepspeed_moe.gate.wg.bias"]
    )
    patch = t[f"{folders.INNER}vision_model.embeddings.patch_embedding.weight"]
    kernel = params["vision"]["patch_embedding"]["kernel"]
    assert kernel.shape == (4, 4, 3, 16)
    assert kernel[1, 2, 0, 5] == patch[5, 0, 1, 2]
    np.testing.assert_array_equal(
        params["projector"]["fc1"]["kernel"],
        t["model.mm_projector.image_spatial_proj.2.weight"].T,
    )


def test_shards_are_written(tmp_path: Path) -> None:
    spec = folders.Spec(moe_layers=(0, 2))
    tensors = folders.write_official(tmp_path / "src", spec, torch.bfloat16)
    to_jax(tmp_path / "src", tmp_path / "jax")
    to_torch(tmp_path / "jax", tmp_path / "torch", shard_bytes=10_000)
    files = sorted((tmp_path / "torch").glob("model-*.safetensors"))
    assert len(files) > 3 and not (tmp_path / "torch/model.safetensors").exists()
    assert_same(load(tmp_path / "torch"), tensors)
    index = json.loads((tmp_path / "torch/model.safetensors.index.json").read_text())
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    assert index["metadata"]["total_size"] == size
    for file in files:
        for key in load_file(file):
            assert index["weight_map"][key] == file.name
    to_jax(tmp_path / "torch", tmp_path / "again")


def test_pickle_is_reopened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_files, "REOPEN_BYTES", 1)
    tensors = folders.write_official(tmp_path / "src", folders.Spec(), kind="bin")
    assert_same(load(round_trip(tmp_path / "src", tmp_path)), tensors)


def test_old_pickle_format(tmp_path: Path) -> None:
    """Files from before torch 1.6 cannot be mapped into memory."""
    tensors = folders.write_official(tmp_path / "src", folders.Spec(), kind="bin")
    file = tmp_path / "src/pytorch_model.bin"
    torch.save(tensors, file, _use_new_zipfile_serialization=False)
    assert_same(load(round_trip(tmp_path / "src", tmp_path)), tensors)


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
def test_dtype_on_request(tmp_path: Path, name: str) -> None:
    tensors = folders.write_official(tmp_path / "src", folders.Spec())
    to_jax(tmp_path / "src", tmp_path / "jax")
    to_torch(tmp_path / "jax", tmp_path / "torch", dtype=name)
    dtype = getattr(torch, name)
    assert_same(load(tmp_path / "torch"), {k: v.to(dtype) for k, v in tensors.items()})
    assert {t.dtype for t in load(tmp_path / "torch/clip").values()} == {dtype}
    for file in ("config.json", "clip/config.json"):
        assert json.loads((tmp_path / "torch" / file).read_text())["torch_dtype"] == name


def test_safetensors_files_are_the_librarys(tmp_path: Path) -> None:
    """Reads what the safetensors library writes and the other way round, every float dtype."""
    from medmoe_jax.convert import torch_output

    arrays = {
        "a": np.arange(3, dtype=np.float16),
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "c": np.array(2.5, ml_dtypes.bfloat16),
        "d": np.zeros((0, 4), np.float32),
    }
    new = [
        torch_output.NewTensor(k, a.dtype.name, a.shape, lambda a=a: a) for k, a in arrays.items()
    ]
    torch_output.write_safetensors(tmp_path / "ours.safetensors", new)
    theirs = load_file(tmp_path / "ours.safetensors")
    save_file(theirs, tmp_path / "theirs.safetensors")
    for file in ("ours", "theirs"):
        weights = torch_files.Weights([tmp_path / f"{file}.safetensors"])
        for key, array in arrays.items():
            read = weights.read(key)
            assert read.dtype == array.dtype and read.shape == array.shape
            np.testing.assert_array_equal(read, array)
