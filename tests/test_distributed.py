"""Several processes, for real: their losses, the loss of one of them, and going on with others."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import shares_read
import tiny_runs
from flax.traverse_util import flatten_dict

from medmoe_jax import distributed, stored
from medmoe_jax.checkpoint import load_model, save_model
from medmoe_jax.config import ClusterConfig, ConfigError, MoeConfig

ROOT = Path(__file__).resolve().parents[1]
STEPS = 30


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "4"}, False),  # the batch script itself
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"}, True),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "t-0,t-1"}, True),
        ({"MEGASCALE_NUM_SLICES": "2"}, True),
    ],
)
def test_clusters_are_found(environment: dict[str, str], found: bool) -> None:
    assert distributed.several(environment) == found


SLURM = {"SLURM_STEP_TASKS_PER_NODE": "8(x2),4", "SLURM_NODEID": "0", "SLURM_LOCALID": "0"}
EIGHT = {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, None),
        (EIGHT, None),  # no scheduler: all of them, as JAX does
        (SLURM, None),  # no GPU
        (SLURM | EIGHT, [0]),
        (SLURM | EIGHT | {"SLURM_LOCALID": "7"}, [7]),
        (SLURM | EIGHT | {"SLURM_NODEID": "2", "SLURM_LOCALID": "3"}, [6, 7]),
        (SLURM | {"SLURM_LOCALID": "5", "CUDA_VISIBLE_DEVICES": "0"}, [0]),  # its own alone
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x4)"} | EIGHT, list(range(8))),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_GPUS_ON_NODE": "4"}, [0, 1, 2, 3]),
        (
            {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1", **EIGHT},
            [4, 5, 6, 7],
        ),
    ],
)
def test_gpus_of_a_process(environment: dict[str, str], found: list[int] | None) -> None:
    assert distributed.local_devices(environment) == found


def test_gpus_that_cannot_be_shared() -> None:
    with pytest.raises(ConfigError, match="8 processes of this node cannot share its 3 GPUs"):
        distributed.local_devices(SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2"})


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (ClusterConfig(join="maybe"), "'auto', 'yes' or 'no'"),
        (ClusterConfig(coordinator="a:1", processes=2, process=2), "its own number from 0"),
        (ClusterConfig(coordinator="a:1", processes=2, join="no"), "cluster.join is 'no'"),
        (ClusterConfig(processes=2), "cluster.coordinator=HOST:PORT"),
    ],
)
def test_settings_that_cannot_be(cfg: ClusterConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        distributed.join(cfg)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


class Run:
    """One run of a phase in several processes, from `folder`/start if it is not told otherwise."""

    def __init__(
        self,
        folder: Path,
        workdir: Path,
        processes: int,
        devices: int,
        *more: str,
        phase: str = "stage3",
        start: str = "start",
    ):
        port = free_port()
        flags = f"--xla_force_host_platform_device_count={devices}"
        env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        env["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # compiles in half the time
        questions = folder / "questions.json"
        command = [
            *(sys.executable, "-m", "medmoe_jax.train"),
            f"--config={ROOT / f'configs/{phase}.py'}:tiny",
            *(f"--workdir={workdir}", f"--config.init={folder / start}"),
            *(f"--config.data.files=('{questions}',)", "--config.data.buckets=(128,)"),
            *(f"--config.data.image_folder={folder / 'images'}", "--config.log.every=1"),
            *("--config.remat=none", "--config.log.save_every=5", "--config.optim.batch_size=4"),
            *(f"--config.optim.steps={STEPS}", "--config.log.tensorboard=False", *more),
        ]
        if processes > 1:
            command += [f"--config.cluster.coordinator=localhost:{port}"]
            command += [f"--config.cluster.processes={processes}", "--config.cluster.heartbeat=10"]
        self.parts = [
            subprocess.Popen(
                command + [f"--config.cluster.process={i}"] * (processes > 1),
                env=env,
                cwd=ROOT,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            for i in range(processes)
        ]

    def finish(self) -> list[str]:
        """What each process printed; all must have ended well."""
        said = [part.communicate(timeout=300)[0] for part in self.parts]
        assert [part.returncode for part in self.parts] == [0] * len(said), said
        return said


def losses(workdir: Path) -> list[float]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def flat(workdir: Path) -> dict[str, np.ndarray]:
    return flatten_dict(load_model(workdir / "model")[0], sep="/")


def assert_same_run(one: Path, other: Path, steps: int = STEPS) -> None:
    assert len(losses(one)) == steps
    np.testing.assert_allclose(losses(other), losses(one), rtol=1e-4)
    first, second = flat(one), flat(other)
    assert first.keys() == second.keys()
    for path, value in first.items():
        np.testing.assert_allclose(second[path], value, atol=1e-4, err_msg=path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """start/, questions.json, and `alone`: the run of one process with one device."""
    folder = tmp_path_factory.mktemp("distributed")
    tiny_runs.save_start(folder / "start", moe=MoeConfig())
    tiny_runs.save_questions(folder)
    Run(folder, folder / "alone", 1, 1).finish()
    return folder


def test_two_processes_with_two_devices_each(folder: Path) -> None:
    """The losses and the model of one process; process 0 alone speaks."""
    mesh = ("--config.mesh.fsdp=2", "--config.mesh.expert=2")
    first, second = Run(folder, folder / "two", 2, 2, *mesh).finish()
    assert "model written to" in first and "model written to" not in second
    assert "stage3:" in first and "stage3:" not in second
    assert_same_run(folder / "alone", folder / "two")


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["stage1", "stage2", "router"])
def test_other_phases(folder: Path, phase: str) -> None:
    """Losses and model of one process, and what the router is judged at."""
    if not (folder / "dense").exists():
        tiny_runs.save_start(folder / "dense")
    flags = ["--config.optim.steps=5", "--config.data.labels_per_modality=2"]
    mesh = ["--config.mesh.data=1", "--config.mesh.fsdp=2", "--config.mesh.expert=2"]
    one, two = folder / f"{phase}1", folder / f"{phase}2"
    Run(folder, one, 1, 1, *flags, phase=phase, start="dense").finish()
    first, second = Run(folder, two, 2, 2, *flags, *mesh, phase=phase, start="dense").finish()
    assert_same_run(one, two, steps=5)
    if phase == "router":
        have, want = (json.loads((run / "router.json").read_text()) for run in (two, one))
        assert have == want and want["n"] == 16 - 4 * 2
        assert "router accuracy" in first and "router accuracy" not in second


@pytest.mark.slow
def test_each_process_reads_its_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model on disk, and what all need: biases, norms and the patch embedding."""
    start = tiny_runs.save_start(tmp_path / "start", moe=MoeConfig())
    params, meta = load_model(start)
    monkeypatch.setattr(stored, "CHUNK_BYTES", 64)
    save_model(start, params, meta)
    command = [sys.executable, shares_read.__file__, str(start), f"localhost:{free_port()}", "2"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    parts = [
        subprocess.Popen([*command, str(i)], env=env, text=True, stdout=subprocess.PIPE)
        for i in range(2)
    ]
    # The last line: collectives write of their connections too.
    said = [json.loads(part.communicate(timeout=200)[0].splitlines()[-1]) for part in parts]
    for what in ("training", "generation"):
        shares = [row[what] / row["bytes"] for row in said]
        assert sum(shares) > 1 and max(shares) < 0.65, (what, shares)


@pytest.mark.slow
def test_two_processes_evaluate_and_skip(folder: Path) -> None:
    """The figures of one process; a row that cannot be used is named once, whoever found it."""
    data = folder / "broken"
    questions = tiny_runs.save_questions(data)
    (data / "images" / "i5.png").write_bytes(b"no image")
    (data / "start").symlink_to(folder / "start")
    flags = (
        *("--config.data.on_error=skip", f"--config.evaluation.every={STEPS}"),
        *(f"--config.evaluation.file={questions}", "--config.evaluation.rows=4"),
        "--config.evaluation.max_new_tokens=3",
    )
    found = {}
    for processes in (1, 2):
        workdir = folder / f"evaluated{processes}"
        Run(data, workdir, processes, 1, *flags).finish()
        lines = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
        figures = [line for line in lines if any(key.startswith("val/") for key in line)]
        skipped = (workdir / "skipped.jsonl").read_text().splitlines()
        assert [json.loads(line)["row"] for line in skipped] == [5]
        found[processes] = figures
    assert len(found[1]) == 1 and found[1] == found[2]


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [(1, 2), (2, 4), (4, 2)])
def test_preempted(folder: Path, first: int, second: int) -> None:
    """SIGTERM to the last process: all save the same step and end with status 75, and others go
    on."""
    workdir = folder / f"preempted{first}"
    run = Run(folder, workdir, first, 1)
    metrics, deadline = workdir / "metrics.jsonl", time.monotonic() + 200
    while not (metrics.exists() and metrics.read_text().count("\n") > 6):
        assert run.parts[0].poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    run.parts[-1].send_signal(signal.SIGTERM)
    said = [part.communicate(timeout=120)[0] for part in run.parts]
    assert [part.returncode for part in run.parts] == [distributed.PREEMPTED] * first, said
    assert "which is saved" in said[0]
    assert not (workdir / "model").exists()
    again, *_ = Run(folder, workdir, second, 1).finish()
    assert "resumed at step" in again
    assert_same_run(folder / "alone", workdir)


