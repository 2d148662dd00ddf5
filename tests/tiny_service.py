"""Random model folders that can be asked something: weights, tokenizer and image settings."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import small_models
from tiny_data import save_tokenizer

from medmoe_jax import checkpoint
from medmoe_jax.config import ModelConfig, MoeConfig
from medmoe_jax.convert.export_configs import preprocessor_config

WORDS = 440  # rows of the embedding; some belong to no word, as in the real models
OFTEN = 350  # a word that the random model likes to say


def config(family: str = "phi", moe: MoeConfig | None = None, **llm: Any) -> ModelConfig:
    """A model of some ten thousand parameters with the vocabulary of the test tokenizer."""
    small = small_models.config(family, moe, layers=2)
    return dataclasses.replace(
        small, llm=dataclasses.replace(small.llm, **({"vocab": WORDS} | llm))
    ).validate()


def save(folder: Path, model: ModelConfig, seed: int = 0) -> Path:
    """A model folder whose parameters are random, biases and norms too.

    Attention is sharp enough for answers to depend on what was asked, and the end mark takes the
    scores of a word that is often said.
    """
    params = small_models.params(model, seed)
    for name in ("q", "k", "v", "out"):
        params["llm"]["layers"]["attn"][name]["kernel"] *= 3
    head = params["llm"]["lm_head"]["kernel"]
    head[:, [0, OFTEN]] = head[:, [OFTEN, 0]]
    checkpoint.save_model(folder, params, checkpoint.ModelMeta("base", model))
    save_tokenizer(folder / "tokenizer")
    settings = json.dumps(preprocessor_config(model.vision))
    (folder / "preprocessor_config.json").write_text(settings)
    return folder
