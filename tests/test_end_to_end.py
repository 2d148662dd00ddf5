"""From original files to figures: prepare, check, train, predict, evaluate by their commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import miniature_medmnist
import miniature_sources
import pytest
import tiny_runs

from medmoe_jax.data.check.__main__ import main as check
from medmoe_jax.data.prepare.__main__ import main as prepare

ROOT = Path(__file__).resolve().parents[1]


def prepared(name: str, folder: Path) -> Path:
    """A prepared folder of a miniature source."""
    if name == "medmnist":
        source = miniature_medmnist.medmnist(folder / "source", "pneumoniamnist")
    else:
        source = miniature_sources.vqa_rad(folder / "source")
    out = folder / name
    command = [name, "--source", str(source), "--out", str(out), "--allow-counts"]
    assert prepare(command) == 0
    return out


def run(module: str, *arguments: object) -> str:
    """Runs `python -m medmoe_jax.MODULE`; what it printed."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    env["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # compiles in half the time
    command = [sys.executable, "-m", f"medmoe_jax.{module}", *map(str, arguments)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_prepared_folders_are_fit_to_train_on(tmp_path: Path) -> None:
    """What prepare writes, check finds no error in, leakage between splits apart."""
    out = prepared("vqa_rad", tmp_path)
    report = tmp_path / "report"
    status = check([str(out), "--out", str(report), "--leakage", "warning"])
    assert status == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vqa_rad", "medmnist"])
def test_from_source_to_figures(tmp_path: Path, name: str) -> None:
    out = prepared(name, tmp_path)
    start, workdir = tiny_runs.save_start(tmp_path / "start"), tmp_path / "run"
    run(
        *("train", f"--config={ROOT / 'configs/stage2.py'}:tiny", f"--workdir={workdir}"),
        *(f"--config.init={start}", f"--config.data.files=('{out / 'train.jsonl'}',)"),
        *("--config.data.batching=pack", "--config.optim.batch_size=2", "--config.remat=none"),
        *("--config.optim.steps=20", "--config.log.every=1", "--config.log.tensorboard=False"),
    )
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert all(0 <= row["padding"] < 1 for row in rows)

    answers, figures = tmp_path / "answers.jsonl", tmp_path / "figures.json"
    run(
        *("predict", "--model-path", workdir / "model", "--question-file", out / "test.jsonl"),
        *("--image-folder", out / "images", "--answers-file", answers, "--max-new-tokens", 4),
    )
    wanted = miniature_sources.lines(out / "test.jsonl")
    assert len(miniature_sources.lines(answers)) == len(wanted) > 0
    run("evaluate", "--gt", out / "test.jsonl", "--pred", answers, "--out", figures)
    assert json.loads(figures.read_text())["summary"]
