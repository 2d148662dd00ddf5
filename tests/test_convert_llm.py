"""Language models alone: today's and older spellings, and the plain layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import tiny_data  # noqa: E402
import torch_folders as folders  # noqa: E402
from hf_folders import assert_equal_trees, ignored, make_clip, make_llm, make_tokenizer  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from medmoe_jax.checkpoint import load_model, read_meta  # noqa: E402
from medmoe_jax.convert import to_jax, to_torch  # noqa: E402


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


@pytest.mark.parametrize("layout", ["official", "hf"])
@pytest.mark.parametrize("family", ["phi", "stablelm"])
def test_written_tokenizer_loads_without_a_warning(
    tmp_path: Path, family: str, layout: str
) -> None:
    """transformers reads config.json too, and a warning of what it says is an error here."""
    make_llm(tmp_path / "llm", family)
    make_clip(tmp_path / "clip")
    tiny_data.save_tokenizer(tmp_path / "tokenizer")
    parts = {"vision": tmp_path / "clip", "tokenizer": tmp_path / "tokenizer"}
    to_jax(tmp_path / "llm", tmp_path / "jax", **parts)
    to_torch(tmp_path / "jax", tmp_path / "torch", layout=layout)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "torch")
    assert tokenizer.decode(tokenizer("no").input_ids) == "no"
