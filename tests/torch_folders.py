"""Writes small random checkpoint folders in the official Med-MoE layout, to test the conversion.

The names are written out here on their own, as the official classes save them, and are not taken
from the conversion's table.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Tensors = dict[str, Tensor]
INNER = "model.image_tower.image_tower."


@dataclass(frozen=True)
class Spec:
    """Shapes of one folder; small, and no two of them equal, so that a mix-up shows."""

    family: str = "phi"
    layers: int = 4
    width: int = 24
    heads: int = 4
    kv_heads: int = 2
    ffn: int = 20
    vocab: int = 50
    qkv_bias: bool = True
    moe_layers: tuple[int, ...] = ()
    moe_mode: str = "sparse"
    experts: int = 3
    top_k: int = 1
    residual: bool = False
    projector: str = "mlp2x_gelu"
    clip_width: int = 16
    clip_layers: int = 2
    clip_ffn: int = 28
    patch: int = 4
    image: int = 12


def linear(key: str, out: int, inp: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a torch Linear."""
    shapes: dict[str, tuple[int, ...]] = {f"{key}.weight": (out, inp)}
    return shapes | ({f"{key}.bias": (out,)} if bias else {})


def norm(key: str, width: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a torch LayerNorm."""
    return {f"{key}.weight": (width,), f"{key}.bias": (width,)}


def clip_shapes(s: Spec) -> dict[str, tuple[int, ...]]:
    """Names and shapes of CLIPVisionModel in transformers 4.37."""
    c, root = s.clip_width, "vision_model."
    shapes: dict[str, tuple[int, ...]] = {
        f"{root}embeddings.class_embedding": (c,),
        f"{root}embeddings.patch_embedding.weight": (c, 3, s.patch, s.patch),
        f"{root}embeddings.position_embedding.weight": ((s.image // s.patch) ** 2 + 1, c),
    }
    shapes |= norm(f"{root}pre_layrnorm", c) | norm(f"{root}post_layernorm", c)
    for i in range(s.clip_layers):
        key = f"{root}encoder.layers.{i}"
        shapes |= norm(f"{key}.layer_norm1", c) | norm(f"{key}.layer_norm2", c)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear(f"{key}.self_attn.{name}", c, c)
        shapes |= linear(f"{key}.mlp.fc1", s.clip_ffn, c) | linear(f"{key}.mlp.fc2", c, s.clip_ffn)
    return shapes


def projector_shapes(s: Spec) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the projector."""
    root = "model.mm_projector.image_spatial_proj"
    if s.projector == "linear":
        return linear(root, s.width, s.clip_width)
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(int(s.projector[3])):
        shapes |= linear(f"{root}.{2 * i}", s.width, s.width if i else s.clip_width)
    return shapes


def ffn_shapes(s: Spec, key: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one feed-forward network."""
    if s.family == "phi":
        return linear(f"{key}.fc1", s.ffn, s.width) | linear(f"{key}.fc2", s.width, s.ffn)
    return (
        linear(f"{key}.gate_proj", s.ffn, s.width, False)
        | linear(f"{key}.up_proj", s.ffn, s.width, False)
        | linear(f"{key}.down_proj", s.width, s.ffn, False)
    )


def llm_shapes(s: Spec) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the language model, with its experts."""
    w, phi = s.width, s.family == "phi"
    kv = s.kv_heads * w // s.heads
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (s.vocab, w),
        "lm_head.weight": (s.vocab, w),
    }
    shapes |= norm("model.final_layernorm" if phi else "model.norm", w)
    for i in range(s.layers):
        key = f"model.layers.{i}"
        shapes |= norm(f"{key}.input_layernorm", w)
        for name, out in (("q_proj", w), ("k_proj", kv), ("v_proj", kv)):
            shapes |= linear(f"{key}.self_attn.{name}", out, w, phi or s.qkv_bias)
        shapes |= linear(f"{key}.self_attn.{'dense' if phi else 'o_proj'}", w, w, phi)
        if not phi:
            shapes |= norm(f"{key}.post_attention_layernorm", w)
        if i not in s.moe_layers:
            shapes |= ffn_shapes(s, f"{key}.mlp")
            continue
        shapes |= linear(f"{key}.mlp.deepspeed_moe.gate.wg", s.experts, w)
        for e in range(s.experts):
            shapes |= ffn_shapes(s, f"{key}.mlp.deepspeed_moe.experts.deepspeed_experts.{e}")
        shapes |= ffn_shapes(s, f"{key}.mlp.meta_moe")
        if s.residual:
            shapes |= linear(f"{key}.mlp.coefficient", 2, w)
    return shapes


def random_tensors(
    shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32, seed: int = 0
) -> Tensors:
    """Normally distributed tensors of those shapes."""
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(s, generator=generator).to(dtype) for k, s in shapes.items()}


