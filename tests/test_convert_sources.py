"""Hugging Face folders in today's and older spellings, single parts and parts combined."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import torch_folders as folders  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from medmoe_jax.checkpoint import load_model, load_router, read_meta  # noqa: E402
from medmoe_jax.convert import Report, to_jax, to_torch  # noqa: E402

SIZES = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CLIP_SIZES = {
    "hidden_size": 16,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 12,
    "patch_size": 4,
}


def make_llm(folder: Path, family: str, **changes: Any) -> Any:
    """Saves a random language model with the installed transformers; returns it."""
    if family == "phi":
        config = transformers.PhiConfig(**(SIZES | changes))
    else:
        config = transformers.StableLmConfig(**(SIZES | {"use_qkv_bias": True} | changes))
    config.rope_parameters["partial_rotary_factor"] = 0.34  # 2 of 6 dimensions
    model = transformers.AutoModelForCausalLM.from_config(config)
    randomise(model).save_pretrained(folder)
    return model


def make_clip(folder: Path) -> Any:
    """Saves a random vision tower and its image settings; returns the tower."""
    model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**CLIP_SIZES))
    randomise(model).save_pretrained(folder)
    folders.write_json(folder / "preprocessor_config.json", {"crop_size": 12})
    return model


def randomise(model: Any) -> Any:
    """Gives every parameter random numbers, biases and norms too."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model.eval()


def make_tokenizer(folder: Path) -> None:
    """Writes files under a tokenizer's names."""
    folders.write_json(folder / "tokenizer.json", {"model": {}})
    folders.write_json(folder / "tokenizer_config.json", {"eos_token": "<|endoftext|>"})


def ignored(report: Report) -> list[str]:
    """All keys that were left out."""
    return [key for keys in report.ignored.values() for key in keys]


