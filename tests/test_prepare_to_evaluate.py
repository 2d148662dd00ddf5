"""Every original format goes the whole way: prepare, check, train, predict, evaluate."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import miniature_llava_med
import miniature_medmnist
import miniature_sources as mini
import pytest
import tiny_runs
from miniature_sources import lines, prepare

from medmoe_jax import evaluate, predict, train
from medmoe_jax.config import DataConfig, RunConfig
from medmoe_jax.data.check.__main__ import main as check

pytestmark = pytest.mark.usefixtures("quick_compile")
slow = pytest.mark.slow


def llava_med(folder: Path) -> Path:
    """Four conversations, one of each modality."""
    miniature_llava_med.images(folder / "images", 4)
    flags = ("chest_xray", "mri", "histology", "ct_scan")
    rows = [miniature_llava_med.instructed(i, flag) for i, flag in enumerate(flags)]
    miniature_llava_med.write_json(folder / "llava_med_instruct_60k_inline_mention.json", rows)
    return folder


def pneumonia(folder: Path) -> Path:
    """Two classes of X-ray."""
    miniature_medmnist.medmnist(folder, "pneumoniamnist")
    return folder


def table(folder: Path) -> Path:
    """One's own CSV, a question of each type in both splits."""
    lines = ["image,question,answer,answer_type,modality,split"]
    for i, split in enumerate(("train", "train", "test", "test")):
        mini.put(folder / f"{i}.png", mini.picture(i, "PNG"))
        closed = i % 2 == 0
        asked = ("Is it large?", "no", "closed") if closed else ("What is it?", "a lung", "open")
        lines.append(",".join((f"{i}.png", *asked, "CT", split)))
    return mini.put(folder / "mine.csv", ("\n".join(lines) + "\n").encode())


@pytest.mark.parametrize(
    ("name", "make", "more"),
    [
        ("slake", mini.slake, ["--language", "both"]),
        pytest.param("vqa_rad", mini.vqa_rad, [], marks=slow),
        pytest.param("vqa_rad", mini.vqa_rad_mirror, [], marks=slow),
        pytest.param("path_vqa", mini.path_vqa, [], marks=slow),
        pytest.param("med_moe", mini.med_moe, [], marks=slow),
        pytest.param("medmnist", pneumonia, [], marks=slow),
        pytest.param("llava_med", llava_med, [], marks=slow),
        pytest.param("custom", table, [], marks=slow),
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

    held_out = out / "test.jsonl"
    if not held_out.exists():  # LLaVA-Med is for training alone
        held_out = out / "train.jsonl"
    asked = lines(held_out)
    answers = tmp_path / "answers.jsonl"
    options = ["--model-path", tmp_path / "run" / "model", "--question-file", held_out]
    options += ["--image-folder", out / "images", "--answers-file", answers]
    options += ["--max-new-tokens", "4"]
    assert predict.predict(predict.arguments().parse_args(list(map(str, options)))) == 0
    assert [str(row["question_id"]) for row in lines(answers)] == [row["id"] for row in asked]
    report = evaluate.evaluate(held_out, answers, metric="strict", samples=10)
    assert (report["n"], report["errors"]) == (len(asked), {})
