"""`launch/slurm.sh` under a real SLURM: a controller and two nodes on this machine.

Needs Debian's packages slurmctld, slurmd, slurm-client and munge (`apt-get install
--no-install-recommends`). Their daemons are started here, with settings of their own, by any user.
"""

from __future__ import annotations

import getpass
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_runs

from medmoe_jax.config import MoeConfig

ROOT = Path(__file__).resolve().parents[1]
SBIN = f"{os.environ['PATH']}:/usr/sbin:/sbin"  # where Debian puts daemons
HOST = socket.gethostname().split(".")[0]
NODES = ("127.0.0.1", "127.0.0.2")  # names that JAX can look up; SLURM takes localhost for the host

pytestmark = pytest.mark.slow

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
MailProg=/bin/true
ReturnToService=2
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus}
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus}
PartitionName=all Nodes=ALL Default=YES
"""


def free_ports(n: int) -> list[int]:
    """TCP ports that nobody uses."""
    probes = [socket.socket() for _ in range(n)]
    for probe in probes:
        probe.bind(("localhost", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def until(what: str, seconds: float, asked: object) -> None:
    """Waits until asked() is true."""
    end = time.monotonic() + seconds
    while not asked():  # type: ignore[operator]
        assert time.monotonic() < end, f"waited {seconds} s: {what}"
        time.sleep(0.5)


class Cluster:
    """A controller and two nodes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": SBIN}
        self.daemons: list[subprocess.Popen[bytes]] = []
        (folder / "state").mkdir()
        (folder / "slurm.conf").write_text(
            CONFIG.format(
                folder=folder,
                host=HOST,
                user=getpass.getuser(),
                nodes=NODES,
                ports=free_ports(3),
                cpus=os.cpu_count(),
            )
        )
        said = subprocess.run(["slurmd", "-V"], env=self.env, capture_output=True, text=True)
        year, month = map(int, re.findall(r"\d+", said.stdout)[:2])
        # Jobs are followed without cgroups, which older releases cannot switch off by name.
        without = "CgroupPlugin=disabled" if (year, month) >= (23, 11) else (
            "CgroupPlugin=cgroup/v1\nCgroupAutomount=no"
        )  # fmt: skip
        (folder / "cgroup.conf").write_text(without + "\n")
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o400)

    def start(self) -> None:
        names = {
            "key-file": "key", "socket": "socket", "pid-file": "pid",
            "seed-file": "seed", "log-file": "log",
        }  # fmt: skip
        munge = [f"--{option}={self.folder}/munge.{end}" for option, end in names.items()]
        self.daemon("munged", "--foreground", "--force", *munge)
        until("munge", 30, (self.folder / "munge.socket").exists)
        self.daemon("slurmctld", "-D", "-c")
        for node in NODES:
            self.daemon("slurmd", "-D", "-N", node)
        until("the nodes", 60, lambda: self.failed() or self.nodes() == ["idle", "idle"])
        logs = [log.read_text()[-2000:] for log in self.folder.glob("slurm*.log")]
        assert not self.failed(), "\n".join(logs)

    def failed(self) -> bool:
        """Whether a daemon has ended."""
        return any(daemon.poll() is not None for daemon in self.daemons)

    def nodes(self) -> list[str]:
        """Their states."""
        return self.run("sinfo", "-hN", "-o%T").split()

    def daemon(self, *command: str) -> None:
        with (self.folder / f"{command[0]}{len(self.daemons)}.log").open("wb") as log:
            self.daemons.append(
                subprocess.Popen(command, env=self.env, cwd=self.folder, stdout=log, stderr=log)
            )

    def run(self, *command: str) -> str:
        """What a command of SLURM prints; "" where it fails."""
        done = subprocess.run(command, env=self.env, cwd=ROOT, capture_output=True, text=True)
        return done.stdout

    def state(self, job: str) -> str:
        return (re.findall(r"JobState=(\w+)", self.run("scontrol", "show", "job", job)) or [""])[0]

    def stop(self) -> None:
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            daemon.wait(timeout=60)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    missing = [
        name
        for name in ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
        if shutil.which(name, path=SBIN) is None
    ]
    if missing:
        pytest.skip(f"SLURM is not installed: {', '.join(missing)} not found")
    # The path of a socket may have 107 bytes at most: not pytest's folder.
    folder = Path(tempfile.mkdtemp(prefix="slurm"))
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder)


def submit(cluster: Cluster, folder: Path, steps: int) -> tuple[str, Path]:
    """A job of two processes, one a node; its number and its log."""
    log = folder / "job.log"
    train = [
        *("--config", "configs/stage3.py:tiny", f"--workdir={folder / 'run'}"),
        *(f"--config.init={folder / 'start'}", "--config.log.tensorboard=False"),
        *(f"--config.data.files=('{folder / 'questions.json'}',)", "--config.log.every=1"),
        *(f"--config.data.image_folder={folder / 'images'}", "--config.data.buckets=(128,)"),
        *("--config.optim.batch_size=4", f"--config.optim.steps={steps}"),
    ]
    variables = {
        "MEDMOE_ENV": str(Path(sys.executable).parents[1]),
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    export = "--export=ALL," + ",".join(f"{key}={value}" for key, value in variables.items())
    options = [export, f"--output={log}", "--nodes=2", "--gpus-per-node=0"]
    said = cluster.run("sbatch", "--parsable", *options, "launch/slurm.sh", *train)
    assert re.fullmatch(r"\d+\n", said), said
    return said.strip(), log


def losses(folder: Path) -> list[float]:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """start/, questions.json, images/."""
    tiny_runs.save_start(tmp_path / "start", moe=MoeConfig())
    tiny_runs.save_questions(tmp_path)
    return tmp_path


def test_two_steps_on_two_nodes(cluster: Cluster, folder: Path) -> None:
    job, log = submit(cluster, folder, steps=2)
    until("the job", 300, lambda: cluster.state(job) in ("COMPLETED", "FAILED"))
    said = log.read_text()
    assert cluster.state(job) == "COMPLETED", said
    assert said.count("model written to") == 1  # process 0 alone speaks
    found = losses(folder)
    assert len(found) == 2 and all(math.isfinite(loss) for loss in found)
    assert (folder / "run" / "model" / "config.json").exists()


def test_a_job_that_gets_sigterm_goes_on(cluster: Cluster, folder: Path) -> None:
    """The processes save, the job goes back into the queue, and comes to its end."""
    job, log = submit(cluster, folder, steps=60)
    metrics = folder / "run" / "metrics.jsonl"
    until("ten steps", 300, lambda: metrics.exists() and metrics.read_text().count("\n") > 10)
    cluster.run("scancel", "--signal=TERM", job)
    until("the queue", 120, lambda: log.exists() and "goes back into the queue" in log.read_text())
    assert not (folder / "run" / "model").exists()
    until("the release", 30, lambda: cluster.state(job) == "PENDING")
    cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now")  # not in two minutes
    until("the job", 300, lambda: cluster.state(job) in ("COMPLETED", "FAILED"))
    said = log.read_text()
    assert cluster.state(job) == "COMPLETED", said
    assert "SIGTERM: stopped behind step" in said and "resumed at step" in said
    assert len(losses(folder)) == 60