def assert_equal_trees(a: Any, b: Any) -> None:
    """Same names and numbers."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal_trees(a[key], b[key])
    else:
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("family", ["phi", "stablelm"])
def test_language_model_alone(tmp_path: Path, family: str) -> None:
    """Comes back to the bit (with Phi's bias of the output layer), and transformers loads it."""
    model = make_llm(tmp_path / "src", family)
    make_tokenizer(tmp_path / "src")
    report = to_jax(tmp_path / "src", tmp_path / "jax")
    assert not report.ignored and report.stage == "base (dense)"
    params, meta = load_model(tmp_path / "jax")
    assert params.keys() == {"llm"}
    assert meta.model.llm.lm_head_bias == (family == "phi")
    assert meta.model.llm.kv_heads == 2 and meta.model.llm.family == family
    assert meta.model.llm.rotary_dim == 2 and meta.model.llm.qkv_bias
    to_torch(tmp_path / "jax", tmp_path / "torch")
    ours = load_file(tmp_path / "torch/model.safetensors")
    theirs = load_file(tmp_path / "src/model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in theirs)
    for file in ("config.json", "generation_config.json", "tokenizer.json"):
        assert json.loads((tmp_path / "torch" / file).read_text()) == json.loads(
            (tmp_path / "src" / file).read_text()
        ), file
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "torch")
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def old_stablelm(config: dict[str, Any]) -> dict[str, Any]:
    """A StableLmConfig in the spelling of Stability's own code."""
    rope = config.pop("rope_parameters")
    for name in ("layer_norm_eps", "qk_layernorm", "use_parallel_residual", "dtype"):
        config.pop(name)
    return config | {
        "model_type": "stablelm_epoch",
        "architectures": ["StableLMEpochForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_stablelm_epoch.StableLMEpochConfig"},
        "norm_eps": 1e-5,
        "rope_pct": rope["partial_rotary_factor"],
        "rope_theta": 10000,
        "torch_dtype": "float32",
    }


def transformers4(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration in the spelling of transformers 4.37."""
    rope = config.pop("rope_parameters")
    rope.pop("rope_type")
    return config | rope | {"torch_dtype": config.pop("dtype"), "rope_scaling": None}


@pytest.mark.parametrize(
    ("family", "change"),
    [("phi", transformers4), ("stablelm", transformers4), ("stablelm", old_stablelm)],
)
def test_older_configurations(tmp_path: Path, family: str, change: Any) -> None:
    """The same weights under another spelling give the same model; written ones are today's."""
    model = make_llm(tmp_path / "new", family)
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    config = json.loads((tmp_path / "new/config.json").read_text())
    folders.write_json(tmp_path / "old/config.json", change(config))
    for name in ("new", "old"):
        to_jax(tmp_path / name, tmp_path / f"{name}_jax")
    new, old = read_meta(tmp_path / "new_jax"), read_meta(tmp_path / "old_jax")
    assert new.model == old.model
    to_torch(tmp_path / "old_jax", tmp_path / "torch")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "torch")
    ids = torch.arange(6)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def microsoft(tensors: folders.Tensors) -> folders.Tensors:
    """Phi's tensors in the names of Microsoft's own files, query, key and value in blocks."""
    out = {}
    names = (
        ("model.embed_tokens", "transformer.embd.wte"),
        ("model.final_layernorm", "lm_head.ln"),
        ("lm_head", "lm_head.linear"),
        ("model.layers", "transformer.h"),
        ("input_layernorm", "ln"),
        ("self_attn.dense", "mixer.out_proj"),
    )
    for key, tensor in tensors.items():
        if ".k_proj." in key or ".v_proj." in key:
            continue
        if ".q_proj." in key:
            parts = [tensors[key.replace("q_proj", p)] for p in ("q_proj", "k_proj", "v_proj")]
            key, tensor = key.replace("self_attn.q_proj", "mixer.Wqkv"), torch.cat(parts)
        old, new = next(((a, b) for a, b in names if key.startswith(a)), ("", ""))
        key = new + key.removeprefix(old)
        for old, new in names[4:]:
            key = key.replace(old, new)
        out[key] = tensor
    out["transformer.h.0.mixer.rotary_emb.inv_freq"] = torch.ones(4)
    return out


def first_transformers(tensors: folders.Tensors) -> folders.Tensors:
    """Phi's tensors as of transformers 4.36: query, key and value fused head by head."""
    out = {}
    for key, tensor in tensors.items():
        if ".q_proj." in key:
            parts = [tensors[key.replace("q_proj", p)] for p in ("q_proj", "k_proj", "v_proj")]
            heads = torch.stack([p.reshape(4, 6, *p.shape[1:]) for p in parts], 1)
            out[key.replace("q_proj", "query_key_value")] = heads.reshape(72, *tensor.shape[1:])
        elif ".k_proj." not in key and ".v_proj." not in key:
            out[key] = tensor
    return out


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_microsofts_phi(tmp_path: Path, kind: str) -> None:
    """Key names, fused projections (grouped queries too) and configuration of phi-msft."""
    make_llm(tmp_path / "new", "phi")
    tensors = load_file(tmp_path / "new/model.safetensors")
    folders.write_weights(tmp_path / "old", microsoft(tensors), kind)
    config = {
        "model_type": "phi-msft",
        "architectures": ["PhiForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_phi.PhiConfig"},
        "activation_function": "gelu_new",
        "n_embd": 24,
        "n_head": 4,
        "n_head_kv": 2,
        "n_inner": 20,
        "n_layer": 2,
        "n_positions": 64,
        "rotary_dim": 2,
        "layer_norm_epsilon": 1e-5,
        "vocab_size": 50,
        "torch_dtype": "float32",
    }
    folders.write_json(tmp_path / "old/config.json", config)
    report = to_jax(tmp_path / "old", tmp_path / "old_jax")
    assert ignored(report) == ["transformer.h.0.mixer.rotary_emb.inv_freq"]
    to_jax(tmp_path / "new", tmp_path / "new_jax")
    old, meta = load_model(tmp_path / "old_jax")
    assert_equal_trees(old, load_model(tmp_path / "new_jax")[0])
    assert meta.model.llm.rotary_dim == 2 and meta.model.llm.kv_heads == 2
    to_torch(tmp_path / "old_jax", tmp_path / "torch")
    written = load_file(tmp_path / "torch/model.safetensors")
    assert all(torch.equal(written[k], tensors[k]) for k in tensors)
    modern = json.loads((tmp_path / "torch/config.json").read_text())
    assert modern["model_type"] == "phi" and not {"n_embd", "auto_map"} & modern.keys()


def test_phi_of_transformers_4_36(tmp_path: Path) -> None:
    make_llm(tmp_path / "new", "phi", num_key_value_heads=4)
    tensors = load_file(tmp_path / "new/model.safetensors")
    folders.write_weights(tmp_path / "old", first_transformers(tensors))
    shutil.copyfile(tmp_path / "new/config.json", tmp_path / "old/config.json")
    for name in ("new", "old"):
        to_jax(tmp_path / name, tmp_path / f"{name}_jax")
    assert_equal_trees(load_model(tmp_path / "old_jax")[0], load_model(tmp_path / "new_jax")[0])


def test_clip_alone(tmp_path: Path) -> None:
    """Today's keys (without prefix), and back; transformers loads it."""
    model = make_clip(tmp_path / "src")
    to_jax(tmp_path / "src", tmp_path / "jax")
    params, meta = load_model(tmp_path / "jax")
    assert params.keys() == {"vision"} and meta.torch_config is None
    assert (tmp_path / "jax/preprocessor_config.json").is_file()
    to_torch(tmp_path / "jax", tmp_path / "torch")
    config, written = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("src", "torch")
    )
    assert config == written
    again = transformers.CLIPVisionModel.from_pretrained(tmp_path / "torch").eval()
    for key, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key


