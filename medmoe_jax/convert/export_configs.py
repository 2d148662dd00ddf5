"""Writes `config.json` files for PyTorch.

A stored configuration that still describes the model is written as it came, to the letter;
otherwise it is the start, and what changed is put over it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from medmoe_jax.checkpoint import ModelMeta
from medmoe_jax.config import PLACEMENTS, LlmConfig, ModelConfig, VisionConfig
from medmoe_jax.convert.configs import read_llm, read_moe, read_vision
from medmoe_jax.convert.report import ConversionError

# fields of other releases, or of code on a hub, which would contradict the ones that are written
_DROPPED = (
    *("rope_parameters", "rope_scaling", "dtype", "auto_map"),
    *("n_embd", "n_head", "n_head_kv", "n_layer", "n_inner", "n_positions", "rotary_dim"),
    *("layer_norm_epsilon", "activation_function", "flash_attn", "flash_rotary", "fused_dense"),
)
_MULTIMODAL = ("mm_", "video_", "image_", "use_mm_", "tune_mm_", "freeze_mm_", "moe", "tokenizer_")


def official_config(
    meta: ModelMeta, keys: Collection[str], dtype: str, tower: str
) -> dict[str, Any]:
    """`config.json` that the official Med-MoE classes load.

    Args:
      meta: of the model.
      keys: PyTorch keys of the weights.
      dtype: of the language model, by name.
      tower: what `mm_image_tower` is to say.
    """
    model, stored = meta.model, meta.torch_config or {}
    model_type = f"{'moe_' if model.moe else ''}llava_{model.llm.family}"
    same = stored.get("model_type") == model_type and _describes(stored, model, keys)
    config = dict(stored) if same else {**_multimodal(model), **_without(stored, _DROPPED)}
    if not same:
        llm, select = model.llm, model.vision.select_layer
        config |= _phi(llm) if llm.family == "phi" else _stablelm_epoch(llm)
        config |= {"model_type": model_type, "mm_hidden_size": model.vision.width}
        config["mm_vision_select_layer"] = select
        config["image_projector_type"] = model.projector
        config.pop("moe", None)
        if model.moe:
            config["moe"] = _moe(model, stored.get("moe") or {})
    # set in every case: a stage-1 folder names the base model's class
    config["architectures"] = [_official_class(model)]
    return config | {"mm_image_tower": tower, "torch_dtype": dtype}


def plain_config(meta: ModelMeta, keys: Collection[str], dtype: str) -> dict[str, Any]:
    """`config.json` of the language model alone, for transformers' Phi and StableLm classes.

    Arguments as of `official_config`.
    """
    llm, stored = meta.model.llm, meta.torch_config or {}
    if stored.get("model_type") == llm.family and _describes_llm(stored, llm, keys):
        config = dict(stored)
        spelling = "dtype" if "torch_dtype" not in stored else "torch_dtype"
        return config | ({spelling: dtype} if stored.get(spelling) != dtype else {})
    config = {k: v for k, v in stored.items() if not k.startswith(_MULTIMODAL)}
    config = _without(config, (*_DROPPED, "rope_pct", "norm_eps"))
    phi = llm.family == "phi"
    config |= _phi(llm) if phi else _stablelm_epoch(llm)
    if not phi:
        del config["rope_pct"], config["norm_eps"]
        config["partial_rotary_factor"] = llm.rotary_fraction
        config["layer_norm_eps"] = llm.norm_eps
    config |= {"model_type": llm.family, "torch_dtype": dtype}
    config["architectures"] = ["PhiForCausalLM" if phi else "StableLmForCausalLM"]
    return config


def clip_config(meta: ModelMeta, dtype: str) -> dict[str, Any]:
    """`config.json` of the vision tower alone, for transformers' CLIPVisionModel.

    A stored configuration of a full CLIP model is reduced to its vision part, since only that is
    kept.
    """
    stored, vision = meta.clip_config or {}, meta.model.vision
    if stored.get("model_type") == "clip_vision_model" and _describes_vision(stored, vision):
        spelling = "dtype" if "torch_dtype" not in stored else "torch_dtype"
        return stored | ({spelling: dtype} if stored.get(spelling) != dtype else {})
    nested = stored.get("vision_config") or {} if stored.get("model_type") == "clip" else {}
    config = _without(nested, _DROPPED)
    config |= {
        "model_type": "clip_vision_model",
        "architectures": ["CLIPVisionModel"],
        "hidden_size": vision.width,
        "intermediate_size": vision.ffn,
        "num_hidden_layers": vision.layers,
        "num_attention_heads": vision.heads,
        "num_channels": 3,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "hidden_act": vision.activation,
        "layer_norm_eps": vision.norm_eps,
        "torch_dtype": dtype,
    }
    return config


def preprocessor_config(vision: VisionConfig) -> dict[str, Any]:
    """`preprocessor_config.json`: CLIP's steps, at the tower's image size, mean and deviation."""
    size = vision.image_size
    return {
        "crop_size": {"height": size, "width": size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(vision.mean),
        "image_processor_type": "CLIPImageProcessor",
        "image_std": list(vision.std),
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": size},
    }


def _without(config: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in names}


def _describes_llm(stored: dict[str, Any], llm: LlmConfig, keys: Collection[str]) -> bool:
    """Whether a stored configuration still gives the language model's shapes."""
    try:
        return read_llm(stored, keys, Path("config.json")) == llm
    except ConversionError:
        return False


