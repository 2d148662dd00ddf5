#!/usr/bin/env python3
"""Several processes on this machine, as one run, restarted when they are lost.

    python launch/local.py --processes 2 -- --config configs/stage3.py:phi2 --workdir RUN ...

Everything behind `--` goes to `python -m medmoe_jax.train` as it is. Needs nothing but Python and
the package. `--devices` is what each process gets: GPUs with `--gpus` (the first process the first
of them), else so many virtual CPU devices. `--restarts` says how often a run whose processes were
lost is started again; it goes on from its last checkpoint. A run that ends with a message about its
settings or its data is not started again. SIGTERM and Ctrl-C are passed on: every process saves and
ends, and the launcher ends with their status. `--dry-run` prints the commands.

One process with all devices is what a single machine needs; several are for trying out what happens
on several machines, and for hosts where each GPU wants a process of its own.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import NoReturn

SAVED = 75  # how training ends after SIGTERM: saved, to be started again
LOST = 69  # and where another of its processes is gone
USAGE = 2
GRACE = 300  # seconds to save in after a signal


def free_port() -> int:
    """A TCP port that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def commands(
    arguments: list[str], processes: int, devices: int, gpus: bool, port: int
) -> list[tuple[dict[str, str], list[str]]]:
    """(variables, command) of each process."""
    found = []
    for number in range(processes):
        variables = {}
        if devices and gpus:
            mine = range(number * devices, (number + 1) * devices)
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, mine))
        elif devices:
            count = f"--xla_force_host_platform_device_count={devices}"
            variables["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {count}".strip()
        command = [sys.executable, "-m", "medmoe_jax.train", *arguments]
        if processes > 1:
            command += [
                f"--config.cluster.coordinator=localhost:{port}",
                f"--config.cluster.processes={processes}",
                f"--config.cluster.process={number}",
            ]
        found.append((variables, command))
    return found


class Launcher:
    """One run: its processes, their output, and the signals that end it."""

    def __init__(self) -> None:
        self.asked_to_stop = False
        self.parts: list[subprocess.Popen[str]] = []
        self.first: list[int] = []  # statuses of those that failed before they were told to end
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, self._stop)

    def _stop(self, *_: object) -> None:
        self.asked_to_stop = True
        self._signal(signal.SIGTERM)

    def _signal(self, which: signal.Signals) -> None:
        for part in self.parts:
            if part.poll() is None:
                part.send_signal(which)

    def once(self, todo: list[tuple[dict[str, str], list[str]]]) -> list[int]:
        """Starts all processes and waits for them. When one fails the others get SIGTERM, and
        SIGKILL where they do not end. Returns their exit statuses; -9 is SIGKILL."""
        self.parts, readers = [], []
        for number, (variables, command) in enumerate(todo):
            part = subprocess.Popen(
                command,
                env=os.environ | variables,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,  # Ctrl-C comes from here, once
            )
            self.parts.append(part)
            readers.append(threading.Thread(target=show, args=(part, number, len(todo) > 1)))
            readers[-1].start()
        end = None
        while any(part.poll() is None for part in self.parts):
            if end is None:
                self.first = [part.returncode for part in self.parts if part.poll()]
            if end is None and (self.first or self.asked_to_stop):
                end = time.monotonic() + GRACE
                self._signal(signal.SIGTERM)
            if end is not None and time.monotonic() > end:
                self._signal(signal.SIGKILL)
            time.sleep(0.1)
        for reader in readers:
            reader.join()
        statuses = [part.returncode for part in self.parts]
        if end is None:
            self.first = [status for status in statuses if status]
        return statuses


def show(part: subprocess.Popen[str], number: int, several: bool) -> None:
    """Copies what a process prints, its number in front where there are several."""
    assert part.stdout is not None
    for line in part.stdout:
        print(f"[{number}] {line}" if several else line, end="", flush=True)


def fail(message: str) -> NoReturn:
    """Ends with a message about the command line."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(USAGE)


def main() -> int:
    """Returns the exit status of the run."""
    parser = argparse.ArgumentParser(
        description="Several training processes on this machine.",
        usage="python launch/local.py [--processes N] [--devices N] [--restarts N] [--dry-run] "
        "-- ARGUMENTS OF medmoe_jax.train",
    )
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--devices", type=int, default=0, help="of a process; 0 = as they come")
    parser.add_argument("--gpus", action="store_true", help="the devices are GPUs")
    parser.add_argument("--restarts", type=int, default=3, help="after lost processes")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and end")
    if "--" not in sys.argv:
        fail("put the arguments of medmoe_jax.train behind --")
    cut = sys.argv.index("--")
    options, arguments = parser.parse_args(sys.argv[1:cut]), sys.argv[cut + 1 :]
    if options.processes < 1 or options.devices < 0 or options.restarts < 0:
        fail("--processes must be 1 or more, --devices and --restarts 0 or more")
    if options.gpus and not options.devices:
        fail("--gpus needs --devices: how many of them each process gets")

    launcher = None if options.dry_run else Launcher()
    for attempt in range(options.restarts + 1):
        todo = commands(arguments, options.processes, options.devices, options.gpus, free_port())
        if launcher is None:
            for variables, command in todo:
                words = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
                print(" ".join([*words, shlex.join(command)]))
            return 0
        statuses = launcher.once(todo)
        if not any(statuses):
            return 0
        lost = all(status < 0 or status in (SAVED, LOST) for status in launcher.first)
        if launcher.asked_to_stop or not lost:
            break
        left = options.restarts - attempt
        print(f"a process was lost (statuses {statuses}); {left} restarts left", flush=True)
    return next(s if s > 0 else 128 - s for s in sorted(statuses, reverse=True) if s)


if __name__ == "__main__":
    sys.exit(main())