def config(s: Spec) -> dict[str, Any]:
    """config.json of the official classes."""
    phi = s.family == "phi"
    name = "Phi" if phi else "Stablelm"
    data: dict[str, Any] = {
        "architectures": [f"{'MoELLaVA' if s.moe_layers else 'Llava'}{name}ForCausalLM"],
        "model_type": f"{'moe_' if s.moe_layers else ''}llava_{s.family}",
        "vocab_size": s.vocab,
        "hidden_size": s.width,
        "intermediate_size": s.ffn,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads,
        "max_position_embeddings": 64,
        "rope_theta": 10000.0,
        "torch_dtype": "float32",
        "image_projector_type": s.projector,
        "mm_hidden_size": s.clip_width,
        "mm_image_tower": "./clip",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "a_field_of_its_own": [1, None],
    }
    data |= (
        {"hidden_act": "gelu_new", "partial_rotary_factor": 0.4, "layer_norm_eps": 1e-5}
        if phi
        else {"hidden_act": "silu", "rope_pct": 0.34, "norm_eps": 1e-5, "use_qkv_bias": s.qkv_bias}
    )
    if s.moe_layers:
        data["moe"] = {
            "moe_enable": True,
            "moe_mode": s.moe_mode,
            "moe_layers_idx": list(s.moe_layers),
            "num_experts": [s.experts] * len(s.moe_layers),
            "top_k_experts": s.top_k,
            "use_residual": s.residual,
            "router_aux_loss_coef": 0.01,
            "capacity_factor": 1.5,
        }
    return data


def clip_config(s: Spec) -> dict[str, Any]:
    """config.json of the CLIP folder."""
    return {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "hidden_size": s.clip_width,
        "intermediate_size": s.clip_ffn,
        "num_hidden_layers": s.clip_layers,
        "num_attention_heads": 2,
        "image_size": s.image,
        "patch_size": s.patch,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "torch_dtype": "float32",
    }


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Writes a JSON file and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))


def write_weights(
    folder: Path, tensors: Tensors, kind: str = "safetensors", shards: int = 1
) -> None:
    """Writes weights as Hugging Face names them; `kind` is "safetensors" or "bin"."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = {"safetensors": "model", "bin": "pytorch_model"}[kind]
    save = save_file if kind == "safetensors" else torch.save
    keys = list(tensors)
    parts = [keys[i::shards] for i in range(shards)]
    names = [f"{stem}-{i + 1:05}-of-{shards:05}.{kind}" for i in range(shards)]
    names = names if shards > 1 else [f"{stem}.{kind}"]
    for name, part in zip(names, parts, strict=True):
        save({k: tensors[k] for k in part}, folder / name)
    if shards > 1:
        index = {k: name for name, part in zip(names, parts, strict=True) for k in part}
        write_json(folder / f"{stem}.{kind}.index.json", {"metadata": {}, "weight_map": index})


def write_official(
    folder: Path,
    s: Spec,
    dtype: torch.dtype = torch.float32,
    clip_dtype: torch.dtype | None = None,
    kind: str = "safetensors",
    shards: int = 1,
) -> Tensors:
    """Writes a Med-MoE folder with its CLIP folder; returns the tensors of its checkpoint.

    The CLIP folder is float32 like OpenAI's, the copy in the checkpoint is of `clip_dtype`. In a
    `.bin` with `residual`, the meta experts are there twice, as the official code saves them.
    """
    tower = random_tensors(clip_shapes(s), dtype, seed=1)
    tensors = random_tensors(llm_shapes(s) | projector_shapes(s), dtype)
    tensors |= {INNER + k: v.to(clip_dtype or dtype) for k, v in tower.items()}
    aliases = {}
    if s.residual and kind == "bin":
        aliases = {k.replace("meta_moe", "mlp"): v for k, v in tensors.items() if "meta_moe" in k}
    write_weights(folder, tensors | aliases, kind, shards)
    name = str(dtype).removeprefix("torch.")
    write_json(folder / "config.json", config(s) | {"torch_dtype": name})
    # equal numbers in both places: the folder's are those that the copy was cast from
    source = (
        tower if clip_dtype is None else {k: v.to(clip_dtype).float() for k, v in tower.items()}
    )
    write_weights(folder / "clip", source)
    write_json(folder / "clip" / "config.json", clip_config(s))
    return tensors


def router(width: int, experts: int, layers: int = 1, seed: int = 5) -> Tensors:
    """Tensors of a router file."""
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(1, layers + 1):
        shapes |= linear(f"fc{i}", experts if i == layers else width, width)
    return random_tensors(shapes, seed=seed)
