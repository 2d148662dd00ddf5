"""Model sizes by name: `phi2`, `stablelm`, `tiny` (Phi family) and `tiny_stablelm`."""

from __future__ import annotations

import dataclasses

from medmoe_jax.config import (
    ConfigError,
    LlmConfig,
    ModelConfig,
    MoeConfig,
    RunConfig,
    VisionConfig,
)

PHI2 = LlmConfig()
STABLELM = LlmConfig(
    family="stablelm",
    vocab=100352,
    width=2048,
    layers=24,
    ffn=5632,
    rotary_fraction=0.25,
    max_positions=4096,
)
TINY_VISION = VisionConfig(image_size=84, width=96, layers=4, heads=3, ffn=384)
TINY_PHI = LlmConfig(
    vocab=1024,
    width=128,
    layers=4,
    ffn=512,
    heads=4,
    kv_heads=4,
    rotary_fraction=0.5,
    max_positions=512,
)
TINY_STABLELM = LlmConfig(
    family="stablelm",
    vocab=1024,
    width=128,
    layers=4,
    ffn=344,
    heads=4,
    kv_heads=4,
    rotary_fraction=0.5,  # 16 dimensions of a head, as many as in the real model
    max_positions=512,
)

_PRESETS = {
    "phi2": (VisionConfig(), PHI2),
    "stablelm": (VisionConfig(), STABLELM),
    "tiny": (TINY_VISION, TINY_PHI),
    "tiny_stablelm": (TINY_VISION, TINY_STABLELM),
}


def model(name: str, moe: MoeConfig | None = None) -> ModelConfig:
    """The preset `name` as a ModelConfig, dense or with `moe`.

    Raises ConfigError on an unknown name.
    """
    if name not in _PRESETS:
        raise ConfigError(f"unknown model size {name!r}; use one of {', '.join(_PRESETS)}")
    vision, llm = _PRESETS[name]
    return ModelConfig(vision=vision, llm=llm, moe=moe).validate()


def is_tiny(name: str) -> bool:
    """Whether the preset is one of the sizes for a laptop CPU."""
    return name.startswith("tiny")


def shrink(config: RunConfig, lr: float, epochs: float, batch_size: int) -> RunConfig:
    """`config` with what a tiny model on a CPU needs: float32, short buckets, its own rate, epochs
    and batch.
    """
    return dataclasses.replace(
        config,
        compute_dtype="float32",
        frozen_dtype="float32",
        remat="dots",
        loss_chunk=0,
        data=dataclasses.replace(
            config.data, max_length=512, buckets=(96, 128, 160, 192, 256, 512)
        ),
        optim=dataclasses.replace(config.optim, lr=lr, epochs=epochs, batch_size=batch_size),
        log=dataclasses.replace(config.log, save_every=200),
    )
