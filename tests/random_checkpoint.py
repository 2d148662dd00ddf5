"""Writes random Med-MoE folders in the official layout, with inputs and expected outputs.

For shapes that the golden folders do not have: other expert counts, placements, grouped queries,
`use_residual`, dtypes. The expected outputs are those of `medmoe_jax.convert.torch_reference`.

    python tests/random_checkpoint.py OUT --family stablelm --experts 6 --moe_layers 1,2 --top_k 2
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from medmoe_jax.convert import torch_reference
from medmoe_jax.convert.torch_model import IMAGE_TOKEN, NO_LABEL, MedMoe

ROUTER_MARGIN = 5e-3  # smallest gap of router logits at the border of the chosen experts
TOKEN_MARGIN = 2e-2  # smallest gap of the two best logits of a generated token
TRIES = 200


@dataclass(frozen=True)
class Spec:
    """Shapes and settings of one folder."""

    family: str = "phi"  # phi | stablelm
    layers: int = 3
    width: int = 32
    heads: int = 4
    kv_heads: int = 2  # below `heads`: grouped queries
    ffn: int = 40
    vocab: int = 128
    rotary: float = 0.5  # share of the head dimension that is rotated
    qkv_bias: bool = True  # stablelm only
    moe_layers: tuple[int, ...] = (0, 2)  # () = a dense, stage-2 model
    experts: int = 3
    top_k: int = 1
    use_residual: bool = False
    aux_coef: float = 0.01
    projector: str = "mlp2x_gelu"  # linear | mlpNx_gelu
    clip_width: int = 16
    clip_layers: int = 3
    clip_heads: int = 2
    clip_ffn: int = 24
    image_size: int = 12  # pixels
    patch_size: int = 4  # pixels
    select_layer: int = -2
    dtype: str = "float32"  # of the stored weights; outputs are computed in float32
    clip_dtype: str = ""  # of the stored CLIP weights; "" = dtype
    shards: int = 1  # safetensors files
    images: tuple[int, ...] = (1, 0, 1, 2)  # images of each row
    text: int = 9  # text tokens of the shortest row
    new_tokens: int = 12  # of each generation
    seed: int = 0


def write(folder: str | Path, spec: Spec) -> Path:
    """Writes a folder whose routing uses every expert and, like its tokens, is far from ties.

    Args:
      folder: created; gets config.json, model.safetensors, pytorch_model.bin, clip/, io.safetensors
        and meta.json.
      spec: shapes and settings.

    Returns:
      The folder.

    Raises:
      RuntimeError: none of the seeds that belong to `spec.seed` gives such routing.
    """
    folder = Path(folder)
    for seed in range(spec.seed * TRIES, (spec.seed + 1) * TRIES):
        random = torch.Generator().manual_seed(seed)
        config, clip_config = _config(spec), _clip_config(spec)
        model = MedMoe(config, clip_config)
        _randomise(model, random)
        _write_weights(folder, spec, model, config, clip_config)
        inputs = _inputs(spec, random)
        model = torch_reference.load(folder)
        outputs, margins = _outputs(model, inputs, spec)
        far = margins["token"] > TOKEN_MARGIN and margins.get("router", 1.0) > ROUTER_MARGIN
        if far and margins.get("least_used", 1) > 0:
            tensors = {k: v.contiguous().clone() for k, v in (inputs | outputs).items()}
            save_file(tensors, folder / "io.safetensors")
            meta = {"seed": seed, "margins": margins, "spec": dataclasses.asdict(spec)}
            _write_json(folder / "meta.json", meta)
            return folder
    raise RuntimeError(f"{TRIES} seeds and none with routing and tokens far from ties: {spec}")


def _config(spec: Spec) -> dict[str, Any]:
    phi, moe = spec.family == "phi", bool(spec.moe_layers)
    name = {"phi": "Phi", "stablelm": "Stablelm"}[spec.family]
    config: dict[str, Any] = {
        "architectures": [f"{'MoELLaVA' if moe else 'Llava'}{name}ForCausalLM"],
        "model_type": f"{'moe_' if moe else ''}llava_{spec.family}",
        "hidden_size": spec.width,
        "intermediate_size": spec.ffn,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "vocab_size": spec.vocab,
        "max_position_embeddings": 256,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": spec.vocab - 2,
        "eos_token_id": spec.vocab - 2,
        "pad_token_id": spec.vocab - 1,
        "torch_dtype": spec.dtype,
        "mm_image_tower": "./clip",
        "mm_video_tower": None,
        "mm_hidden_size": spec.clip_width,
        "mm_vision_select_layer": spec.select_layer,
        "mm_vision_select_feature": "patch",
        "image_projector_type": spec.projector,
        "image_aspect_ratio": "pad",
        "tokenizer_padding_side": "right",
        "use_mm_proj": True,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
    }
    if phi:
        config |= {"hidden_act": "gelu_new", "layer_norm_eps": 1e-5, "qk_layernorm": False}
        config |= {"partial_rotary_factor": spec.rotary}
    else:
        config |= {"hidden_act": "silu", "norm_eps": 1e-5, "use_qkv_bias": spec.qkv_bias}
        config |= {"rope_pct": spec.rotary}
    if moe:
        ffn = ["fc1", "fc2"] if phi else ["gate_proj", "up_proj", "down_proj"]
        config["moe"] = {
            "moe_enable": True,
            "moe_mode": "sparse",
            "moe_layers_idx": list(spec.moe_layers),
            "num_experts": [spec.experts] * len(spec.moe_layers),
            "top_k_experts": spec.top_k,
            "use_residual": spec.use_residual,
            "router_aux_loss_coef": spec.aux_coef,
            "ep_size": 1,
            "capacity_factor": 1.5,
            "eval_capacity_factor": 2.0,
            "min_capacity": 0,
            "train_modules": [*ffn, "wg"],
        }
    return config


def _clip_config(spec: Spec) -> dict[str, Any]:
    return {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "hidden_size": spec.clip_width,
        "intermediate_size": spec.clip_ffn,
        "num_hidden_layers": spec.clip_layers,
        "num_attention_heads": spec.clip_heads,
        "num_channels": 3,
        "image_size": spec.image_size,
        "patch_size": spec.patch_size,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "projection_dim": spec.clip_width,
        "torch_dtype": spec.clip_dtype or spec.dtype,
    }


@torch.no_grad()
def _randomise(model: MedMoe, random: torch.Generator) -> None:
    """Fills every parameter so that all of them matter; routers get large weights."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=random)
        if parameter.ndim == 1 and name.endswith("weight"):  # norms
            noise = 1 + 0.2 * noise
        elif name.endswith("bias"):
            noise = 0.2 * noise
        elif parameter.ndim > 1 and "embed" not in name.rsplit(".", 2)[-2]:
            gain = {"wg": 2.0, "lm_head": 3.0}.get(name.split(".")[-2], 1.0)
            noise = noise * gain / parameter[0].numel() ** 0.5
        parameter.copy_(noise)


