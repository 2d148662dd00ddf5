"""Every original format goes the whole way: prepare, check, train, predict, evaluate."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import miniature_sources as mini
import pytest
import tiny_runs
from miniature_sources import lines, prepare

from medmoe_jax import evaluate, predict, train
from medmoe_jax.config import DataConfig, RunConfig
from medmoe_jax.data.check.__main__ import main as check

pytestmark = pytest.mark.usefixtures("quick_compile")
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "make", "more"),
    [
        ("slake", mini.slake, ["--language", "both"]),
        pytest.param("vqa_rad", mini.vqa_rad, [], marks=slow),
        pytest.param("vqa_rad", mini.vqa_rad_mirror, [], marks=slow),
        pytest.param("path_vqa", mini.path_vqa, [], marks=slow),
        pytest.param("med_moe", mini.med_moe, [], marks=slow),
    ],
)
def test_the_whole_way(
    tmp_path: Path, name: str, make: Callable[[Path], Path], more: list[str]
) -> None:
    out = tmp_path / name
    assert prepare(name, make(tmp_path / "source"), out, "--allow-counts", *more) == 0
    leaks = make is mini.vqa_rad_mirror  # its miniature shares a picture between the splits
    assert check([str(out / "manifest.jsonl"), "--out", str(tmp_path / "report")]) == leaks
    found = json.loads((tmp_path / "report" / "report.json").read_text())
    assert found["rows"] == len(lines(out / "manifest.jsonl"))

    config = RunConfig(
        phase="stage2",
        train=(".*",),
        data=DataConfig(image_folder=str(out / "images"), template="phi", max_length=512),
    )
    start = tiny_runs.save_start(tmp_path / "start")
    config = tiny_runs.run_config(config, start, out / "train.jsonl", steps=20)
    # One batch of all rows again and again, so that the loss must fall.
    optim = dataclasses.replace(config.optim, batch_size=2, lr=1e-2)
    data = dataclasses.replace(config.data, buckets=(512,))
    train.train(dataclasses.replace(config, optim=optim, data=data), tmp_path / "run")
    losses = [json.loads(line)["loss"] for line in
              (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]  # fmt: skip
    assert len(losses) == 20 and sum(losses[-4:]) < 0.8 * sum(losses[:4])

    asked = lines(out / "test.jsonl")
    answers = tmp_path / "answers.jsonl"
    options = ["--model-path", tmp_path / "run" / "model", "--question-file", out / "test.jsonl"]
    options += ["--image-folder", out / "images", "--answers-file", answers]
    options += ["--max-new-tokens", "4"]
    assert predict.predict(predict.arguments().parse_args(list(map(str, options)))) == 0
    assert [str(row["question_id"]) for row in lines(answers)] == [row["id"] for row in asked]
    report = evaluate.evaluate(out / "test.jsonl", answers, metric="strict", samples=10)
    assert (report["n"], report["errors"]) == (len(asked), {})
