"""Several processes as one program, by JAX's own runtime: `jax.distributed`.

Every process runs the same command and reads the same files; the workdir is on a disk that all of
them see. Process 0 speaks and writes; checkpoints are written by all, each its own shards.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import jax

from medmoe_jax.config import ClusterConfig, ConfigError


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


def stop(message: str) -> NoReturn:
    """Ends this process with a message and status 1.

    One of several ends at once, without the farewell at which JAX would wait for processes that
    may be gone; the others then notice that this one is.
    """
    if jax.process_count() == 1:
        sys.exit(message)
    print(f"{message} (process {jax.process_index()})", file=sys.stderr, flush=True)
    os._exit(1)