def test_processes_that_differ_do_not_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would train its part with settings, or on data, of its own."""
    distributed.check_alike("settings", {"lr": 0.5})
    others = [{"seed": 0, "lr": 0.5}, {"seed": 1, "lr": 0.5}]
    monkeypatch.setattr(distributed, "gathered", lambda mine: [mine, *others])
    with pytest.raises(ConfigError, match=r"the same settings \(different: seed\)"):
        distributed.check_alike("settings", {"seed": 0, "lr": 0.5})
    with pytest.raises(ConfigError, match=r"the same data \(different: seed, lr\)"):
        distributed.check_alike("data", {"seed": 0, "lr": 1.0})


def test_sigterm_is_a_question() -> None:
    """In one process; afterwards the signal means what it meant before."""
    before = signal.getsignal(signal.SIGTERM)
    with distributed.preemption() as ends:
        assert not ends(1)
        signal.raise_signal(signal.SIGTERM)
        assert ends(2)
    assert signal.getsignal(signal.SIGTERM) == before
    assert distributed.gathered(["a", 1]) == [["a", 1]]


def test_sigterm_before_training_and_behind_it() -> None:
    """There is nothing to save, and the status is that of a run to be started again."""
    script = """
import signal
from medmoe_jax import distributed
distributed.end_when_asked()
with distributed.preemption() as ends:
    signal.raise_signal(signal.SIGTERM)
    print("saves", ends(1), flush=True)
