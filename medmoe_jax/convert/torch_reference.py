"""Reads an official-layout Med-MoE folder into PyTorch, strictly: an independent check of exports.

A folder that gives the same numbers here and in JAX has been written as the official classes would
read it. Needs the extra `medmoe_jax[torch]`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from medmoe_jax.convert.torch_model import MedMoe

TOWER = "model.image_tower.image_tower."  # the checkpoint's own copy of CLIP
CLIP_PARTS = ("embeddings.", "pre_layrnorm.", "encoder.", "post_layernorm.")


def load(folder: str | Path, vision: str | Path | None = None) -> MedMoe:
    """Reads an official-layout Med-MoE folder (stage 2 or 3).

    Args:
      folder: has config.json and the weights.
      vision: CLIP folder; default: the config's mm_image_tower, relative to `folder`. Where that
        is not a folder, the copy inside the checkpoint is used, with the sizes of its tensors and
        64 dimensions a head, as in every published CLIP.

    Returns:
      The model in evaluation mode, float32.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: the weights do not fit the config; the message has the keys.
    """
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text())
    tensors = read_tensors(folder)
    clip = Path(vision) if vision else folder / config["mm_image_tower"]
    if vision or clip.is_dir():
        clip_config = json.loads((clip / "config.json").read_text())
        return build(config, tensors, clip_config, read_tensors(clip), str(folder))
    tower = {k.removeprefix(TOWER): v for k, v in tensors.items() if k.startswith(TOWER)}
    if not tower:
        raise FileNotFoundError(
            f"{folder}: CLIP is neither at {clip} nor inside the checkpoint; name its folder"
        )
    return build(config, tensors, _clip_config(_vision_part(tower)), tower, str(folder))


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder: model.safetensors, else pytorch_model.bin; sharded or not.

    Raises:
      FileNotFoundError: none of them is there, or a shard is missing.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.exists():
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        elif (folder / name).exists():
            files = [name]
        else:
            continue
        tensors: dict[str, Tensor] = {}
        for file in files:
            if file.endswith(".safetensors"):
                tensors |= load_file(folder / file)
            else:
                tensors |= torch.load(folder / file, map_location="cpu", weights_only=True)
        return tensors
    raise FileNotFoundError(f"{folder} has neither model.safetensors nor pytorch_model.bin")


def build(
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    clip_config: dict[str, Any],
    clip_tensors: dict[str, Tensor],
    source: str = "checkpoint",
) -> MedMoe:
    """Makes the model and fills it; every key must be there and be used.

    Args:
      config: config.json of the Med-MoE folder.
      tensors: its tensors by key, any float dtype. A CLIP tower among them must have the right
        keys and is not read, as in the official code.
      clip_config: config.json of CLIP.
      clip_tensors: CLIP's tensors by key; all but the vision tower is ignored.
      source: what errors call the checkpoint.

    Returns:
      The model in evaluation mode, float32.

    Raises:
      ValueError: missing or unexpected keys, wrong shapes, or an alias unlike its original.
    """
    model = MedMoe(config, clip_config).float().eval()
    tower = {k.removeprefix(TOWER): v for k, v in tensors.items() if k.startswith(TOWER)}
    own = {k: v for k, v in tensors.items() if not k.startswith(TOWER)}
    # use_residual: pytorch_model.bin has the meta expert under two names.
    for alias in [k for k in own if ".mlp.mlp." in k]:
        original = alias.replace(".mlp.mlp.", ".mlp.meta_moe.")
        if original not in own or not torch.equal(own[alias], own[original]):
            raise ValueError(f"{source}: {alias} must equal {original}; they are one parameter")
        del own[alias]
    _fill(model.llm, own, source)
    clip: nn.Module = getattr(model.clip, "vision_model", model.clip)
    if tower:
        _check(clip, _vision_part(tower), f"{source}, {TOWER}vision_model")
    _fill(clip, _vision_part(clip_tensors), f"CLIP of {source}")
    return model


def _vision_part(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """CLIP's vision tower by bare keys; without position_ids, a constant in older files."""
    bare = {k.removeprefix("vision_model."): v for k, v in tensors.items()}
    return {k: v for k, v in bare.items() if k.startswith(CLIP_PARTS) and "position_ids" not in k}


def _clip_config(tower: dict[str, Tensor]) -> dict[str, Any]:
    width, _, patch, _ = tower["embeddings.patch_embedding.weight"].shape
    side = round((len(tower["embeddings.position_embedding.weight"]) - 1) ** 0.5)
    return {
        "hidden_size": width,
        "intermediate_size": len(tower["encoder.layers.0.mlp.fc1.weight"]),
        "num_hidden_layers": sum(k.endswith("mlp.fc1.bias") for k in tower),
        "num_attention_heads": max(width // 64, 1),
        "image_size": side * patch,
        "patch_size": patch,
    }


def _check(module: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    wanted = module.state_dict()
    faults = [f"missing {k} {list(v.shape)}" for k, v in wanted.items() if k not in tensors]
    for key, tensor in tensors.items():
        if key not in wanted:
            faults.append(f"unexpected {key} {list(tensor.shape)}")
        elif tensor.shape != wanted[key].shape:
            shapes = f"{list(tensor.shape)}, the config asks for {list(wanted[key].shape)}"
            faults.append(f"{key} has shape {shapes}")
    if faults:
        more = f"; and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise ValueError(f"{source}: {'; '.join(faults[:8])}{more}")


def _fill(module: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    _check(module, tensors, source)
    module.load_state_dict(tensors)