def _write_weights(
    folder: Path, spec: Spec, model: MedMoe, config: dict[str, Any], clip_config: dict[str, Any]
) -> None:
    dtype, clip_dtype = getattr(torch, spec.dtype), getattr(torch, spec.clip_dtype or spec.dtype)
    bare = getattr(model.clip, "vision_model", model.clip).state_dict()
    clip = {f"vision_model.{k}": v.to(clip_dtype) for k, v in bare.items()}
    tensors = {k: v.to(dtype) for k, v in model.llm.state_dict().items()}
    tensors |= {torch_reference.TOWER + k: v for k, v in clip.items()}
    (folder / "clip").mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", config)
    _write_json(folder / "clip/config.json", clip_config)
    size = spec.image_size
    processor = {
        "crop_size": {"height": size, "width": size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "CLIPImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": size},
    }
    _write_json(folder / "clip/preprocessor_config.json", processor)
    save_file(clip, folder / "clip/model.safetensors", {"format": "pt"})
    if spec.shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    else:
        weight_map = {}
        for i in range(spec.shards):
            name = f"model-{i + 1:05}-of-{spec.shards:05}.safetensors"
            keys = sorted(tensors)[i :: spec.shards]
            weight_map |= dict.fromkeys(keys, name)
            save_file({k: tensors[k] for k in keys}, folder / name, {"format": "pt"})
        total = sum(t.nbytes for t in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)
    if spec.use_residual:  # the pickle has the meta expert under a second name
        meta = {k: v for k, v in tensors.items() if ".mlp.meta_moe." in k}
        tensors |= {k.replace(".mlp.meta_moe.", ".mlp.mlp."): v for k, v in meta.items()}
    torch.save(tensors, folder / "pytorch_model.bin")


