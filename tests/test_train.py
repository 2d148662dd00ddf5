"""The trainer: every phase, resuming, freezing, and what it says of bad input."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_runs
from flax.traverse_util import flatten_dict
from tiny_data import save_image
from tiny_runs import phase

from medmoe_jax import checkpoint, train
from medmoe_jax.config import ConfigError, MoeConfig
from medmoe_jax.data.problems import DataError
from medmoe_jax.report import MetricWriter, NotFinite

pytestmark = pytest.mark.usefixtures("quick_compile")
ROOT = Path(__file__).resolve().parents[1]


def losses(workdir: Path) -> list[float]:
    """Loss of every step."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def flat(folder: Path) -> dict[str, np.ndarray]:
    return flatten_dict(checkpoint.load_model(folder)[0], sep="/")


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.save_questions(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module", params=["phi", "stablelm"])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, questions: Path):
    """All four phases, one after the other; folder of the runs."""
    root = tmp_path_factory.mktemp(request.param)
    tiny_runs.save_start(root / "start", request.param)
    size = {"phi": "tiny", "stablelm": "tiny_stablelm"}[request.param]
    before = root / "start"
    for name in ("stage1", "stage2", "router", "stage3"):
        config = tiny_runs.run_config(phase(name, size), before, questions, steps=3)
        if name == "router":
            config = dataclasses.replace(
                config, data=dataclasses.replace(config.data, labels_per_modality=2)
            )
        train.train(config, root / name)
        before = root / name / "model"
    return root


def test_phases_train_what_they_say(runs: Path):
    trained = {
        "stage1": ("projector/",),
        "stage2": ("projector/", "llm/"),
        "router": ("router/",),
    }
    before = flat(runs / "start")
    for name, prefixes in trained.items():
        after = flat(runs / name / "model")
        for path, value in after.items():
            if path in before:
                same = np.array_equal(before[path], value)
                # The key's bias moves every score of a query alike: its gradient is rounding.
                if path != "llm/layers/attn/k/bias":
                    assert same != path.startswith(prefixes), f"{name}: {path}"
        before = after
    moe = flat(runs / "stage3" / "model")
    for path, value in moe.items():
        if path.startswith(("llm/moe/experts", "llm/moe/meta")):
            source = before["llm/mlp/" + "/".join(path.split("/")[3:])][[0]]
            spread = np.broadcast_to(source[:, None] if "experts" in path else source, value.shape)
            # Three tokens' worth of training may leave an expert alone that no token chose.
            assert "experts" in path or not np.array_equal(spread, value), path
        elif path.startswith("llm/moe/router/"):
            np.testing.assert_array_equal(value[0], before[path.removeprefix("llm/moe/")])
        elif path.startswith("llm/mlp/"):
            np.testing.assert_array_equal(value, before[path][[1]])
        else:
            np.testing.assert_array_equal(value, before[path])


def test_history_and_stage_are_written(runs: Path):
    meta = checkpoint.read_meta(runs / "stage3" / "model")
    assert meta.stage == "stage3"
    assert [line.split()[0] for line in meta.history] == ["stage1", "stage2", "router", "stage3"]
    assert meta.model.moe == MoeConfig()
    assert (runs / "stage3" / "model" / "tokenizer" / "tokenizer.json").exists()


def test_phases_are_recorded_one_after_the_other(runs: Path, questions: Path):
    phases = checkpoint.read_meta(runs / "stage3" / "model").phases
    names = ["stage1", "stage2", "router", "stage3"]
    assert [record["phase"] for record in phases] == names
    assert [Path(record["init"]).parent.name for record in phases][1:] == names[:-1]
    assert [record["rows"]["used"] for record in phases] == [16, 16, 8, 16]
    for name, record in zip(names, phases, strict=True):
        assert record["files"][0]["file"] == str(questions) and record["steps"] == 3
        assert record["outcome"]["loss"] == losses(runs / name)[-1]
        assert 0 < record["parameters"]["trained"] < record["parameters"]["all"]
    report = json.loads((runs / "router" / "router.json").read_text())
    assert phases[2]["outcome"]["router"] == report


def test_router_is_judged_on_rows_that_were_not_drawn(runs: Path):
    report = json.loads((runs / "router" / "router.json").read_text())
    assert report["n"] == 16 - 4 * 2
    assert np.sum(report["confusion"]) == report["n"]
    assert report["accuracy"] == pytest.approx(np.trace(report["confusion"]) / report["n"])


def test_finished_run_is_left_alone(runs: Path, questions: Path, capsys: pytest.CaptureFixture):
    metrics = (runs / "stage1" / "metrics.jsonl").read_text()
    family = checkpoint.read_meta(runs / "start").model.llm.family
    same = phase("stage1", {"phi": "tiny", "stablelm": "tiny_stablelm"}[family])
    config = tiny_runs.run_config(same, runs / "start", questions, steps=3)
    train.train(config, runs / "stage1")
    assert "is finished" in capsys.readouterr().out
    assert (runs / "stage1" / "metrics.jsonl").read_text() == metrics
    longer = dataclasses.replace(config, optim=dataclasses.replace(config.optim, steps=4))
    with pytest.raises(ConfigError, match=r"another config \(different: optim\)"):
        train.train(longer, runs / "stage1")


def test_learns_and_accumulates(tmp_path: Path, questions: Path):
    """Loss falls; two half batches a step give the losses of a whole one."""
    start = tiny_runs.save_start(tmp_path / "start")
    config = tiny_runs.run_config(phase("stage2"), start, questions, steps=8, lr=3e-2)
    traced = dataclasses.replace(config.log, profile_steps=(2, 3))
    train.train(dataclasses.replace(config, log=traced), tmp_path / "whole")
    assert list((tmp_path / "whole" / "profile").rglob("*.xplane.pb"))
    halves = dataclasses.replace(config, optim=dataclasses.replace(config.optim, accumulate=2))
    train.train(halves, tmp_path / "halves")
    whole = losses(tmp_path / "whole")
    assert whole[-1] < 0.8 * whole[0]
    np.testing.assert_allclose(losses(tmp_path / "halves"), whole, rtol=2e-4)


def command(config: str, start: Path, questions: Path, workdir: Path, steps: int) -> list[str]:
    return [
        *(sys.executable, "-m", "medmoe_jax.train", f"--config={ROOT / 'configs' / config}"),
        *(f"--workdir={workdir}", f"--config.init={start}"),
        *(
            f"--config.data.files=('{questions}',)",
            "--config.data.buckets=(128,)",
            "--config.remat=none",
        ),
        *(f"--config.data.image_folder={questions.parent / 'images'}", "--config.log.every=1"),
        *("--config.log.save_every=5", "--config.optim.batch_size=4"),
        *(f"--config.optim.steps={steps}", "--config.log.tensorboard=False"),
    ]


def test_killed_run_gives_the_same_losses(tmp_path: Path, questions: Path):
    """SIGKILL in the middle, then the same command again: bit for bit the uninterrupted run."""
    start = tiny_runs.save_start(tmp_path / "start")
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    env |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # compiles in half the time
    steps = 80
    whole = command("stage2.py:tiny", start, questions, tmp_path / "whole", steps)
    subprocess.run(whole, check=True, env=env, capture_output=True, cwd=ROOT)
    killed = command("stage2.py:tiny", start, questions, tmp_path / "killed", steps)
    running = subprocess.Popen(killed, env=env, stderr=subprocess.DEVNULL, cwd=ROOT)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (metrics.exists() and metrics.read_text().count("\n") > 12):
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert not (tmp_path / "killed" / "model").exists()
    again = subprocess.run(killed, check=True, env=env, capture_output=True, text=True, cwd=ROOT)
    assert "resumed at step" in again.stdout
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    first, second = flat(tmp_path / "whole" / "model"), flat(tmp_path / "killed" / "model")
    for path, value in first.items():
        np.testing.assert_array_equal(second[path], value)


def test_metrics_of_lost_steps_are_dropped_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "metrics.jsonl"
    before = "".join(f'{{"step": {n}}}\n' for n in range(1, 6)) + '{"step": 6, "lo'
    file.write_text(before)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", killed)
        MetricWriter(tmp_path, 3, tensorboard=False)
    assert file.read_text() == before
    MetricWriter(tmp_path, 3, tensorboard=False).close()
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 3]


