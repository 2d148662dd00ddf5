"""Several processes as one program, by JAX's own runtime: `jax.distributed`.

Every process runs the same command and reads the same files; the workdir is on a disk that all of
them see. Process 0 speaks and writes; checkpoints are written by all, each its own shards. A
cluster that wants its machines back sends SIGTERM (`preemption`).
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from medmoe_jax.config import ClusterConfig, ConfigError

# Exit statuses of a run that should be started again, after sysexits.h.
PREEMPTED = 75  # it was asked to end, and is saved; EX_TEMPFAIL
LOST = 69  # another of its processes is gone; EX_UNAVAILABLE


class Preempted(RuntimeError):
    """The run was asked to end; its checkpoint is written."""


def several(environment: dict[str, str]) -> bool:
    """Whether a cluster started this process as one of several.

    Args:
      environment: variables, as in `os.environ`. Read are those of a SLURM step (`srun`, not the
        batch script around it), Open MPI, a TPU pod slice (GKE sets them, as do TPU VMs of today)
        and several slices.
    """
    counts = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES")
    workers = environment.get("TPU_WORKER_HOSTNAMES", "").split(",")
    return len(workers) > 1 or any(int(environment.get(name) or 1) > 1 for name in counts)


def local_devices(environment: dict[str, str]) -> list[int] | None:
    """GPUs of this process among those it may see, under SLURM or Open MPI; None: left to JAX.

    JAX itself takes one device a process there, the one with the number that the process has on
    its node. So one process a node would use one GPU of eight, and a process that the scheduler
    shows a single GPU would look for its fourth.

    Args:
      environment: variables. Read are the number of this process on its node and of all processes
        there, and the GPUs that they see (`CUDA_VISIBLE_DEVICES`, else `SLURM_GPUS_ON_NODE`).

    Raises:
      ConfigError: the GPUs cannot be shared out evenly.
    """
    if "SLURM_STEP_TASKS_PER_NODE" in environment:
        place = int(environment.get("SLURM_LOCALID") or 0)
        nodes: list[int] = []  # processes of each node; "8(x2),4" is 8, 8, 4
        for tasks, times in re.findall(
            r"(\d+)(?:\(x(\d+)\))?", environment["SLURM_STEP_TASKS_PER_NODE"]
        ):
            nodes += [int(tasks)] * int(times or 1)
        node = int(environment.get("SLURM_NODEID") or 0)
        processes = nodes[node] if node < len(nodes) else 1
    elif "OMPI_COMM_WORLD_LOCAL_SIZE" in environment:
        place = int(environment.get("OMPI_COMM_WORLD_LOCAL_RANK") or 0)
        processes = int(environment["OMPI_COMM_WORLD_LOCAL_SIZE"])
    else:
        return None
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        gpus = len([name for name in visible.split(",") if name.strip()])
    else:
        gpus = int(environment.get("SLURM_GPUS_ON_NODE") or 0)
    if gpus == 0:
        return None
    if gpus == 1:
        return [0]  # the scheduler gave each process its own
    if gpus % processes:
        raise ConfigError(
            f"{processes} processes of this node cannot share its {gpus} GPUs evenly; start one a "
            "node or one a GPU"
        )
    each = gpus // processes
    return list(range(place * each, (place + 1) * each))


def join(cfg: ClusterConfig) -> None:
    """Joins the other processes, if there are any; to be called before JAX is used.

    Raises:
      ConfigError: settings that contradict each other, or no cluster could be found or joined.
    """
    if cfg.join not in ("auto", "yes", "no"):
        raise ConfigError(f"cluster.join {cfg.join!r} is unknown; use 'auto', 'yes' or 'no'")
    if cfg.coordinator:
        if not 0 <= cfg.process < cfg.processes:
            raise ConfigError(
                f"cluster.process is {cfg.process} of cluster.processes {cfg.processes}; give "
                "every process its own number from 0, and all of them their count"
            )
        if cfg.join == "no":
            raise ConfigError("cluster.coordinator is set, but cluster.join is 'no'")
    elif cfg.processes or cfg.process:
        raise ConfigError("cluster.processes is set; give cluster.coordinator=HOST:PORT as well")
    elif cfg.join == "no" or (cfg.join == "auto" and not several(dict(os.environ))):
        return
    try:
        jax.distributed.initialize(
            coordinator_address=cfg.coordinator or None,
            num_processes=cfg.processes or None,
            process_id=cfg.process if cfg.coordinator else None,
            local_device_ids=local_devices(dict(os.environ)),
            heartbeat_timeout_seconds=cfg.heartbeat,
        )
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"the processes of this run could not be joined ({error}); set cluster.coordinator, "
            "cluster.processes and cluster.process, or cluster.join='no' to run alone"
        ) from error


def leads() -> bool:
    """Whether this process is the one that speaks and writes."""
    return jax.process_index() == 0


def gathered(value: Any) -> list[Any]:
    """What every process has, in their order. All of them must call this at the same place.

    Args:
      value: anything that JSON can hold.
    """
    if jax.process_count() == 1:
        return [value]
    own = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(own)))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(own)] = own
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[:n])) for row, n in zip(rows, sizes, strict=True)]


def check_alike(what: str, values: dict[str, Any]) -> None:
    """Makes sure that all processes have the same. Each compiles its own program: with another
    setting it would silently do something else with its part.

    Args:
      what: the name of it all, for the message.
      values: name -> anything that JSON can hold, with the same names in every process.

    Raises:
      ConfigError: some have other values; in all processes.
    """
    first, *others = gathered(values)
    different = [k for k in first if any(other[k] != first[k] for other in others)]
    if different:
        raise ConfigError(
            f"the processes of this run do not have the same {what} (different: "
            f"{', '.join(different)}); start all of them with one command and the same files"
        )


def end_when_asked() -> None:
    """From now on SIGTERM ends a run of one process with status PREEMPTED wherever it is but inside
    of `preemption`: while it reads weights and data, or writes its model, there is nothing to save.

    Of several processes JAX hears the signal; they end behind their first step.
    """
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        return
    told = b"SIGTERM: ended; the same command goes on from the last checkpoint, if there is one\n"

    def end(*_: Any) -> NoReturn:
        os.write(1, told)  # `print` may be what was interrupted
        os._exit(PREEMPTED)

    signal.signal(signal.SIGTERM, end)


@contextmanager
def preemption() -> Iterator[Callable[[int], bool]]:
    """Turns SIGTERM into a question to ask behind every step: is this the last one?

    Several processes all get the same answer to the same step, whichever of them got the signal;
    they must all ask, from the same step on.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
    elif threading.current_thread() is not threading.main_thread():
        yield lambda step: False  # Python handles signals in the main thread only
    else:
        told = threading.Event()
        before = signal.signal(signal.SIGTERM, lambda *_: told.set())
        try:
            yield lambda step: told.is_set()
        finally:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def stop(message: str, status: int = 1) -> NoReturn:
    """Ends this process with a message and an exit status.

    One of several ends at once, without the farewell at which JAX would wait for processes that
    may be gone; the others then notice that this one is.
    """
    if jax.process_count() == 1:
        print(message, file=sys.stderr, flush=True)
        sys.exit(status)
    print(f"{message} (process {jax.process_index()})", file=sys.stderr, flush=True)
    os._exit(status)
