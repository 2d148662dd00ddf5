"""Two sides timed in turn, and the table of what was found."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

PAUSE = 0.1  # seconds between two timings, in which the other side's threads fall asleep
QUIET = 0.05  # share of the CPU that other processes may take in a round


@dataclass
class Figure:
    """Seconds of both sides, run by run, for `amount` units of work."""

    name: str
    unit: str
    amount: float
    jax: list[float]
    torch: list[float]
    others: float  # most that other processes took of the CPU in a round, a share
    goal: float | None

    @property
    def ratio(self) -> float:
        """How many times faster than PyTorch, from the medians."""
        return statistics.median(self.torch) / statistics.median(self.jax)

    @property
    def spread(self) -> tuple[float, float]:
        """First and third quartile of the ratios of neighbouring runs."""
        pairs = [t / j for j, t in zip(self.jax, self.torch, strict=True)]
        first, _, third = statistics.quantiles(pairs, n=4, method="inclusive")
        return first, third

    def cells(self) -> list[str]:
        """A row of the table."""
        ours, theirs = (statistics.median(s) for s in (self.jax, self.torch))
        if self.unit != "ms":
            ours, theirs = self.amount / ours, self.amount / theirs
        else:
            ours, theirs = 1e3 * ours, 1e3 * theirs
        low, high = self.spread
        goal = "-" if self.goal is None else f"{self.goal:.1f}x"
        ratio, quartiles = f"{self.ratio:.2f}x", f"{low:.2f}-{high:.2f}"
        shown = [f"{ours:.1f}", f"{theirs:.1f}", ratio, quartiles, goal, f"{self.others:.0%}"]
        return [self.name, self.unit, *shown]


def alternate(
    ours: Callable[[], float], theirs: Callable[[], float], repeats: int, patience: float
) -> tuple[list[float], list[float], float]:
    """Times both in turn, the first changing from round to round.

    A round in which other processes took part of the CPU says little, since PyTorch's threads wait
    for one another after every operation. So quiet moments are waited for, more rounds are run in
    place of those that were disturbed, and the quietest are kept.

    Args:
      ours, theirs: run once and return the seconds that count; they have run before.
      repeats: rounds to keep.
      patience: seconds after which nothing is waited for or repeated any more.

    Returns:
      Seconds of both, in the order of the rounds, and the others' share in the worst round kept.
    """
    rounds: list[tuple[float, float, float]] = []
    end = time.monotonic() + patience
    while len(rounds) < repeats or (
        time.monotonic() < end and sum(share < QUIET for share, _, _ in rounds) < repeats
    ):
        taken, share = [0.0, 0.0], 0.0
        for side in (0, 1) if len(rounds) % 2 else (1, 0):
            watch = Watch()
            time.sleep(PAUSE)
            while watch.share() > QUIET and time.monotonic() < end:
                watch = Watch()
                time.sleep(PAUSE)
            watch = Watch()
            taken[side] = (ours, theirs)[side]()
            share = max(share, watch.share())
        rounds.append((share, *taken))
    kept = sorted(range(len(rounds)), key=lambda i: rounds[i][0])[:repeats]
    shares, first, second = zip(*(rounds[i] for i in sorted(kept)), strict=True)
    return list(first), list(second), max(shares)


def chosen_clock(one_thread: bool) -> Callable[[], float]:
    """Wall time; or CPU time of this process, which is put on one core for that. To be called
    before JAX counts the cores."""
    if not one_thread:
        return time.perf_counter
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    return time.process_time


class Watch:
    """Share of the CPU that other processes take from now on (Linux)."""

    def __init__(self) -> None:
        self.start, self.before = time.perf_counter(), self._others()

    def share(self) -> float:
        """0..1 of all cores."""
        seconds = (time.perf_counter() - self.start) * (os.cpu_count() or 1)
        return max(0.0, (self._others() - self.before) / seconds)

    @staticmethod
    def _others() -> float:
        """CPU seconds of other processes since the machine started."""
        with Path("/proc/stat").open() as file:
            user, nice, system, _, _, *interrupts = map(int, file.readline().split()[1:9])
        busy = (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")
        return busy - time.process_time()


PACKAGES = ("medmoe_jax", "jax", "torch", "transformers", "numpy")


def conditions(threads: int, packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """Machine, versions of `packages` and command; `threads` of a side."""
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "command": " ".join(["python", *sys.argv]),
        "cpu": f"{cpu}, {os.cpu_count()} cores",
        "load": [round(x, 2) for x in os.getloadavg()],
        "threads": threads,
        "dtype": "float32",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
    }


def _version(package: str) -> str:
    """Also of this one where it is not installed but run from the repository."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return import_module(package).__version__


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def markdown(figures: list[Figure], where: dict[str, Any]) -> str:
    """The table, and under it what it holds for."""
    head = ["", "unit", "JAX", "PyTorch", "faster", "quartiles", "goal", "others"]
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    how = f"{where['seconds']} time, {where['threads']} threads, load {where['load'][0]}"
    about = (
        f"`{where['command']}`; {where['cpu']}; {how} at the start; {where['dtype']}; {versions}. "
        "Medians of the runs; quartiles of the ratios of neighbouring runs; others: most of the "
        "CPU that other processes took in a run that counts."
    )
    return f"{table(head, [figure.cells() for figure in figures])}\n{about}\n"
