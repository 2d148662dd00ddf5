"""Models made of parts: language model, CLIP, projector and router of different folders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import torch_folders as folders  # noqa: E402
from hf_folders import assert_equal_trees, ignored, make_clip, make_llm, make_tokenizer  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from medmoe_jax.checkpoint import load_model, load_router, read_meta  # noqa: E402
from medmoe_jax.convert import to_jax, to_torch  # noqa: E402


@pytest.mark.parametrize("family", ["phi", "stablelm"])
def test_parts_make_a_starting_point(tmp_path: Path, family: str) -> None:
    """Language model + CLIP + projector + router; then out in the official layout and in again."""
    make_llm(tmp_path / "llm", family)
    clip = make_clip(tmp_path / "clip")
    make_tokenizer(tmp_path / "tokenizer")
    spec = folders.Spec()
    projector = folders.random_tensors(folders.projector_shapes(spec), torch.bfloat16)
    router = folders.router(24, 4)
    torch.save(projector, tmp_path / "mm_projector.bin")
    torch.save(router, tmp_path / "router.pth")
    report = to_jax(
        tmp_path / "llm",
        tmp_path / "jax",
        vision=tmp_path / "clip",
        projector=tmp_path / "mm_projector.bin",
        router=tmp_path / "router.pth",
        tokenizer=tmp_path / "tokenizer",
    )
    params, meta = load_model(tmp_path / "jax")
    assert params.keys() == {"vision", "projector", "llm", "router"} and meta.stage == "router"
    dropped = ignored(report)
    assert dropped == (["lm_head.bias"] if family == "phi" else [])
    assert not meta.model.llm.lm_head_bias
    assert (tmp_path / "jax/tokenizer/tokenizer.json").is_file()
    to_torch(tmp_path / "jax", tmp_path / "torch")
    out = tmp_path / "torch"
    config = json.loads((out / "config.json").read_text())
    name = {"phi": "Phi", "stablelm": "Stablelm"}[family]
    assert config["architectures"] == [f"Llava{name}ForCausalLM"]
    assert config["model_type"] == f"llava_{family}" and config["mm_image_tower"] == "./clip"
    assert config["mm_hidden_size"] == 16 and config["eos_token_id"] == 2
    assert "rope_parameters" not in config and config["rope_theta"] == 10000.0
    written = torch.load(out / "router.pth", weights_only=True)
    assert all(torch.equal(written[k], router[k]) for k in router) and len(written) == 2
    tensors = load_file(out / "model.safetensors")
    assert all(torch.equal(tensors[k], projector[k]) for k in projector)
    for key, tensor in clip.state_dict().items():
        key = key.removeprefix("vision_model.")
        assert torch.equal(tensors[f"{folders.INNER}vision_model.{key}"], tensor)
    report = to_jax(out, tmp_path / "again", router=out / "router.pth")
    assert_equal_trees(load_model(tmp_path / "again")[0], params)


def test_new_projector(tmp_path: Path) -> None:
    """Uniform within 1/sqrt(inputs) like torch's Linear, decided by the seed."""
    make_llm(tmp_path / "llm", "phi")
    make_clip(tmp_path / "clip")
    trees = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        report = to_jax(tmp_path / "llm", tmp_path / name, vision=tmp_path / "clip", seed=seed)
        assert "at random" in report.text() and report.stage.startswith("base")
        trees.append(load_model(tmp_path / name)[0]["projector"])
    assert_equal_trees(trees[0], trees[1])
    first, second = trees[0]["fc0"], trees[0]["fc1"]
    assert not np.array_equal(first["kernel"], trees[2]["fc0"]["kernel"])
    assert first["kernel"].shape == (16, 24) and second["kernel"].shape == (24, 24)
    for layer, inputs in ((first, 16), (second, 24)):
        bound = inputs**-0.5
        assert 0.9 * bound < np.abs(layer["kernel"]).max() <= bound
        assert 0.4 * bound < np.abs(layer["bias"]).mean() < 0.6 * bound
        np.testing.assert_allclose(layer["kernel"].std(), bound / 3**0.5, rtol=0.1)


