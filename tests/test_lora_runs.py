"""Runs with adapters: what is frozen, kept, resumed, read, merged and converted."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny_runs
from flax.traverse_util import flatten_dict, unflatten_dict

import medmoe_jax
from medmoe_jax import checkpoint, lora, model, router, train
from medmoe_jax.checkpoint import CheckpointError
from medmoe_jax.config import ConfigError, LoraConfig, MoeConfig, RunConfig
from medmoe_jax.convert import torch_reference
from medmoe_jax.convert.to_torch import to_torch
from medmoe_jax.lora import __main__ as command
from medmoe_jax.models import grouped

pytestmark = pytest.mark.usefixtures("quick_compile")

STEPS = 4


def flat(folder: Path) -> dict[str, np.ndarray]:
    return flatten_dict(checkpoint.load_model(folder)[0], sep="/")


def raw(folder: Path) -> dict[str, np.ndarray]:
    """What lies in the folder, without the model it belongs to."""
    return flatten_dict(checkpoint.read_params(folder), sep="/")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A dense model with a router in `start`, and a finished run of stage 3 in `run`."""
    before, grouped.BUCKETS = grouped.BUCKETS, 1  # fewer loops to compile
    root = tmp_path_factory.mktemp("lora")
    tiny_runs.save_start(root / "dense")
    params, meta = checkpoint.load_model(root / "dense")
    params |= {"router": jax.device_get(router.fresh(meta.model, MoeConfig(), 0))}
    checkpoint.save_model(root / "start", params, meta, assets_from=root / "dense")
    tiny_runs.save_questions(root / "data")
    train.train(config(root), root / "run")
    yield root
    grouped.BUCKETS = before


def config(root: Path) -> RunConfig:
    """Stage 3 with adapters and dropout."""
    run = tiny_runs.run_config(
        tiny_runs.phase("stage3"), root / "start", root / "data" / "questions.json", steps=STEPS
    )
    return dataclasses.replace(
        run,
        lora=LoraConfig(rank=2, dropout=0.1),
        optim=dataclasses.replace(run.optim, lr=3e-2),
        log=dataclasses.replace(run.log, save_every=2),
    )


def test_the_folder_holds_adapters_alone(root: Path) -> None:
    """They have learned, they are small, and everything else is as it was."""
    delta = raw(root / "run" / "model")
    assert all(lora.is_adapter(path) for path in delta) and len(delta) == 8
    assert all(np.abs(value).max() > 0 for path, value in delta.items() if "meta" in path)
    meta = checkpoint.read_meta(root / "run" / "model")
    assert meta.delta and meta.delta.lora == config(root).lora
    assert meta.history[-1].endswith("paper start, LoRA of rank 2")
    sizes = [
        sum(f.stat().st_size for f in (root / name / "params").rglob("*") if f.is_file())
        for name in ("run/model", "start")
    ]
    assert sum(value.nbytes for value in delta.values()) < 0.5 * sizes[1] > sizes[0]
    merged, start = flat(root / "run" / "model"), flat(root / "start")
    for path, value in merged.items():
        if not path.startswith(("llm/moe/", "llm/mlp/")):
            np.testing.assert_array_equal(value, start[path])
    np.testing.assert_array_equal(merged["llm/mlp/fc1/kernel"][0], start["llm/mlp/fc1/kernel"][1])
    # By hand: expert 3's first matrix, scale 2.
    a, b = (delta[f"llm/moe/experts/fc1/lora_{n}"][0, 3] for n in "ab")
    want = start["llm/mlp/fc1/kernel"][0] + 2 * a @ b
    np.testing.assert_allclose(merged["llm/moe/experts/fc1/kernel"][0, 3], want, atol=1e-6)


