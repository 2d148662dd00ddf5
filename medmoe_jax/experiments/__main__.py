"""The paper's experiments: `python -m medmoe_jax.experiments NAME... --config
configs/experiments.py:tiny --seeds 3 --workdir DIR`.

NAME is a table or figure, a control, or `all`; `report` puts everything run so far into one page.
Results are in DIR/results, the work in DIR/cells: what is finished is not done again, so a killed
run goes on with the same command. Exit status: 0, 1 if an experiment failed, or 75 if it was asked
to end (SIGTERM).
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

from absl import flags, logging
from ml_collections import config_flags

from medmoe_jax import checkpoint, command_line, compilation, distributed
from medmoe_jax.config import ConfigError
from medmoe_jax.convert.report import ConversionError
from medmoe_jax.data import problems
from medmoe_jax.experiments import report
from medmoe_jax.experiments.catalogue import EXPERIMENTS
from medmoe_jax.experiments.cells import Cell, Store, every
from medmoe_jax.experiments.config import StudyConfig, check
from medmoe_jax.experiments.study import Study
from medmoe_jax.metrics import MissingExtra
from medmoe_jax.report import NotFinite

PAUSE = 0.5  # seconds between two looks for work that another process has not taken
FAULTS = (
    *(ConfigError, checkpoint.CheckpointError, ConversionError, problems.DataError),
    *(NotFinite, MissingExtra, FileNotFoundError),
)


def chosen(words: list[str]) -> list[str]:
    """Names of experiments in the order of the catalogue.

    Raises:
      ConfigError: none, or an unknown one.
    """
    unknown = [word for word in words if word not in (*EXPERIMENTS, "all")]
    if unknown or not words:
        what = f"unknown: {', '.join(unknown)}" if unknown else "nothing to do"
        raise ConfigError(f"{what}; use all, report or some of {', '.join(EXPERIMENTS)}")
    return [name for name in EXPERIMENTS if name in words or "all" in words]


def in_turn(study: Study, names: list[str], worker: int) -> list[Cell]:
    """The cells of the experiments and all they need, parents first, seed by seed; every second
    worker begins with the last seed."""
    seeds = study.seeds if worker % 2 == 0 else tuple(reversed(study.seeds))
    parts = [study.of_seed(seed) for seed in seeds]
    return every([c for part in parts for name in names for c in EXPERIMENTS[name].cells(part)])


def work(cells: list[Cell], store: Store, worker: int) -> dict[str, str]:
    """Makes the missing cells, those that other workers are at excepted, until all are there.

    Returns cell -> what went wrong.
    """
    pending = [cell for cell in cells if not store.done(cell)]
    print(f"{len(cells)} cells, {len(pending)} of them to do", flush=True)
    wrong: dict[str, str] = {}
    failed: set[str] = set()  # digests
    parent = os.getppid()
    while pending:
        rest = []
        for cell in pending:
            if worker and os.getppid() != parent:
                sys.exit("the process that started this worker has ended")
            broken = [parent.name for parent in cell.parents if parent.digest in failed]
            try:
                if broken:
                    raise ConfigError(f"it needs {', '.join(broken)}, which failed")
                ready = all(store.done(parent) for parent in cell.parents)
                if not ready or not store.attempt(cell, wait=False):
                    rest.append(cell)
            except FAULTS as error:
                wrong[cell.name] = str(error)
                failed.add(cell.digest)
                print(f"error in {cell.name}: {error}", file=sys.stderr, flush=True)
        if len(rest) == len(pending):
            time.sleep(PAUSE)  # the others are at it
        pending = rest
    return wrong


def share_cores(worker: int, workers: int) -> None:
    """Gives this process its part of the cores, where the system lets one choose."""
    if workers > 1 and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        mine = cores[worker % len(cores) :: workers] or cores
        os.sched_setaffinity(0, mine)


def helpers(workers: int) -> list[subprocess.Popen[bytes]]:
    """Starts the other workers of this command; worker 0 is this process."""
    command = [sys.executable, "-m", "medmoe_jax.experiments", *sys.argv[1:]]
    return [subprocess.Popen([*command, f"--worker={i}"]) for i in range(1, workers)]


def run(study: Study, names: list[str], workdir: Path, jobs: int, worker: int) -> int:
    """Makes the cells and writes the results. Returns the exit status."""
    started, store = time.perf_counter(), Store(workdir)
    others = helpers(jobs) if worker == 0 else []
    share_cores(worker, jobs)
    wrong = work(in_turn(study, names, worker), store, worker)
    for other in others:
        other.wait()
    if worker:
        return int(bool(wrong))
    folder = workdir / report.FOLDER
    folder.mkdir(exist_ok=True)
    cfg = study.cfg
    setting = {
        "seeds": len(study.seeds),
        "phantoms": study.phantoms,
        "models": [describe(cfg, llm) for llm in ("phi", "stablelm")],
        "command": " ".join(["python -m medmoe_jax.experiments", *sys.argv[1:]]),
        "config": dataclasses.asdict(cfg),
    }
    for name in names:
        try:
            incomplete = [c.name for c in EXPERIMENTS[name].cells(study) if not store.done(c)]
            if incomplete:
                raise ConfigError(f"cells failed: {', '.join(incomplete)}")
            result = EXPERIMENTS[name].result(name, study, store, folder)
            report.save(result, folder, setting)
            print(f"{folder / name}.md", flush=True)
        except FAULTS as error:
            wrong[name] = str(error)
            print(f"error: {name}: {error}", file=sys.stderr, flush=True)
    print(f"{time.perf_counter() - started:.0f} s in all")
    return int(bool(wrong))


def describe(cfg: StudyConfig, llm: str) -> str:
    """A language model in a word or two."""
    shape = cfg.phases(llm).stage3.model.llm
    return f"{shape.family} ({shape.layers} layers, width {shape.width})"


def main(argv: list[str]) -> int:
    """Command line."""
    logging.set_verbosity(logging.WARNING)
    given, workdir = flags.FLAGS, Path(flags.FLAGS.workdir)
    try:
        if argv[1:] == ["report"]:
            print(report.write_page(workdir, list(EXPERIMENTS)))
            return 0
        names = chosen(argv[1:])
        if given.seeds < 1:
            raise ConfigError(f"--seeds is {given.seeds}; use 1 or more")
        cfg = given.config
        check(cfg)
        workdir.mkdir(parents=True, exist_ok=True)
        if not cfg.compilation_cache:
            cfg.compilation_cache = str(workdir / "compiled")
        compilation.keep(cfg.compilation_cache)
        status = run(Study(cfg, given.seeds), names, workdir, given.jobs, given.worker)
        if not given.worker and any((workdir / report.FOLDER).glob("*.json")):
            print(report.write_page(workdir, list(EXPERIMENTS)))
        return status
    except distributed.Preempted as reason:
        print(reason)
        return distributed.PREEMPTED
    except FAULTS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    config_flags.DEFINE_config_file(
        "config",
        default="configs/experiments.py:tiny",
        help_string="A study, as in configs/experiments.py:tiny",
    )
    flags.DEFINE_integer("seeds", 3, "How many")
    flags.DEFINE_string("workdir", "runs/experiments", "The run directory")
    flags.DEFINE_integer("jobs", 1, "Processes that work side by side, each on its share of cores")
    flags.DEFINE_integer("worker", 0, "Number of this one among them; set by the program")
    flags.FLAGS.set_gnu_getopt(True)
    command_line.run(main, StudyConfig)
