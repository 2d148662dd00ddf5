"""A folder as `python -m medmoe_jax.demo --quick` leaves it, in seconds: phantom studies and random
weights, which the notebooks then take for what the command made."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import tiny_runs
from tiny_data import save_tokenizer

from medmoe_jax import checkpoint
from medmoe_jax.config import ModelConfig, MoeConfig
from medmoe_jax.convert.export_configs import preprocessor_config
from medmoe_jax.data import phantom
from medmoe_jax.demo.__main__ import SETTINGS
from medmoe_jax.models import medmoe, moe

PHASES = ("stage1", "stage2", "router", "stage3")
STEPS = ("phantom studies", "tiny checkpoints", "to JAX", *PHASES)  # of the demonstration


def save(folder: Path) -> Path:
    """Writes it."""
    phantom.write(folder / "data", train=24, test=24, size=64)
    dense = tiny_runs.model_config()
    dense = dataclasses.replace(dense, llm=dataclasses.replace(dense.llm, layers=4))
    mixture = MoeConfig()
    for phase in PHASES:
        model = dataclasses.replace(dense, moe=mixture) if phase == "stage3" else dense
        leaves = moe.router_leaves(dense.llm.width, mixture.experts, mixture.router_layers)
        more = {"router": random_params(leaves, np.random.default_rng(1))}
        save_model(folder / phase / "model", phase, model, more if phase == "router" else {})
        lines = [json.dumps({"step": n, "loss": 7 / n}) for n in (1, 2, 3)]
        (folder / phase / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "done").mkdir()
    for name in STEPS:
        (folder / "done" / f"{name}.json").write_text('{"seconds": 1.0}')
    settings = {"llm": "phi", "seed": 0, "quick": True}
    (folder / SETTINGS).write_text(json.dumps(settings))
    return folder


def random_params(tree: Any, rng: np.random.Generator) -> Any:
    """f32 arrays in the shapes of a tree of leaves. (The real start is a program to compile.)"""
    if isinstance(tree, dict):
        return {name: random_params(part, rng) for name, part in tree.items()}
    return rng.normal(0, 0.1, tree.shape).astype(np.float32)


def save_model(folder: Path, stage: str, model: ModelConfig, more: dict) -> None:
    """A model folder with random weights, tokenizer and image settings."""
    params = random_params(medmoe.leaves(model), np.random.default_rng(0))
    checkpoint.save_model(folder, params | more, checkpoint.ModelMeta(stage, model))
    save_tokenizer(folder / "tokenizer")
    settings = json.dumps(preprocessor_config(model.vision))
    (folder / "preprocessor_config.json").write_text(settings)