def test_a_run_goes_on_bit_for_bit(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the checkpoint in its middle, which holds the adapters and their moments alone."""
    again = root / "again"
    shutil.copytree(root / "run", again)
    shutil.rmtree(again / "model")
    kept: list[Any] = []
    restore = train.resume.Checkpoints.restore

    def spy(self: Any, step: int, like: Any) -> Any:
        kept.append((step, jax.tree_util.tree_leaves_with_path(like)))
        return restore(self, step, like)

    monkeypatch.setattr(train.resume.Checkpoints, "restore", spy)
    shutil.rmtree(again / "checkpoints" / str(STEPS))
    train.train(config(root), again)
    step, leaves = kept[0]
    assert step == 2
    held = [jax.tree_util.keystr(path) for path, leaf in leaves if leaf.ndim]
    assert len(held) == 3 * 8 and all("lora_" in name for name in held)
    first, second = raw(root / "run" / "model"), raw(again / "model")
    for path, value in first.items():
        np.testing.assert_array_equal(second[path], value)
    lines = [(root / name / "metrics.jsonl").read_text().splitlines() for name in ("run", "again")]
    losses = [[json.loads(line)["loss"] for line in part] for part in lines]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS


def test_a_run_beside_8_bits(root: Path) -> None:
    """It learns otherwise than beside floats, goes on bit for bit, and what it made belongs to the
    model as it was before rounding."""
    run = dataclasses.replace(config(root), frozen_dtype="int8")
    train.train(run, root / "small")
    first = raw(root / "small" / "model")
    assert all(lora.is_adapter(path) for path in first) and len(first) == 8
    assert any(np.abs(first[k] - v).max() > 1e-5 for k, v in raw(root / "run" / "model").items())
    shutil.rmtree(root / "small" / "model")
    shutil.rmtree(root / "small" / "checkpoints" / str(STEPS))
    train.train(run, root / "small")
    for path, value in raw(root / "small" / "model").items():
        np.testing.assert_array_equal(value, first[path])
    a, b = (first[f"llm/moe/meta/fc1/lora_{n}"][0] for n in "ab")
    want = flat(root / "start")["llm/mlp/fc1/kernel"][0] + 2 * a @ b
    have = flat(root / "small" / "model")["llm/moe/meta/fc1/kernel"][0]
    np.testing.assert_allclose(have, want, atol=1e-6)


def test_it_is_read_as_a_whole_model(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loaded, merged to a plain folder, and converted: the same weights."""
    folder = root / "run" / "model"
    loaded = medmoe_jax.load(folder)
    assert command.main(["merge", str(folder), str(root / "merged")]) == 0
    plain = checkpoint.read_meta(root / "merged")
    assert plain.delta is None and plain.model.moe and (root / "merged" / "tokenizer").is_dir()
    merged, whole = raw(root / "merged"), flat(folder)
    assert merged.keys() == whole.keys()
    for path, value in whole.items():
        np.testing.assert_array_equal(merged[path], value)
    block = loaded.params["llm"]["blocks"][0]["moe"]["experts"][1]["fc1"]["kernel"]
    np.testing.assert_array_equal(block, whole["llm/moe/experts/fc1/kernel"][0, 1])
    to_torch(folder, root / "torch")
    kernel = torch_reference.read_tensors(root / "torch")[
        "model.layers.0.mlp.deepspeed_moe.experts.deepspeed_experts.1.fc1.weight"
    ]
    np.testing.assert_array_equal(kernel.numpy().T, block)
    assert command.main(["base", str(folder), str(root / "base")]) == 0
    before = raw(root / "base")["llm/moe/experts/fc1/kernel"]
    start = raw(root / "start")["llm/mlp/fc1/kernel"]
    np.testing.assert_array_equal(before[0], np.broadcast_to(start[0], before[0].shape))
    assert command.main(["merge", str(folder), str(root / "merged")]) == 1
    assert "exists already" in capsys.readouterr().err
    assert command.main(["merge", str(root / "start"), str(root / "none")]) == 1
    assert "holds no adapters" in capsys.readouterr().err


def test_the_base_must_be_the_right_one(root: Path, tmp_path: Path) -> None:
    """Moved together they find each other; another model, or none, is an error that says so."""
    shutil.copytree(root / "start", tmp_path / "start")
    shutil.copytree(root / "run" / "model", tmp_path / "run" / "model")
    file = tmp_path / "run" / "model" / "config.json"
    settings = json.loads(file.read_text())
    settings["delta"]["base"] = "/nowhere/start"
    file.write_text(json.dumps(settings))
    want = flat(root / "run" / "model")
    have = flat(tmp_path / "run" / "model")
    assert all(np.array_equal(have[path], value) for path, value in want.items())
    params, meta = checkpoint.load_model(tmp_path / "start")
    params["llm"]["final_ln"]["bias"][0] += 1
    checkpoint.save_model(tmp_path / "start", params, meta)
    with pytest.raises(CheckpointError, match=r"is not the model that the adapters .* trained on"):
        checkpoint.load_model(tmp_path / "run" / "model")
    shutil.rmtree(tmp_path / "start")
    with pytest.raises(
        CheckpointError, match=r"adapters for the model .*start, which is not there"
    ):
        model.load(tmp_path / "run" / "model")
    found, _ = checkpoint.load_model(tmp_path / "run" / "model", root / "start")
    kernel = found["llm"]["moe"]["meta"]["fc1"]["kernel"]
    np.testing.assert_array_equal(kernel, want["llm/moe/meta/fc1/kernel"])
    with pytest.raises(CheckpointError, match="is a whole model"):
        checkpoint.load_model(root / "start", root / "dense")


def test_a_router_from_elsewhere_is_kept(root: Path) -> None:
    """One that `init` does not hold, so that the model can be made again."""
    fresh = dataclasses.replace(config(root), router="fresh", seed=3)
    params, meta = train.starting_point(fresh)
    weights = flatten_dict(params, sep="/")
    kept = router.own(fresh, weights) | lora.fresh(fresh, weights)
    checkpoint.save_model(root / "other", unflatten_dict(kept, sep="/"), meta)
    assert set(raw(root / "other")) - set(lora.fresh(fresh, weights)) == {
        "router/fc1/kernel",
        "router/fc1/bias",
    }
    whole = flat(root / "other")
    assert whole.keys() == weights.keys()
    for path, value in weights.items():
        np.testing.assert_array_equal(whole[path], value)
    assert router.own(config(root), weights) == {}


def test_adapters_beside_adapters(root: Path) -> None:
    run = tiny_runs.run_config(
        tiny_runs.phase("stage2"), root / "run" / "model", root / "data" / "questions.json", steps=1
    )
    with pytest.raises(ConfigError, match="holds adapters without their model"):
        train.train(dataclasses.replace(run, lora=LoraConfig(rank=2)), root / "second")