def test_full_clip_model(tmp_path: Path) -> None:
    """The text side is left out with a reason, position buffers too; settings are nested."""
    text = CLIP_SIZES | {"vocab_size": 50, "projection_dim": 8, "bos_token_id": 1}
    text |= {"eos_token_id": 2}
    sizes = CLIP_SIZES | {"projection_dim": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=sizes, projection_dim=8)
    model = randomise(transformers.CLIPModel(config))
    model.save_pretrained(tmp_path / "src")
    tensors = load_file(tmp_path / "src/model.safetensors")
    tensors["vision_model.embeddings.position_ids"] = torch.arange(10)[None]
    tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    (tmp_path / "src/model.safetensors").unlink()
    folders.write_weights(tmp_path / "src", tensors, "bin")  # OpenAI's folders hold a .bin
    report = to_jax(tmp_path / "src", tmp_path / "jax")
    left_out = ignored(report)
    kept = [k for k in tensors if k.startswith("vision_model.") and "position_ids" not in k]
    assert report.converted == len(kept) and len(left_out) == len(tensors) - len(kept)
    assert len(report.ignored) == 2 and "text" in report.text()
    to_torch(tmp_path / "jax", tmp_path / "torch")
    again = transformers.CLIPVisionModel.from_pretrained(tmp_path / "torch").eval()
    pixels = torch.rand(1, 3, 12, 12)
    with torch.no_grad():
        ours, theirs = again(pixels), model.vision_model(pixels)
    assert torch.equal(ours.last_hidden_state, theirs.last_hidden_state)


def test_nested_clip_settings_have_their_defaults(tmp_path: Path) -> None:
    """transformers 4.37 leaves out what equals a default."""
    from medmoe_jax.convert.configs import read_vision

    config = {"model_type": "clip", "vision_config": {"model_type": "clip_vision_model"}}
    theirs = transformers.CLIPVisionConfig()
    vision = read_vision(config, tmp_path)
    assert (vision.width, vision.layers, vision.heads, vision.ffn) == (768, 12, 12, 3072)
    assert (vision.image_size, vision.patch_size) == (theirs.image_size, theirs.patch_size)
    assert (vision.activation, vision.norm_eps) == (theirs.hidden_act, theirs.layer_norm_eps)


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


