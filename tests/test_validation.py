"""Evaluation during training says what `predict` and `evaluate` say of the same weights."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import pytest
import tiny_runs
from tiny_data import save_rows

import medmoe_jax
from medmoe_jax import checkpoint, generate, lora, predict, quantize, train
from medmoe_jax.config import EvaluationConfig, LoraConfig, OptimConfig, RunConfig
from medmoe_jax.data import questions
from medmoe_jax.evaluation.report import report
from medmoe_jax.models.quantized import dequantize, is_quantized

pytestmark = pytest.mark.usefixtures("quick_compile")


def logged(workdir: Path, prefix: str) -> list[dict[str, float]]:
    """What a run logged of its evaluations."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if any(key.startswith(prefix) for key in line)]


def answers(model: medmoe_jax.Model, file: Path, rows: int, batch: int) -> list[dict[str, Any]]:
    """What `predict` writes for the first rows of a file."""
    asked, how = questions.read_questions(file)[:rows], medmoe_jax.Sampling(max_new_tokens=5)
    stream = predict.replies(model, asked, file.parent / "images", how, batch_size=batch)
    said = [predict.row(question, reply, "", "shown") for question, reply in stream]
    return sorted(said, key=lambda row: row["question_id"])


def assert_figures(found: dict[str, float], prefix: str, file: Path, said: list[Any]) -> None:
    """A logged line is the report on these answers."""
    want = report(json.loads(file.read_text())[: len(said)], said, samples=0)["summary"]
    assert {f"{prefix}{k}": v for k, v in want.items() if v is not None} == {
        k: v for k, v in found.items() if k != "step"
    }


def test_figures_are_those_of_the_finished_model(tmp_path: Path) -> None:
    start = tiny_runs.save_start(tmp_path / "start")
    file = tiny_runs.save_questions(tmp_path / "data", 8)
    named = json.loads(file.read_text())
    named[4]["id"] = named[1]["id"]  # as where several questions are named after their image
    doubled = save_rows(tmp_path / "data" / "doubled.json", named)
    cfg = RunConfig(
        phase="stage2",
        model=tiny_runs.model_config(),
        train=("projector/.*", "llm/.*"),
        compute_dtype="float32",
        frozen_dtype="float32",
        optim=OptimConfig(lr=1e-3, steps=3),
        evaluation=EvaluationConfig(
            every=2, file=str(doubled), split="held out", rows=6, batch_size=4, max_new_tokens=5
        ),
    )
    train.train(tiny_runs.run_config(cfg, start, file), tmp_path / "run")
    found = logged(tmp_path / "run", "held out/")
    assert [line["step"] for line in found] == [2, 3]

    model = medmoe_jax.load(tmp_path / "run" / "model")
    assert_figures(found[-1], "held out/", file, answers(model, file, rows=6, batch=3))
    assert "held out/closed accuracy" in found[-1] and "held out/open recall" in found[-1]

    # Ended behind saving the last step, before its evaluation: it is made up for, once.
    metrics = tmp_path / "run" / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text("".join(whole.splitlines(keepends=True)[:-1]))
    shutil.rmtree(tmp_path / "run" / "model")
    for _ in range(2):
        train.train(tiny_runs.run_config(cfg, start, file), tmp_path / "run")
        assert metrics.read_text() == whole
        (record,) = checkpoint.read_meta(tmp_path / "run" / "model").phases
        assert record["outcome"]["loss"] == json.loads(whole.splitlines()[-2])["loss"]
        shutil.rmtree(tmp_path / "run" / "model")


@pytest.mark.slow
def test_adapters_beside_8_bits(tmp_path: Path) -> None:
    """The figures are those of the rounded weights and the adapters, which `merge` leaves apart."""
    start = tiny_runs.save_start(tmp_path / "start")
    file = tiny_runs.save_questions(tmp_path / "data", 8)
    cfg = RunConfig(
        phase="stage2",
        model=tiny_runs.model_config(),
        train=("llm/.*",),
        lora=LoraConfig(rank=2, dropout=0.0),
        compute_dtype="float32",
        frozen_dtype="int8",
        optim=OptimConfig(lr=0.1, steps=4),
        evaluation=EvaluationConfig(every=4, file=str(file), max_new_tokens=5),
    )
    train.train(tiny_runs.run_config(cfg, start, file), tmp_path / "run")
    found = logged(tmp_path / "run", "val/")[0]

    adapters = checkpoint.read_params(tmp_path / "run" / "model")
    params, meta = checkpoint.load_model(start)
    rounded = jax.tree.map(
        lambda a: dequantize(a) if is_quantized(a) else a,
        quantize.quantize(params, 8),
        is_leaf=is_quantized,
    )
    whole = lora.merge(lora.joined(rounded, adapters), cfg.lora.scale)
    model = dataclasses.replace(
        medmoe_jax.load(start), params=generate.for_generation(whole, meta.model)
    )
    said = answers(model, file, rows=8, batch=8)
    assert_figures(found, "val/", file, said)
    untrained = answers(medmoe_jax.load(start), file, rows=8, batch=8)
    assert [row["text"] for row in untrained] != [row["text"] for row in said]


def test_a_file_that_cannot_be_used_stops_before_training(tmp_path: Path) -> None:
    start = tiny_runs.save_start(tmp_path / "start")
    file = tiny_runs.save_questions(tmp_path / "data", 4)
    cfg = tiny_runs.run_config(RunConfig(phase="stage2", train=("llm/.*",)), start, file)
    asked = save_rows(tmp_path / "asked.json", [{"id": 7, "text": "Why?"}])
    for name, message in (("none.json", r"none\.json"), (str(asked), "row 7 has no question with")):
        cfg = dataclasses.replace(cfg, evaluation=EvaluationConfig(every=1, file=name))
        with pytest.raises(ValueError, match=message):
            train.train(cfg, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
