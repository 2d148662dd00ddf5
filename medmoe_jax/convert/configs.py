"""Reads `config.json` of PyTorch models, in today's and older spellings, into our dataclasses.

Settings that the model code does not implement are errors here, not surprises later.

Source: transformers 4.37 to 5 (PhiConfig, StableLmConfig, CLIPConfig), Microsoft's phi-msft
configuration, and the official Med-MoE code's StableLMEpochConfig, LlavaPhiConfig,
MoELLaVAPhiConfig and their StableLM twins.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from medmoe_jax.config import PLACEMENTS, ConfigError, LlmConfig, MoeConfig, VisionConfig
from medmoe_jax.convert.report import ConversionError
from medmoe_jax.convert.table import GATE, PROJECTOR

PLAIN_TYPES = {
    "phi": "phi",
    "phi-msft": "phi",
    "stablelm": "stablelm",
    "stablelm_epoch": "stablelm",
}
OFFICIAL_TYPES = {
    "llava_phi": "phi",
    "moe_llava_phi": "phi",
    "llava_stablelm": "stablelm",
    "moe_llava_stablelm": "stablelm",
}
CLIP_TYPES = ("clip", "clip_vision_model")


def family(config: dict[str, Any], where: Path) -> str:
    """The language model's family, "phi" or "stablelm". Raises ConversionError on another one."""
    model_type = config.get("model_type")
    known = PLAIN_TYPES | OFFICIAL_TYPES
    if not isinstance(model_type, str) or model_type not in known:
        raise ConversionError(
            f"{where}: model_type {model_type!r} is not one that can be converted; known are "
            f"{', '.join(known)}, and {', '.join(CLIP_TYPES)} for the vision tower"
        )
    return known[model_type]