def _inputs(spec: Spec, random: torch.Generator) -> dict[str, Tensor]:
    def prompt(text: int, images: int) -> Tensor:
        """Random ids with image tokens at random places, the first and the last included."""
        ids = torch.randint(1, spec.vocab - 2, (text + images,), generator=random)
        ids[torch.randperm(len(ids), generator=random)[:images]] = IMAGE_TOKEN
        return ids

    def pixels(images: int) -> Tensor:
        return torch.randn(images, 3, spec.image_size, spec.image_size, generator=random)

    rows = [prompt(spec.text + 2 * i, n) for i, n in enumerate(spec.images)]
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), spec.vocab - 1)
    labels = torch.full((len(rows), length), NO_LABEL)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        answer = torch.arange(len(row)) >= len(row) // 2
        labels[i, : len(row)] = torch.where(answer & (row != IMAGE_TOKEN), row, NO_LABEL)
    return {
        "input_ids": ids,
        "attention_mask": ids != spec.vocab - 1,
        "labels": labels,
        "pixel_values": torch.cat([pixels(n) if n else 0 * pixels(1) for n in spec.images]),
        "gen.image.input_ids": prompt(spec.text, 1)[None],
        "gen.image.pixel_values": pixels(1),
        "gen.text.input_ids": prompt(spec.text, 0)[None],
    }


@torch.no_grad()
def _outputs(
    model: MedMoe, inputs: dict[str, Tensor], spec: Spec
) -> tuple[dict[str, Tensor], dict[str, float]]:
    names = ("input_ids", "attention_mask", "labels", "pixel_values")
    out = model(*(inputs[name] for name in names))
    margins: dict[str, float] = {}
    counts = [v for k, v in out.items() if k.endswith("exp_counts")]
    routers = [v for k, v in out.items() if k.endswith("router_logits")]
    if routers:
        best = torch.cat(routers).topk(min(spec.top_k + 1, spec.experts)).values
        margins["router"] = -best.diff().max().item()
        margins["least_used"] = torch.stack(counts).min().item()
    steps = []
    for kind in ("image", "text"):
        ids, pixel_values = inputs[f"gen.{kind}.input_ids"], inputs.get(f"gen.{kind}.pixel_values")
        new, logits = model.generate_greedy(ids, pixel_values, spec.new_tokens)
        out |= {f"gen.{kind}.new_ids": new, f"gen.{kind}.step_logits": logits}
        steps.append(logits)
    margins["token"] = -torch.cat(steps).topk(2).values.diff().max().item()
    # Generation stops at the first occurrence of the end token and keeps it.
    new = out["gen.image.new_ids"]
    stop = new[len(new) // 2]
    out["gen.image.eos_stop_id"] = stop[None]
    out["gen.image.new_ids_eos_stop"] = new[: int((new == stop).nonzero()[0, 0]) + 1]
    return out, margins


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    """Writes one folder as the command line says; every field of `Spec` is an option."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    for field in dataclasses.fields(Spec):
        default: Any = field.default
        kind: Any = type(default)
        if kind is tuple:
            kind = lambda text: tuple(int(part) for part in text.split(",") if part)  # noqa: E731
        action: Any = argparse.BooleanOptionalAction if kind is bool else "store"
        options = {} if kind is bool else {"type": kind}
        parser.add_argument(f"--{field.name}", default=default, action=action, **options)
    arguments = vars(parser.parse_args())
    print(write(arguments.pop("out"), Spec(**arguments)))


if __name__ == "__main__":
    main()
