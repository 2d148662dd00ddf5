"""Small random Hugging Face folders, saved by the installed transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch_folders as folders
import transformers

from medmoe_jax.convert import Report

SIZES = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CLIP_SIZES = {
    "hidden_size": 16,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 12,
    "patch_size": 4,
}


def make_llm(folder: Path, family: str, **changes: Any) -> Any:
    """Saves a random language model with the installed transformers; returns it."""
    if family == "phi":
        config = transformers.PhiConfig(**(SIZES | changes))
    else:
        config = transformers.StableLmConfig(**(SIZES | {"use_qkv_bias": True} | changes))
    config.rope_parameters["partial_rotary_factor"] = 0.34  # 2 of 6 dimensions
    model = transformers.AutoModelForCausalLM.from_config(config)
    randomise(model).save_pretrained(folder)
    return model


def make_clip(folder: Path) -> Any:
    """Saves a random vision tower and its image settings; returns the tower."""
    model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**CLIP_SIZES))
    randomise(model).save_pretrained(folder)
    folders.write_json(folder / "preprocessor_config.json", {"crop_size": 12})
    return model


def randomise(model: Any) -> Any:
    """Gives every parameter random numbers, biases and norms too."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model.eval()


def make_tokenizer(folder: Path) -> None:
    """Writes files under a tokenizer's names."""
    folders.write_json(folder / "tokenizer.json", {"model": {}})
    folders.write_json(folder / "tokenizer_config.json", {"eos_token": "<|endoftext|>"})


def ignored(report: Report) -> list[str]:
    """All keys that were left out."""
    return [key for keys in report.ignored.values() for key in keys]


def assert_equal_trees(a: Any, b: Any) -> None:
    """Same names and numbers."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal_trees(a[key], b[key])
    else:
        np.testing.assert_array_equal(a, b)
