"""Tiny models with random weights, their batches, and the golden models, for tests."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file

from medmoe_jax.config import LlmConfig, ModelConfig, MoeConfig, VisionConfig
from medmoe_jax.convert import check
from medmoe_jax.data import merge
from medmoe_jax.models import medmoe

GOLDEN_MOE = ("phi_top1", "stablelm_top1", "phi_top2", "stablelm_top2")
GOLDEN_DENSE = ("phi_dense_stage2", "stablelm_dense_stage2")
ON_DEVICE = ("tokens", "image_pos", "mask", "images")


def config(
    family: str = "phi",
    moe: MoeConfig | None = None,
    *,
    layers: int = 3,
    kv_heads: int = 2,
    select_layer: int = -2,
) -> ModelConfig:
    """A model of a few thousand parameters; grouped queries, 4 patches an image."""
    return ModelConfig(
        vision=VisionConfig(
            image_size=8,
            patch_size=4,
            width=8,
            layers=2,
            heads=2,
            ffn=12,
            select_layer=select_layer,
        ),
        llm=LlmConfig(
            family=family,
            vocab=48,
            width=16,
            layers=layers,
            ffn=20,
            heads=4,
            kv_heads=kv_heads,
            rotary_fraction=0.5,
        ),
        moe=moe,
    ).validate()


def fill(shapes: Any, seed: int = 0) -> Any:
    """f32 arrays for a nested dict of shapes; every parameter has an effect, biases included."""
    rng = np.random.default_rng(seed)

    def one(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name, noise = path[-1].key, rng.standard_normal(leaf.shape).astype(np.float32)
        if name == "scale":
            return 1 + np.float32(0.2) * noise
        if name == "bias":
            return np.float32(0.2) * noise
        gain = 2.0 if any(p.key == "router" for p in path) else 1.0
        fan_in = 1 if "embedding" in name else leaf.shape[-2]
        return noise * np.float32(gain * fan_in**-0.5)

    return jax.tree_util.tree_map_with_path(one, shapes)


def params(cfg: ModelConfig, seed: int = 0) -> dict[str, Any]:
    """Random parameters of a model."""
    return fill(medmoe.shapes(cfg), seed)


def batch(
    cfg: ModelConfig,
    images: tuple[int, ...] = (1, 0, 2),
    *,
    text: int = 6,
    length: int | None = None,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """A Batch whose row r has `text + r` words and `images[r]` images at random places.

    The second half of the words is labelled; modalities are 0, 1, ...
    """
    rng = np.random.default_rng(seed)
    rows = []
    for number, count in enumerate(images):
        ids = rng.integers(1, cfg.llm.vocab, text + number + count)
        ids[rng.permutation(len(ids))[:count]] = -200
        labels = np.where((np.arange(len(ids)) >= len(ids) // 2) & (ids > 0), ids, -100)
        rows.append(merge.expand(ids.tolist(), labels.tolist(), cfg.vision.patches))
    side = cfg.vision.image_size
    pixels = rng.standard_normal((len(rows), max(1, *images), side, side, 3)).astype(np.float32)
    for number, count in enumerate(images):
        pixels[number, count:] = 0
    padded = merge.pad_rows(rows, length or max(len(row.tokens) for row in rows))
    return padded | {"images": pixels, "modality": np.arange(len(rows), dtype=np.int32)}


def choices(kind: str, tokens: int, n_experts: int, top_k: int) -> np.ndarray:
    """i32[1, T, K]: experts at random; all tokens the last ones; or every second token none."""
    if kind == "one":
        return np.tile(np.arange(top_k, dtype=np.int32) + n_experts - top_k, (1, tokens, 1))
    rng = np.random.default_rng(tokens)
    order = rng.permuted(np.tile(np.arange(n_experts, dtype=np.int32), (1, tokens, 1)), axis=-1)
    choice = order[..., :top_k]
    if kind == "none":
        choice[:, ::2] = n_experts
    return choice


@functools.cache
def golden_params(folder: Path) -> tuple[dict[str, Any], ModelConfig]:
    """Parameters and shapes of a golden model."""
    return check.read(folder)


def golden_batch(
    cfg: ModelConfig, io: dict[str, np.ndarray], rows: int | None = None
) -> dict[str, np.ndarray]:
    """The Batch of a golden file, or of its first rows."""
    ids = io["input_ids"][:rows]
    pixels = io["pixel_values"][: int(np.maximum((ids == -200).sum(1), 1).sum())]
    masks = io["attention_mask"][:rows], io["labels"][:rows]
    vision = cfg.vision
    return merge.from_official(ids, *masks, pixels, vision.patches, vision.image_size)


def golden_io(folder: Path, name: str = "io") -> dict[str, np.ndarray]:
    """The tensors of an activation file."""
    return load_file(folder / f"{name}.safetensors")