def test_stage_1_folder(tmp_path: Path) -> None:
    """A projector and a configuration alone, with the base models beside it; written as such."""
    make_llm(tmp_path / "llm", "phi")
    make_clip(tmp_path / "clip")
    spec = folders.Spec(layers=2)
    projector = folders.random_tensors(folders.projector_shapes(spec))
    config = folders.config(spec) | {"architectures": ["PhiForCausalLM"]}
    folders.write_json(tmp_path / "src/config.json", config)
    torch.save(projector, tmp_path / "src/mm_projector.bin")
    parts = {"llm": tmp_path / "llm", "vision": tmp_path / "clip"}
    report = to_jax(tmp_path / "src", tmp_path / "jax", **parts)
    assert report.stage == "stage1 (dense)"
    to_torch(tmp_path / "jax", tmp_path / "torch")
    written = torch.load(tmp_path / "torch/mm_projector.bin", weights_only=True)
    assert written.keys() == projector.keys()
    assert all(torch.equal(written[k], projector[k]) for k in projector)
    out = json.loads((tmp_path / "torch/config.json").read_text())
    assert out["architectures"] == ["LlavaPhiForCausalLM"] and out["a_field_of_its_own"]
    again = to_jax(tmp_path / "torch", tmp_path / "again")
    assert again.stage == "stage1 (dense)"
    assert_equal_trees(load_model(tmp_path / "again")[0], load_model(tmp_path / "jax")[0])


def test_projector_of_another_folder(tmp_path: Path) -> None:
    """--projector replaces the checkpoint's, and its depth is read off the file."""
    folders.write_official(tmp_path / "src", folders.Spec())
    projector = folders.random_tensors(
        folders.projector_shapes(folders.Spec(projector="mlp3x_gelu")), seed=9
    )
    (tmp_path / "stage1").mkdir()
    torch.save(projector, tmp_path / "stage1/mm_projector.bin")
    report = to_jax(tmp_path / "src", tmp_path / "jax", projector=tmp_path / "stage1")
    assert len(report.ignored["replaced by the projector file"]) == 4
    params, meta = load_model(tmp_path / "jax")
    assert meta.model.projector == "mlp3x_gelu" and len(params["projector"]) == 3
    to_torch(tmp_path / "jax", tmp_path / "torch")
    config = json.loads((tmp_path / "torch/config.json").read_text())
    assert config["image_projector_type"] == "mlp3x_gelu" and config["a_field_of_its_own"]


def test_router_into_every_moe_layer(tmp_path: Path) -> None:
    spec = folders.Spec(moe_layers=(0, 1, 3), experts=3)
    folders.write_official(tmp_path / "src", spec)
    router = folders.router(spec.width, 3)
    torch.save(router, tmp_path / "router.pth")
    report = to_jax(tmp_path / "src", tmp_path / "jax", router=tmp_path / "router.pth")
    assert len(report.ignored["replaced by the router file"]) == 6
    params, _ = load_model(tmp_path / "jax")
    assert "router" not in params
    layer = params["llm"]["moe"]["router"]["fc1"]
    for i in range(3):
        np.testing.assert_array_equal(layer["kernel"][i], router["fc1.weight"].numpy().T)
        np.testing.assert_array_equal(layer["bias"][i], router["fc1.bias"].numpy())


@pytest.mark.parametrize("depth", [2, 3])
def test_deep_routers(tmp_path: Path, depth: int) -> None:
    """Routers of two and three layers: on their own, and in a MoE model and back."""
    spec = folders.Spec(moe_layers=(0, 2), experts=3)
    folders.write_official(tmp_path / "src", spec)
    torch.save(folders.router(spec.width, 3, depth), tmp_path / "router.pth")
    to_jax(tmp_path / "router.pth", tmp_path / "alone")
    params, meta = load_model(tmp_path / "alone")
    assert meta.model.llm.width == spec.width and len(params["router"]) == depth
    assert_equal_trees(load_router(tmp_path / "router.pth"), params["router"])
    assert_equal_trees(load_router(tmp_path / "alone"), params["router"])
    to_torch(tmp_path / "alone", tmp_path / "out")
    theirs, ours = (
        torch.load(tmp_path / n, weights_only=True) for n in ("router.pth", "out/router.pth")
    )
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    to_jax(tmp_path / "src", tmp_path / "jax", router=tmp_path / "router.pth")
    report = to_torch(tmp_path / "jax", tmp_path / "torch")
    assert "will not load" in report.text()
    to_jax(tmp_path / "torch", tmp_path / "again")
    moe = read_meta(tmp_path / "again").model.moe
    assert moe is not None and moe.router_layers == depth
    assert_equal_trees(load_model(tmp_path / "again")[0], load_model(tmp_path / "jax")[0])


@pytest.mark.parametrize("name", ["phi", "stablelm"])
def test_shipped_routers(fixtures: Path, tmp_path: Path, name: str) -> None:
    source = fixtures / "routers" / f"{name}_router.pth"
    to_jax(source, tmp_path / "jax")
    params, meta = load_model(tmp_path / "jax")
    width = {"phi": 2560, "stablelm": 2048}[name]
    assert params["router"]["fc1"]["kernel"].shape == (width, 4)
    assert meta.model.llm.width == width
    to_torch(tmp_path / "jax", tmp_path / "torch")
    ours = torch.load(tmp_path / "torch/router.pth", weights_only=True)
    theirs = torch.load(source, weights_only=True, map_location="cpu")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
