"""Evaluation during training says what `predict` and `evaluate` say of the same weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import tiny_runs

import medmoe_jax
from medmoe_jax import predict, train
from medmoe_jax.config import EvaluationConfig, OptimConfig, RunConfig
from medmoe_jax.data import questions
from medmoe_jax.evaluation.report import report

pytestmark = pytest.mark.usefixtures("quick_compile")


def test_figures_are_those_of_the_finished_model(tmp_path: Path) -> None:
    start = tiny_runs.save_start(tmp_path / "start")
    file = tiny_runs.save_questions(tmp_path / "data", 8)
    cfg = RunConfig(
        phase="stage2",
        model=tiny_runs.model_config(),
        train=("projector/.*", "llm/.*"),
        compute_dtype="float32",
        frozen_dtype="float32",
        optim=OptimConfig(lr=1e-3, steps=3),
        evaluation=EvaluationConfig(
            every=2, file=str(file), split="held out", rows=6, batch_size=4, max_new_tokens=5
        ),
    )
    train.train(tiny_runs.run_config(cfg, start, file), tmp_path / "run")
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if any(key.startswith("held out/") for key in line)]
    assert [line["step"] for line in found] == [2, 3]

    model = medmoe_jax.load(tmp_path / "run" / "model")
    asked = questions.read_questions(file)[:6]
    how = medmoe_jax.Sampling(max_new_tokens=5)
    stream = predict.replies(model, asked, file.parent / "images", how, batch_size=3)
    said = sorted(
        (predict.row(q, reply, "", "shown") for q, reply in stream), key=lambda r: r["question_id"]
    )
    rows = json.loads(file.read_text())[:6]
    want = report(rows, said, samples=0)["summary"]
    assert {f"held out/{k}": v for k, v in want.items() if v is not None} == {
        k: v for k, v in found[-1].items() if k != "step"
    }
    assert "held out/closed accuracy" in found[-1] and "held out/open recall" in found[-1]


def test_a_missing_file_stops_before_training(tmp_path: Path) -> None:
    start = tiny_runs.save_start(tmp_path / "start")
    file = tiny_runs.save_questions(tmp_path / "data", 4)
    cfg = tiny_runs.run_config(RunConfig(phase="stage2", train=("llm/.*",)), start, file)
    cfg = dataclasses.replace(cfg, evaluation=EvaluationConfig(every=1, file="none.json"))
    with pytest.raises(ValueError, match=r"none\.json"):
        train.train(cfg, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
