"""Pieces of the demonstration: tokenizer, documents, patch classes, pretraining, launch script."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

from medmoe_jax.config import LlmConfig, ModelConfig, VisionConfig
from medmoe_jax.data import phantom, tokens
from medmoe_jax.demo import checkpoints, pretrain

ROOT = Path(__file__).resolve().parents[1]


def test_tokenizer_is_one_of_both_families(tmp_path: Path):
    texts = checkpoints.documents("phi", list(phantom.texts(0, 20)))
    assert any("ASSISTANT: " in text for text in texts)
    assert all(text.endswith("<|endoftext|>") for text in texts)
    checkpoints.make_tokenizer(texts, tmp_path)
    for family in ("phi", "stablelm"):
        tokenizer = tokens.load_tokenizer(tmp_path, family)
        assert len(tokenizer) <= LlmConfig().vocab
        for text in texts[:20]:
            assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_patch_classes_say_size_and_quadrant():
    found = set()
    for _, facts in phantom.generate(0, 40, size=32):
        classes = checkpoints.patch_classes(facts, 6).reshape(6, 6)
        assert (classes > 0).any() == bool(facts.lesions)
        names = [phantom.QUADRANTS[(c - 1) // 2] for c in np.unique(classes) if c]
        assert sorted(set(names)) == sorted(facts.quadrants)
        sizes = {("small", "large")[(c - 1) % 2] for c in np.unique(classes) if c}
        assert sizes <= {facts.size}
        found |= sizes
    assert found == {"small", "large"}


def test_pretraining_learns():
    """The tower learns to tell black from white pictures, the language model to count."""
    vision = VisionConfig(image_size=8, patch_size=4, width=16, layers=2, heads=2, ffn=16)
    label = np.arange(64, dtype=np.int32) % 2
    pictures = np.broadcast_to(label[:, None, None, None] * 200, (64, 8, 8, 3)).astype(np.uint8)
    patches = np.repeat(label[:, None], 4, 1)
    tower, accuracy = pretrain.vision(
        vision, pictures, {"white": label}, patches, steps=30, batch=16
    )
    assert accuracy > 0.95 and tower["position_embedding"].shape == (5, 16)
    llm = LlmConfig(vocab=12, width=16, layers=2, ffn=32, heads=2, kv_heads=2, rotary_fraction=0.5)
    model = ModelConfig(vision, llm)
    counting = [list(range(12))] * 20
    _, loss = pretrain.language(model, counting, steps=80, length=12, lr=1e-2)
    assert loss < 0.5 * np.log(12)


@pytest.mark.parametrize("arguments", [[], ["tiny"]])
def test_launch_script_says_what_it_wants(arguments: list[str]):
    done = subprocess.run(
        [ROOT / "launch" / "phases.sh", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "WORKDIR" in done.stderr