def _describes_vision(stored: dict[str, Any], vision: VisionConfig) -> bool:
    """Whether a stored configuration still gives the vision tower's shapes."""
    try:
        shapes = read_vision(stored, Path("config.json"), vision.select_layer)
    except ConversionError:
        return False
    return replace(shapes, mean=vision.mean, std=vision.std) == vision  # those are in another file


def _describes(stored: dict[str, Any], model: ModelConfig, keys: Collection[str]) -> bool:
    """Whether a stored Med-MoE configuration still gives the model's shapes and mixture."""
    try:
        moe = read_moe(stored, model.llm.layers, keys, Path("config.json"))
    except ConversionError:
        return False
    if model.moe and moe:
        # The official classes have no such settings.
        moe.noise, moe.routing = model.moe.noise, model.moe.routing
    return (
        moe == model.moe
        and _describes_llm(stored, model.llm, keys)
        and stored.get("image_projector_type", "linear") == model.projector
        and stored.get("mm_vision_select_layer", -2) == model.vision.select_layer
        and stored.get("mm_hidden_size", model.vision.width) == model.vision.width
    )


def _official_class(model: ModelConfig) -> str:
    name = {"phi": "Phi", "stablelm": "Stablelm"}[model.llm.family]
    return f"{'MoELLaVA' if model.moe else 'Llava'}{name}ForCausalLM"


def _common(llm: LlmConfig) -> dict[str, Any]:
    """Fields that both families spell alike."""
    return {
        "vocab_size": llm.vocab,
        "hidden_size": llm.width,
        "intermediate_size": llm.ffn,
        "num_hidden_layers": llm.layers,
        "num_attention_heads": llm.heads,
        "num_key_value_heads": llm.kv_heads,
        "max_position_embeddings": llm.max_positions,
        "rope_theta": llm.rope_theta,
        "tie_word_embeddings": False,
    }


def _phi(llm: LlmConfig) -> dict[str, Any]:
    """Fields of PhiConfig. Its `rope_scaling`, None, is left out: transformers 5 warns of it."""
    return _common(llm) | {
        "hidden_act": "gelu_new",
        "layer_norm_eps": llm.norm_eps,
        "partial_rotary_factor": llm.rotary_fraction,
        "qk_layernorm": False,
    }


def _stablelm_epoch(llm: LlmConfig) -> dict[str, Any]:
    """Fields of StableLMEpochConfig."""
    return _common(llm) | {
        "hidden_act": "silu",
        "norm_eps": llm.norm_eps,
        "rope_pct": llm.rotary_fraction,
        "use_qkv_bias": llm.qkv_bias,
    }


def _multimodal(model: ModelConfig) -> dict[str, Any]:
    """What the official classes expect beside the language model's fields, as scripts set it."""
    return {
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        **({"embd_pdrop": 0.0, "resid_pdrop": 0.0} if model.llm.family == "phi" else {}),
        "mm_video_tower": None,
        "mm_vision_select_feature": "patch",
        "use_mm_proj": True,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
        "tokenizer_padding_side": "right",
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
        "mm_projector_lr": None,
        "video_projector_type": "linear",
        "video_spatial_proj": False,
        "video_temproal_proj": False,
        "video_global_proj": False,
    }


def _moe(model: ModelConfig, stored: dict[str, Any]) -> dict[str, Any]:
    """The `moe` field; capacities are what the official scripts write, its code ignores them."""
    moe = model.moe
    assert moe is not None
    if moe.routing != "router":
        raise ConversionError(
            f"the model's routing is {moe.routing!r}, which the PyTorch classes do not have; only "
            "models whose router decides can be exported"
        )
    phi = model.llm.family == "phi"
    indices = list(model.moe_layers)
    mode = moe.placement if moe.placement in PLACEMENTS else stored.get("moe_mode", "sparse")
    return {
        "capacity_factor": 1.5,
        "eval_capacity_factor": 2.0,
        "min_capacity": 0,
        "ep_size": 1,
        "train_modules": ["fc1", "fc2", "wg"]
        if phi
        else ["gate_proj", "up_proj", "down_proj", "wg"],
        **stored,
        "moe_enable": True,
        "moe_mode": mode,  # words only: the indices decide
        "moe_layers_idx": indices,
        "num_experts": [moe.experts] * len(indices),
        "top_k_experts": moe.top_k,
        "use_residual": moe.use_residual,
        "router_aux_loss_coef": moe.aux_coef,
    }