def read_llm(config: dict[str, Any], keys: Collection[str], where: Path) -> LlmConfig:
    """Shapes of the language model.

    Args:
      config: `config.json` of a plain or a Med-MoE checkpoint.
      keys: keys of its weights in the table's spelling; they decide on the biases that
        configurations leave open.
      where: the file, for messages.

    Raises:
      ConversionError: another family, a missing field, or a setting that the models do not
        implement.
    """
    name = family(config, where)
    _refuse_unsupported(config, name, where)
    rope = _object(config, "rope_parameters", where)
    width = _field(config, where, "hidden_size", "n_embd")
    heads = _field(config, where, "num_attention_heads", "n_head")
    fraction = rope.get("partial_rotary_factor", 0.5 if name == "phi" else 0.25)
    for spelling in ("partial_rotary_factor", "rope_pct"):
        fraction = config.get(spelling, fraction)
    if config.get("rotary_dim") is not None:  # phi-msft counts dimensions
        dims = number(config["rotary_dim"], "rotary_dim", where)
        fraction = dims * heads / width
        if int(fraction * (width // heads)) < dims:
            fraction = math.nextafter(fraction, 1.0)
    qkv_bias = config.get("use_qkv_bias", any(".q_proj.bias" in k for k in keys))
    llm = LlmConfig(
        family=name,
        vocab=_field(config, where, "vocab_size"),
        width=width,
        layers=_field(config, where, "num_hidden_layers", "n_layer"),
        ffn=config.get("intermediate_size", config.get("n_inner")) or 4 * width,
        heads=heads,
        kv_heads=config.get("num_key_value_heads", config.get("n_head_kv")) or heads,
        rotary_fraction=number(fraction, "partial_rotary_factor", where),
        rope_theta=number(
            config.get("rope_theta") or rope.get("rope_theta") or 10000.0, "rope_theta", where
        ),
        norm_eps=number(_norm_eps(config), "layer_norm_eps", where),
        qkv_bias=name == "phi" or bool(qkv_bias),
        lm_head_bias="lm_head.bias" in keys,
        max_positions=_field(config, where, "max_position_embeddings", "n_positions"),
    )
    try:
        llm.validate()
    except ConfigError as error:
        raise ConversionError(f"{where}: {error}") from error
    return llm


def read_vision(config: dict[str, Any], where: Path, select_layer: int = -2) -> VisionConfig:
    """Shapes of a CLIP vision tower; what it takes as mean and deviation of an image is not there.

    Args:
      config: `config.json` of a CLIP model or of its vision tower alone. Fields that transformers
        leaves out because they have their default value get that value.
      where: the file, for messages.
      select_layer: hidden state that the language model sees (a setting of the Med-MoE model).

    Raises:
      ConversionError: not a CLIP configuration, or an unknown activation.
    """
    if config.get("model_type") not in CLIP_TYPES:
        raise ConversionError(
            f"{where}: model_type {config.get('model_type')!r} is not CLIP's "
            f"({', '.join(CLIP_TYPES)}); give the folder of the CLIP model with --vision"
        )
    if config["model_type"] == "clip":
        config = _object(config, "vision_config", where)
    vision = VisionConfig(
        image_size=config.get("image_size", 224),
        patch_size=config.get("patch_size", 32),
        width=config.get("hidden_size", 768),
        layers=config.get("num_hidden_layers", 12),
        heads=config.get("num_attention_heads", 12),
        ffn=config.get("intermediate_size", 3072),
        norm_eps=config.get("layer_norm_eps", 1e-5),
        activation=config.get("hidden_act", "quick_gelu"),
        select_layer=select_layer,
    )
    if vision.activation not in ("quick_gelu", "gelu"):
        raise ConversionError(
            f"{where}: hidden_act {vision.activation!r}; quick_gelu and gelu exist"
        )
    try:
        vision.validate()
    except ConfigError as error:
        raise ConversionError(f"{where}: {error}") from error
    return vision


def read_mean_std(
    settings: dict[str, Any], where: Path
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, of pixels in 0..1; CLIP's where they are absent.

    Args:
      settings: `preprocessor_config.json` of the vision tower.
      where: the file, for messages.

    Raises:
      ConversionError: not three numbers each, or a deviation that is not positive.

    Source: CLIPImageProcessor of transformers.
    """
    mean = settings.get("image_mean") or list(VisionConfig.mean)
    std = settings.get("image_std") or list(VisionConfig.std)
    for name, value in (("image_mean", mean), ("image_std", std)):
        three = isinstance(value, list) and len(value) == 3
        numbers = three and all(isinstance(v, (int, float)) for v in value)
        if not numbers or (name == "image_std" and min(value) <= 0):
            raise ConversionError(
                f"{where}: {name} {value!r} is not three numbers, of a deviation above zero; get "
                "the vision tower's own file"
            )
    return tuple(map(float, mean)), tuple(map(float, std))


def read_moe(
    config: dict[str, Any], layers: int, keys: Collection[str], where: Path
) -> MoeConfig | None:
    """The mixture of experts of a Med-MoE configuration; None where the model is dense.

    `moe_layers_idx` decides on the placement; where it matches no mode it becomes a list as in
    "0,3,5". Whether there are meta experts, and how deep the router is, is read off the keys.
    Capacities are ignored, as in the official code.

    Raises:
      ConversionError: missing fields, or experts that differ in number.
    """
    moe = _object(config, "moe", where)
    if not moe.get("moe_enable", str(config.get("model_type")).startswith("moe_")):
        return None
    given = moe.get("num_experts")
    counts: list[Any] = given if isinstance(given, list) else [given]
    if not counts or not all(isinstance(count, int) for count in counts):
        raise ConversionError(
            f"{where}: moe.num_experts is {counts}, not a whole number for each MoE layer; get the "
            "model's own config.json"
        )
    if len(set(counts)) != 1:
        raise ConversionError(
            f"{where}: moe.num_experts is {counts}: layers with different numbers of experts "
            "cannot be converted, since their weights are stacked; use a checkpoint that has the "
            "same number in every MoE layer"
        )
    indices, mode = moe.get("moe_layers_idx"), moe.get("moe_mode")
    placement = str(mode)
    if indices:
        if not isinstance(indices, list) or not all(isinstance(i, int) for i in indices):
            raise ConversionError(
                f"{where}: moe.moe_layers_idx is {indices!r}, not a list of layer numbers; get the "
                "model's own config.json"
            )
        chosen = tuple(sorted(indices))
        names = [n for n in (mode, *PLACEMENTS) if n in PLACEMENTS]
        same = [n for n in names if MoeConfig(placement=n).layers(layers) == chosen]
        placement = same[0] if same else ",".join(map(str, chosen))
    depths = {int(n) for k in keys for n in re.findall(re.escape(GATE) + r"fc(\d)\.weight", k)}
    result = MoeConfig(
        experts=counts[0],
        top_k=moe.get("top_k_experts", 2),
        placement=placement,
        meta=any(".mlp.meta_moe." in k for k in keys),
        use_residual=bool(moe.get("use_residual", False)),
        aux_coef=number(moe.get("router_aux_loss_coef", 0.01), "router_aux_loss_coef", where),
        router_layers=max(depths, default=1),
    )
    try:
        result.validate(layers)
    except ConfigError as error:
        raise ConversionError(f"{where}: {error}") from error
    return result


def projector_name(keys: Collection[str], where: Path) -> str:
    """The projector's name, read off the keys of its weights.

    Raises ConversionError where there are none.
    """
    places = [k.removeprefix(PROJECTOR) for k in keys if k.startswith(PROJECTOR)]
    if "weight" in places:
        return "linear"
    depth = sum(place.endswith(".weight") for place in places)
    if not depth:
        raise ConversionError(
            f"{where}: holds no projector (no key {PROJECTOR}0.weight); keys are {sorted(keys)[:4]}"
        )
    return f"mlp{depth}x_gelu"


def _field(config: dict[str, Any], where: Path, *names: str) -> int:
    """The first of the fields that exists.

    Raises ConversionError where none does, or it is no whole number.
    """
    value = next((config[name] for name in names if config.get(name) is not None), None)
    if not isinstance(value, int):
        raise ConversionError(
            f"{where}: field {names[0]!r} is missing or not a whole number; get the model's own "
            "config.json"
        )
    return value


def number(value: Any, name: str, where: Path) -> float:
    """Raises ConversionError where the value of a field is no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConversionError(
            f"{where}: field {name!r} is {value!r}, not a number; get the model's own config.json"
        )
    return float(value)


def _object(config: dict[str, Any], name: str, where: Path) -> dict[str, Any]:
    """A part of a configuration, {} where it has none. Raises ConversionError on something else."""
    part = config.get(name) or {}
    if not isinstance(part, dict):
        raise ConversionError(
            f"{where}: field {name!r} is {part!r}, not an object; get the model's own config.json"
        )
    return part


def _norm_eps(config: dict[str, Any]) -> float:
    """Epsilon of the layer norms, which every family spells in its own way."""
    for name in ("layer_norm_eps", "norm_eps", "layer_norm_epsilon"):
        if config.get(name) is not None:
            return config[name]
    return 1e-5


def _refuse_unsupported(config: dict[str, Any], name: str, where: Path) -> None:
    """Raises ConversionError where a setting asks for mathematics that the models do not have."""
    rope = _object(config, "rope_parameters", where)
    activations = {"phi": ("gelu_new", "gelu_pytorch_tanh"), "stablelm": ("silu", "swish")}[name]
    activation = config.get("hidden_act", config.get("activation_function", activations[0]))
    feature = config.get("mm_vision_select_feature", "patch")
    scale = config.get("rotary_scaling_factor")
    wrong = [
        f"{field} {value!r}"
        for field, value, bad in (
            ("hidden_act", activation, activation not in activations),
            ("qk_layernorm", config.get("qk_layernorm"), config.get("qk_layernorm")),
            ("use_parallel_residual", True, config.get("use_parallel_residual")),
            ("tie_word_embeddings", True, config.get("tie_word_embeddings")),
            ("rope_scaling", config.get("rope_scaling"), config.get("rope_scaling")),
            ("rotary_scaling_factor", scale, scale not in (None, 1.0)),
            ("rope_type", rope.get("rope_type"), rope.get("rope_type", "default") != "default"),
            ("mm_vision_select_feature", feature, feature != "patch"),
        )
        if bad
    ]
    if wrong:
        raise ConversionError(
            f"{where}: {', '.join(wrong)} cannot be converted: the models here do not have it; "
            "use a checkpoint of Phi-2's or StableLM-2-1.6B's form"
        )
