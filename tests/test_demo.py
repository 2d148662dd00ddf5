"""Pieces of the demonstration: tokenizer, documents, patch classes, pretraining, launch script."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from medmoe_jax.config import ConfigError, LlmConfig, ModelConfig, VisionConfig
from medmoe_jax.data import phantom, templates, tokens
from medmoe_jax.demo import checkpoints, pretrain
from medmoe_jax.demo.__main__ import Demo

pytestmark = pytest.mark.usefixtures("quick_compile")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = phantom.texts(0, 20)
    checkpoints.make_tokenizer((templates.prompt("phi", t, images=0) for t in texts), folder)
    return folder


@pytest.mark.parametrize("family", ["phi", "stablelm"])
def test_tokenizer_is_one_of_both_families(vocabulary: Path, family: str):
    tokenizer = tokens.load_tokenizer(vocabulary, family)
    assert len(tokenizer) <= LlmConfig().vocab
    for text in [*phantom.texts(0, 5)][:40]:
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer(" ASSISTANT").input_ids) == 1


def test_readings_weigh_answers(vocabulary: Path):
    tokenizer = tokens.load_tokenizer(vocabulary, "phi")
    ids, weights = checkpoints.readings(0, 30, "phi", tokenizer)
    assert ids.shape == weights.shape and ids.shape[1] == checkpoints.LENGTH
    read = phantom.readings(0, 30, checkpoints.ROUNDS)
    for row, weight, rounds in zip(ids, weights, read, strict=True):
        text = tokenizer.decode(row[weight > 0])
        assert text.startswith(
            f"{templates.SYSTEM} USER: {rounds[0][0]} ASSISTANT: {rounds[0][1]}<|endoftext|>"
        )
        learnt = tokenizer.decode(row[weight == checkpoints.ANSWER_WEIGHT])
        whole = "".join(f" {answer}<|endoftext|>" for _, answer in rounds)
        assert whole.startswith(learnt) and len(learnt) > len(whole) / 3


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
    counting = np.tile(np.arange(12, dtype=np.int32), (20, 1))
    _, loss = pretrain.language(model, counting, np.ones((20, 12)), steps=80, lr=1e-2)
    assert loss < 0.5 * np.log(12)


@pytest.mark.parametrize("arguments", [[], ["tiny"]])
def test_launch_script_says_what_it_wants(arguments: list[str]):
    done = subprocess.run(
        [ROOT / "launch" / "phases.sh", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "WORKDIR" in done.stderr


def test_quick_demonstration_trains_less_and_keeps_to_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The same steps up to phase 3, shorter; done ones are not run again, and a folder that was
    begun otherwise is refused."""
    commands: list[list[str]] = []

    def run(words: list[str], **_: object) -> subprocess.CompletedProcess:
        commands.append(words)
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(subprocess, "run", run)
    demo = Demo(tmp_path, "phi", 0, quick=True)
    demo.make()
    assert [words[2].removeprefix("medmoe_jax.") for words in commands] == [
        *("data.phantom", "demo.checkpoints", "convert", "train", "train", "train", "train")
    ]
    steps = [int(w.split("=")[1]) for words in commands for w in words if "optim.steps" in w]
    assert len(steps) == 4 and all(0 < n <= 100 for n in steps)
    config = next(w for w in commands[-1] if w.startswith("--config="))
    assert Path(config.removeprefix("--config=").removesuffix(":tiny")).is_file()
    Demo(tmp_path, "phi", 0, quick=True).make()
    assert len(commands) == 7
    with pytest.raises(ConfigError, match="take another --workdir"):
        Demo(tmp_path, "phi", 0, quick=False)


def test_an_interrupted_demonstration_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What a stopped command left where it wants an empty folder is in nobody's way."""
    states: list[dict[str, bool]] = []
    made = ("torch", "start", "exported")

    def run(words: list[str], **_: object) -> subprocess.CompletedProcess:
        states.append({name: (tmp_path / name).exists() for name in made})
        return subprocess.CompletedProcess(words, len(states) == 2)  # the second step fails

    monkeypatch.setattr(subprocess, "run", run)
    for name in made:
        (tmp_path / name / "half").mkdir(parents=True)
    with pytest.raises(SystemExit, match="'tiny checkpoints' failed"):
        Demo(tmp_path, "phi", 0, quick=True).make()
    assert [state["torch"] for state in states] == [True, False]
    demo = Demo(tmp_path, "phi", 0, quick=True)
    demo.make()
    demo.judge()
    assert not any(states[-1].values())
    (tmp_path / "torch" / "clip").mkdir(parents=True)  # finished: it stays
    Demo(tmp_path, "phi", 0, quick=True).make()
    assert (tmp_path / "torch" / "clip").is_dir()


def test_checkpoints_are_not_made_over_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / "mine.txt").write_text("mine")
    monkeypatch.setattr(sys, "argv", ["checkpoints", "--out", str(tmp_path)])
    monkeypatch.setattr(checkpoints, "make_vision", lambda *_: pytest.fail("trained first"))
    with pytest.raises(SystemExit, match="exists already"):
        checkpoints.main()


@pytest.mark.parametrize("steps", [1, 2])
def test_the_shortest_pretraining(steps: int):
    rate = pretrain._adamw(1e-3, steps)
    assert rate.init(np.zeros(1)) is not None