def test_faults_of_the_user_are_named(
    tmp_path: Path, questions: Path, capsys: pytest.CaptureFixture
):
    start = tiny_runs.save_start(tmp_path / "start")
    stage3 = tiny_runs.run_config(phase("stage3"), start, questions, steps=1)
    with pytest.raises(ConfigError, match="holds no router"):
        train.train(stage3, tmp_path / "a")
    router = tiny_runs.run_config(phase("router"), start, questions, steps=1)
    with pytest.raises(DataError, match="CT"):
        train.train(router, tmp_path / "b")  # 200 rows a modality are not there
    for wrong, message in (({"experts": 0}, "experts is 0"), ({"placement": "0,3"}, "below 2")):
        mixture = dataclasses.replace(MoeConfig(), **wrong)  # the start has two layers
        other = dataclasses.replace(router, model=dataclasses.replace(router.model, moe=mixture))
        with pytest.raises(ConfigError, match=message):
            train.starting_point(other)
    stage2 = tiny_runs.run_config(phase("stage2"), start, questions, steps=1)
    with pytest.raises(ConfigError, match=r"config\.init"):
        train.train(dataclasses.replace(stage2, init=""), tmp_path / "c")
    with pytest.raises(ConfigError, match=r"'[(]' is no regular expression"):
        train.train(dataclasses.replace(stage2, train=("(",)), tmp_path / "e")
    with pytest.raises(ConfigError, match="matches no parameter"):
        train.train(dataclasses.replace(stage2, train=("llm/typo/.*",)), tmp_path / "e")
    train.train(stage2, tmp_path / "e")
    # The shapes of the folder count, whatever the config says of them.
    asked, found = stage2.model.llm.width, tiny_runs.model_config().llm.width
    assert asked != found
    assert f"llm.width {asked} (there {found})" in capsys.readouterr().out
    other = dataclasses.replace(stage2, seed=1)
    (tmp_path / "e" / "model" / "config.json").unlink()
    with pytest.raises(ConfigError, match="another config"):
        train.train(other, tmp_path / "e")
    # Trained anew meanwhile: its frozen weights are not those that the run goes on from.
    params, meta = checkpoint.load_model(start)
    checkpoint.save_model(start, params, dataclasses.replace(meta, history=["anew"]))
    with pytest.raises(ConfigError, match=r"another model than the one that .*e began with"):
        train.train(stage2, tmp_path / "e")