def test_tower_inside_the_checkpoint(tmp_path: Path) -> None:
    """Used where no CLIP folder has weights; its heads come from a config.json, or by custom."""
    spec = folders.Spec(clip_width=512, clip_layers=1, clip_ffn=8)
    tensors = folders.write_official(tmp_path / "src", spec)
    shutil.rmtree(tmp_path / "src/clip")
    report = to_jax(tmp_path / "src", tmp_path / "guessed")
    assert "8 heads" in report.text() and "inside the checkpoint" in report.text()
    vision = read_meta(tmp_path / "guessed").model.vision
    assert (vision.image_size, vision.patch_size, vision.ffn, vision.layers) == (12, 4, 8, 1)
    folders.write_json(tmp_path / "clip/config.json", folders.clip_config(spec))
    to_jax(tmp_path / "src", tmp_path / "told", vision=tmp_path / "clip")
    meta = read_meta(tmp_path / "told")
    assert meta.model.vision.heads == 2 and meta.clip_config == folders.clip_config(spec)
    to_torch(tmp_path / "told", tmp_path / "torch")
    written = load_file(tmp_path / "torch/model.safetensors")
    assert all(torch.equal(written[k], tensors[k]) for k in tensors)
    config = json.loads((tmp_path / "torch/config.json").read_text())
    assert config["mm_image_tower"] == "./clip"


def test_clip_folder_takes_precedence(tmp_path: Path) -> None:
    """As in the official code; that the two differ is said."""
    spec = folders.Spec()
    folders.write_official(tmp_path / "src", spec)
    other = folders.random_tensors(folders.clip_shapes(spec), seed=77)
    folders.write_weights(tmp_path / "other", other)
    folders.write_json(tmp_path / "other/config.json", folders.clip_config(spec))
    report = to_jax(tmp_path / "src", tmp_path / "jax", vision=tmp_path / "other")
    assert f"{len(other)} CLIP tensors inside the checkpoint differ" in report.text()
    params, _ = load_model(tmp_path / "jax")
    np.testing.assert_array_equal(
        params["vision"]["class_embedding"],
        other["vision_model.embeddings.class_embedding"].numpy(),
    )


def test_layout_hf(tmp_path: Path) -> None:
    """A dense model as plain folders: transformers loads both, and the parts combine again."""
    spec = folders.Spec("stablelm")
    tensors = folders.write_official(tmp_path / "src", spec)
    to_jax(tmp_path / "src", tmp_path / "jax")
    to_torch(tmp_path / "jax", tmp_path / "hf", layout="hf")
    out = tmp_path / "hf"
    llm, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    assert llm.config.rope_parameters["partial_rotary_factor"] == 0.34
    for key, tensor in llm.state_dict().items():
        assert torch.equal(tensor, tensors[key]), key
    assert "mm_hidden_size" not in json.loads((out / "config.json").read_text())
    transformers.CLIPVisionModel.from_pretrained(out / "clip")
    to_jax(out, tmp_path / "again", vision=out / "clip", projector=out / "mm_projector.bin")
    assert_equal_trees(load_model(tmp_path / "again")[0], load_model(tmp_path / "jax")[0])


def test_layout_hf_gives_phi_a_bias_of_zeros(tmp_path: Path) -> None:
    folders.write_official(tmp_path / "src", folders.Spec())
    to_jax(tmp_path / "src", tmp_path / "jax")
    report = to_torch(tmp_path / "jax", tmp_path / "hf", layout="hf")
    assert "zeros" in report.text()
    _, info = transformers.PhiForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values())
    assert not load_file(tmp_path / "hf/model.safetensors")["lm_head.bias"].any()
