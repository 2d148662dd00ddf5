"""A random model folder and data for it, small enough to train in seconds."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import jax
from tiny_data import row, save_image, save_rows, save_tokenizer

from medmoe_jax import checkpoint
from medmoe_jax.config import LlmConfig, ModelConfig, MoeConfig, RunConfig, VisionConfig
from medmoe_jax.convert.export_configs import preprocessor_config
from medmoe_jax.models import layers, medmoe

ROOT = Path(__file__).resolve().parents[1]
MODALITIES = ("CT", "MRI", "X-ray", "Pathology")


def model_config(family: str = "phi", moe: MoeConfig | None = None) -> ModelConfig:
    """A model of some ten thousand parameters."""
    vision = VisionConfig(image_size=8, patch_size=4, width=8, layers=2, heads=2, ffn=16)
    llm = LlmConfig(
        family=family,
        vocab=440,
        width=16,
        layers=2,
        ffn=24,
        heads=2,
        kv_heads=2,
        rotary_fraction=0.5,
    )
    return ModelConfig(vision, llm, moe=moe).validate()


def save_start(folder: Path, family: str = "phi", moe: MoeConfig | None = None) -> Path:
    """A model folder with random weights, tokenizer and image settings."""
    import json

    model = model_config(family, moe)
    params = jax.device_get(layers.initialise(jax.random.key(0), medmoe.leaves(model)))
    checkpoint.save_model(folder, params, checkpoint.ModelMeta("base", model))
    save_tokenizer(folder / "tokenizer")
    settings = json.dumps(preprocessor_config(model.vision))
    (folder / "preprocessor_config.json").write_text(settings)
    return folder


def save_questions(folder: Path, n: int = 16) -> Path:
    """`n` rows with images, closed and open, all four modalities; returns the JSON file."""
    rows = []
    for i in range(n):
        save_image(folder / "images" / f"i{i}.png", seed=i)
        kind = "CLOSED" if i % 2 else "open"
        rows.append(
            row(i, ("no", "left lung")[i % 2 == 0], answer_type=kind, modality=MODALITIES[i % 4])
        )
    return save_rows(folder / "questions.json", rows)


def phase(name: str, size: str = "tiny") -> RunConfig:
    """The run of configs/NAME.py:SIZE."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(size)


def run_config(config: RunConfig, init: Path, questions: Path, **optim: Any) -> RunConfig:
    """A phase's config made small: float32, few steps, every step logged, and quick to compile (one
    length, nothing computed twice)."""
    return dataclasses.replace(
        config,
        init=str(init),
        data=dataclasses.replace(
            config.data,
            files=(str(questions),),
            image_folder=str(questions.parent / "images"),
            buckets=(128,),
        ),
        remat="none",
        optim=dataclasses.replace(config.optim, batch_size=4, **optim),
        log=dataclasses.replace(config.log, every=1, save_every=3, tensorboard=False),
    )
