"""One side of `accelerator.py` in a process of its own: only one may hold a GPU's memory at a time.

    python benchmarks/accelerator_side.py TASK.json

The process does one part: `check` leaves scores and losses to be compared, `generation` loads the
model and times prefill and decoding, `training` times the step of phase 3.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import generation
import jax
import jax.numpy as jnp
import numpy as np
import torch
import training
from flax.traverse_util import flatten_dict
from torch_peer import Peer

from medmoe_jax import checkpoint, layout, model, presets
from medmoe_jax.config import ModelConfig, MoeConfig, RunConfig

DTYPE = "bfloat16"
CHECKED_ROWS = 8  # prompts whose scores are compared
CHECKED_STEPS = 3  # of training, whose losses are compared, on two rows
WARM_UP = 2  # runs that do not count: compilation, choice of kernels
LOOK = 0.005  # seconds between two looks at the memory of the host


@dataclass(frozen=True)
class Task:
    """What a process is to do."""

    side: str  # jax | torch
    part: str  # check | generation | training
    device: str  # cpu | gpu
    size: str  # a preset
    checkpoint: str  # folder in the official layout, for PyTorch
    model: str  # the same weights as a model folder, for JAX
    result: str  # JSON file to write; scores go to a .npy beside it
    rows: int  # of a training step
    length: int  # tokens of a row, those of an image included
    text: int  # text tokens of a prompt, beside those of an image
    new: int  # ids of an answer
    repeats: int  # timed runs
    remat: tuple[str, ...]  # what our step may recompute; the first that fits is taken
    compiled: str = ""  # mode of torch.compile; "" = not compiled
    batches: tuple[int, ...] = (1, 8)  # prompts at once

    @property
    def config(self) -> ModelConfig:
        """Top-1 experts and a meta expert in every second layer."""
        return presets.model(self.size, MoeConfig())

    @property
    def amount(self) -> generation.Size:
        """Prompts and answers."""
        cfg = self.config
        return generation.Size(cfg.llm, cfg.vision, self.new, 0, 0, self.text)

    @property
    def run(self) -> RunConfig:
        """Phase 3 with float32 master weights, everything else in 16 bits; the scores of all words
        exist at once, as on PyTorch's side."""
        run = training.run_config(self.config, self.remat[0], DTYPE)
        return replace(run, optim=replace(run.optim, batch_size=self.rows))


@dataclass
class Result:
    """What a process found."""

    seconds: dict[str, list[float]] = field(default_factory=dict)  # figure -> runs
    losses: list[float] = field(default_factory=list)  # of the first steps
    memory: dict[str, float] = field(default_factory=dict)  # bytes
    notes: dict[str, Any] = field(default_factory=dict)  # what was chosen; FLOPs of a step
    kind: str = ""  # of the device