def test_broken_rows_stop_or_are_left_out(tmp_path: Path):
    questions = tiny_runs.save_questions(tmp_path / "data")
    start = tiny_runs.save_start(tmp_path / "start")
    (questions.parent / "images" / "i3.png").unlink()
    (questions.parent / "images" / "i5.png").write_bytes(b"no picture")
    config = tiny_runs.run_config(phase("stage2"), start, questions, steps=4)
    with pytest.raises(DataError, match=r"row 3 .*i3\.png"):
        train.train(config, tmp_path / "strict")
    skip = dataclasses.replace(config, data=dataclasses.replace(config.data, on_error="skip"))
    train.train(skip, tmp_path / "lenient")
    left_out = (tmp_path / "lenient" / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in left_out] == [3, 5]


def test_nan_stops_the_run_and_names_the_rows(tmp_path: Path, questions: Path):
    start = tiny_runs.save_start(tmp_path / "start")
    params, meta = checkpoint.load_model(start)
    params["projector"]["fc0"]["kernel"][0, 0] = np.nan
    checkpoint.save_model(tmp_path / "nan", params, meta, assets_from=start)
    config = tiny_runs.run_config(phase("stage2"), tmp_path / "nan", questions, steps=4)
    with pytest.raises(NotFinite, match=r"loss.*questions\.json row \d+ \(id r\d+\)"):
        train.train(config, tmp_path / "run")


def test_image_changes_the_loss(tmp_path: Path):
    """Other pictures, other losses: the model does look at the image."""
    first = tiny_runs.save_questions(tmp_path / "one")
    second = tiny_runs.save_questions(tmp_path / "two")
    for i in range(16):
        save_image(second.parent / "images" / f"i{i}.png", seed=100 + i)
    start = tiny_runs.save_start(tmp_path / "start")
    for name, questions in (("a", first), ("b", second)):
        train.train(
            tiny_runs.run_config(phase("stage2"), start, questions, steps=1), tmp_path / name
        )
    assert losses(tmp_path / "a") != losses(tmp_path / "b")


@pytest.mark.parametrize("trainable", ["paper", "official"])
def test_stage3_with_an_official_router_file(tmp_path: Path, questions: Path, trainable: str):
    torch = pytest.importorskip("torch", reason="the [torch] extra is not installed")
    start = tiny_runs.save_start(tmp_path / "start", "stablelm")
    weights = {"fc1.weight": torch.randn(4, 16), "fc1.bias": torch.randn(4)}
    torch.save(weights, tmp_path / "router.pth")
    config = tiny_runs.run_config(phase("stage3", "tiny_stablelm"), start, questions, steps=2)
    config = dataclasses.replace(config, router=str(tmp_path / "router.pth"))
    if trainable == "official":
        rules = ("llm/moe/(experts|meta)/.*", "llm/mlp/.*", "projector/.*")
        config = dataclasses.replace(config, train=rules)
    train.train(config, tmp_path / "run")
    before, after = flat(start), flat(tmp_path / "run" / "model")
    kernel = after["llm/moe/router/fc1/kernel"]
    np.testing.assert_array_equal(kernel[0], weights["fc1.weight"].numpy().T)
    moved = not np.array_equal(before["projector/fc0/kernel"], after["projector/fc0/kernel"])
    assert moved == (trainable == "official")
    jax.clear_caches()