signal.raise_signal(signal.SIGTERM)
print("never")
"""
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == distributed.PREEMPTED, done.stderr
    said = done.stdout.splitlines()
    assert said[0] == "saves True" and said[1].startswith("SIGTERM: ended;") and len(said) == 2


@pytest.mark.parametrize(
    ("processes", "devices"), [(1, 4), pytest.param(4, 1, marks=pytest.mark.slow)]
)
def test_one_process_is_lost_and_others_go_on(folder: Path, processes: int, devices: int) -> None:
    """SIGKILL of one of two: the other ends by itself and says why. One alone or four others, on
    another mesh, go on from the last checkpoint."""
    workdir = folder / f"lost{processes}"
    run = Run(folder, workdir, 2, 1)
    metrics, deadline = workdir / "metrics.jsonl", time.monotonic() + 200
    while not (metrics.exists() and metrics.read_text().count("\n") > 12):
        assert run.parts[0].poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    run.parts[1].send_signal(signal.SIGKILL)
    said = run.parts[0].communicate(timeout=120)[0]
    run.parts[1].communicate()
    assert run.parts[0].returncode == distributed.LOST
    assert "another process of this run" in said
    assert not (workdir / "model").exists()
    mesh = ("--config.mesh.data=1", "--config.mesh.fsdp=4")
    first, *_ = Run(folder, workdir, processes, devices, *mesh).finish()
    assert "resumed at step" in first
    assert_same_run(folder / "alone", workdir)