class HostMemory(threading.Thread):
    """The most memory that no file backs (Linux), in bytes beyond what there is at the start.

    What is mapped from a file can be given back at any time, and is not counted.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._start = self._peak = self._held()
        self._ended = threading.Event()
        self.start()

    def run(self) -> None:
        """Looks until `end` is called."""
        while not self._ended.wait(LOOK):
            self._peak = max(self._peak, self._held())

    def end(self) -> float:
        """Bytes."""
        self._ended.set()
        self.join()
        return float(max(self._peak, self._held()) - self._start)

    @staticmethod
    def _held() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(x.split()[1]) for x in lines if x.startswith("RssAnon"))


class Jax:
    """`medmoe_jax` on the first device."""

    def __init__(self, task: Task):
        self._task, self._device = task, jax.devices()[0]
        if task.device != self._device.platform:
            raise SystemExit(
                f"error: JAX finds no {task.device}, its first device is {self._device}; on a GPU "
                "it needs its CUDA plugin: pip install 'medmoe_jax[cuda]'"
            )
        self.kind = self._device.device_kind

    clock = staticmethod(time.perf_counter)  # every timed run waits for its result

    def load(self) -> generation.Ours:
        """The model folder as `predict` loads it."""
        loaded = model.load(self._task.model, dtype=DTYPE)
        jax.block_until_ready(loaded.params)
        return generation.Ours(loaded, self._task.amount, self.clock)

    def scores(self, side: generation.Ours) -> np.ndarray:
        """f32[CHECKED_ROWS, V] behind the prompts."""
        return np.asarray(side.prefill(CHECKED_ROWS)[1].logits)

    def trainer(self, batch: dict[str, np.ndarray], notes: dict[str, Any]) -> Callable[[], Any]:
        """The step with the first kind of rematerialisation that fits."""
        run = self._task.run
        stored = flatten_dict(checkpoint.open_model(self._task.model)[0], sep="/")
        kinds = layout.dtypes(run, layout.labels(run, stored))
        flat = {k: jnp.asarray(np.asarray(v)).astype(kinds[k]) for k, v in stored.items()}
        ours = training.Ours(run, flat, batch, self.clock)
        del flat
        limit = (self._device.memory_stats() or {}).get("bytes_limit")
        notes |= {"flops": ours.flops, "remat": self._choose(ours, limit)}
        return ours.step

    def _choose(self, ours: training.Ours, limit: float | None) -> str:
        for remat in self._task.remat:
            try:
                needed = ours.compile(remat)
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                continue
            if limit is None or needed <= limit:
                return remat
        raise SystemExit("error: our step does not fit on this device; use fewer --rows")

    def peak(self) -> float | None:
        """Most bytes on the device; None where it does not count them."""
        return (self._device.memory_stats() or {}).get("peak_bytes_in_use")


class Torch:
    """The PyTorch peer on the same device."""

    def __init__(self, task: Task):
        self._task, self._cuda = task, task.device == "gpu"
        self._device = "cuda" if self._cuda else "cpu"
        self.kind = torch.cuda.get_device_name() if self._cuda else "cpu"

    def clock(self) -> float:
        """Seconds, when the device has done what it was given."""
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def _peer(self) -> Peer:
        task = self._task
        peer = Peer.read(task.config, Path(task.checkpoint), torch.bfloat16, self._device)
        if task.compiled:
            peer.llm.model.compile(mode=task.compiled)
        self.clock()
        return peer

    def load(self) -> generation.Theirs:
        """The checkpoint, read to the device."""
        task = self._task
        return generation.Theirs(self._peer(), task.config, task.amount, self.clock)

    def scores(self, side: generation.Theirs) -> np.ndarray:
        """f32[CHECKED_ROWS, V] behind the prompts."""
        return side.prefill(CHECKED_ROWS)[1].float().cpu().numpy()

    def trainer(self, batch: dict[str, np.ndarray], notes: dict[str, Any]) -> Callable[[], Any]:
        """The step, without recomputing anything if that fits."""
        theirs = training.Theirs(self._task.run, self._peer(), batch, self.clock)
        notes["remat"] = "none"

        def step() -> tuple[float, float]:
            try:
                return theirs.step()
            except torch.OutOfMemoryError:
                if notes["remat"] == "full":
                    raise SystemExit(
                        "error: PyTorch's step does not fit on this device; use fewer --rows"
                    ) from None
            notes["remat"] = "full"
            theirs.peer.recompute()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            return step()

        return step

    def peak(self) -> float | None:
        """Most bytes of tensors on the device; None on a CPU."""
        return float(torch.cuda.max_memory_allocated()) if self._cuda else None


def check(side: Any, task: Task, found: Result) -> None:
    """Scores behind short prompts, and the losses of a few short steps."""
    loaded = side.load()
    np.save(Path(task.result).with_suffix(".npy"), side.scores(loaded))
    del loaded
    step = side.trainer(training.make_batch(task.config, task.text, 2), found.notes)
    found.losses = [step()[1] for _ in range(CHECKED_STEPS)]


def generate(side: Any, task: Task, found: Result) -> None:
    """Times loading, prefill and decoding."""
    start = side.clock()  # the device is ready
    host = HostMemory()
    loaded = side.load()
    found.seconds["load"] = [side.clock() - start]
    found.memory["load, host"] = host.end()
    peak = side.peak()
    if peak is not None:
        found.memory["load, device"] = peak
    for rows in task.batches:
        if task.side == "torch":
            loaded.cache = found.notes[f"cache at batch {rows}"] = loaded.faster_cache(rows)
        for name in ("prefill", "decode"):
            timed(getattr(loaded, name), f"{name}, batch {rows}", (rows,), task, found)
    if (peak := side.peak()) is not None:
        found.memory["generation, device"] = peak


def train(side: Any, task: Task, found: Result) -> None:
    """Times the step."""
    cfg = task.config
    batch = training.make_batch(cfg, task.length - cfg.vision.patches, task.rows)
    timed(side.trainer(batch, found.notes), "train step", (), task, found)
    if (peak := side.peak()) is not None:
        found.memory["train step, device"] = peak


def timed(run: Callable[..., Any], name: str, given: Any, task: Task, found: Result) -> None:
    """Seconds of `task.repeats` runs behind those that do not count."""
    for _ in range(WARM_UP):
        run(*given)
    found.seconds[name] = [run(*given)[0] for _ in range(task.repeats)]


SIDES = {"jax": Jax, "torch": Torch}
PARTS = {"check": check, "generation": generate, "training": train}


def main() -> None:
    """Does the task and writes what was found."""
    parser = argparse.ArgumentParser(description="One side of accelerator.py; not for users.")
    parser.add_argument("task", type=Path, help="JSON file of the task")
    data = json.loads(parser.parse_args().task.read_text())
    task = Task(**{k: tuple(v) if isinstance(v, list) else v for k, v in data.items()})
    side, found = SIDES[task.side](task), Result()
    found.kind = side.kind
    PARTS[task.part](side, task, found)
    Path(task.result).write_text(json.dumps(asdict(found)))


if __name__ == "__main__":
    main()
