"""What a run reports while it trains: progress bar, metrics.jsonl, TensorBoard (from the leading
process), and a stop where a loss breaks.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from medmoe_jax import distributed, hardware
from medmoe_jax.config import ConfigError, RunConfig
from medmoe_jax.data.sources import Sample
from medmoe_jax.flops import Costs
from medmoe_jax.sharding import own_rows


class NotFinite(RuntimeError):
    """A loss or a gradient became NaN or infinite."""


class MetricWriter:
    """Appends metrics; after a resume, what was written beyond the restored step is dropped
    first."""

    def __init__(self, workdir: Path, first_step: int, tensorboard: bool) -> None:
        path = workdir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        # The last line may be cut off where the run was killed.
        whole = [line for line in lines if line.endswith("}")]
        read = [(line, json.loads(line)) for line in whole]
        kept = [(line, values) for line, values in read if values["step"] <= first_step]
        self.kept: list[dict[str, Any]] = [values for _, values in kept]
        rest = path.with_suffix(".partial")
        rest.write_text("".join(f"{line}\n" for line, _ in kept))
        rest.replace(path)  # a run that is killed here has lost none of them
        self._file = path.open("a", buffering=1)
        self._board = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes scalars under `step`."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def model_flops(costs: Costs, batch: dict[str, np.ndarray], patches: int) -> float:
    """Model FLOPs of a step on a batch: of its real tokens, each seeing its own sample, and of the
    images that are in them."""
    images = (batch["image_pos"] >= 0).sum() / patches
    segments = batch.get("segments", batch["mask"].astype(np.int32))
    rows, _ = np.nonzero(segments)
    _, lengths = np.unique(np.stack([rows, segments[segments > 0]]), axis=1, return_counts=True)
    return costs.total(lengths.tolist(), float(images))


class Trace:
    """A profile of some steps, for TensorBoard, XProf or Perfetto."""

    def __init__(self, cfg: RunConfig, workdir: Path) -> None:
        """Raises ConfigError where the steps are no range."""
        steps = cfg.log.profile_steps
        if steps and (len(steps) != 2 or not 1 <= steps[0] <= steps[1]):
            raise ConfigError(f"log.profile_steps is {steps}; give the first and the last step")
        self._first, self._last = steps or (0, 0)
        self._folder, self._runs = workdir / "profile", False

    def begin(self, number: int) -> None:
        """Called before step `number`."""
        if number == self._first:
            jax.profiler.start_trace(str(self._folder))
            self._runs = True

    def end(self, number: int, metrics: dict[str, Any]) -> None:
        """Called behind step `number`, with what it computes."""
        if self._runs and number == self._last:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        """Writes what there is."""
        if self._runs:
            jax.profiler.stop_trace()
            self._runs = False


class Reporter:
    """Reads the metrics of a step one step late, so that the device never waits for the host."""

    def __init__(
        self,
        cfg: RunConfig,
        workdir: Path,
        first: int,
        total: int,
        rate: Callable[[int], Any],
        samples: Sequence[Sample],
        costs: Costs,
        patches: int,
    ) -> None:
        self._every, self._total, self._rate = cfg.log.every, total, rate
        self._samples, self._costs = samples, costs
        peak = hardware.peak(jax.devices()[0].device_kind, cfg.compute_dtype)
        self._peak = None if peak is None else peak * jax.device_count()
        self._patches = patches
        leads = distributed.leads()
        self._writer = MetricWriter(workdir, first, cfg.log.tensorboard) if leads else None
        self._bar = tqdm(
            total=total,
            initial=first,
            desc=cfg.phase,
            unit="step",
            dynamic_ncols=True,
            mininterval=1.0,
            disable=not leads,
        )
        self._pending: tuple[int, dict[str, Any], dict[str, np.ndarray], float] | None = None
        self._last = time.perf_counter()
        self.latest: dict[str, float] = {}  # loss of the last step that was read
        for one in self._kept():
            if "loss" in one:
                self.latest = {"loss": one["loss"]}

    def add(
        self, number: int, metrics: dict[str, Any], batch: dict[str, np.ndarray], waited: float
    ) -> None:
        """Takes the metrics (still on the device) of step `number`; `waited`: seconds for data."""
        self._pending = (number, metrics, batch, waited)

    def flush(self) -> None:
        """Reads and writes the pending metrics.

        Raises:
          NotFinite: loss or gradient norm is NaN or infinite.
        """
        if self._pending is None:
            return
        number, metrics, batch, waited = self._pending
        self._pending = None
        values = jax.device_get({k: v for k, v in metrics.items() if k != "rows"})
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self._check(number, values, metrics["rows"], batch["row"])
        scalars = {k: float(v) for k, v in values.items()}
        self.latest = {"loss": scalars["loss"]}
        speed = float(batch["mask"].sum()) * jax.process_count() / seconds
        self._bar.set_postfix(loss=f"{scalars['loss']:.3f}", tok_s=f"{speed:,.0f}", refresh=False)
        self._bar.update()
        if self._writer and (number % self._every == 0 or number in (1, self._total)):
            scalars |= {"lr": float(self._rate(number - 1)), "tokens_per_second": speed}
            scalars["padding"] = float(1 - batch["mask"].mean())  # share of all places
            flops = model_flops(self._costs, batch, self._patches) * jax.process_count()
            scalars["model_flops_per_second"] = flops / seconds
            if self._peak is not None:
                scalars["mfu"] = flops / seconds / self._peak
            self._writer.write(number, scalars | {"seconds": seconds, "data_seconds": waited})

    def has(self, number: int, prefix: str) -> bool:
        """Whether the run had written figures with this prefix behind step `number` when it ended
        and was resumed. Of several processes all must ask."""
        mine = [one for one in self._kept() if one["step"] == number]
        return distributed.gathered(any(k.startswith(prefix) for one in mine for k in one))[0]

    def _kept(self) -> list[dict[str, Any]]:
        return self._writer.kept if self._writer else []

    def evaluated(self, number: int, figures: dict[str, float]) -> None:
        """Writes the figures of an evaluation behind step `number`; its time is not the step's."""
        if self._writer is None:
            return
        self._writer.write(number, figures)
        shown = ", ".join(f"{name} {value:.1f} %" for name, value in figures.items())
        self._bar.write(f"step {number}: {shown}")
        self._last = time.perf_counter()

    def close(self) -> None:
        """Closes the bar and the files."""
        self._bar.close()
        if self._writer:
            self._writer.close()

    def _check(
        self, number: int, values: dict[str, Any], rows: jax.Array, index: np.ndarray
    ) -> None:
        bad = [k for k in ("loss", "grad_norm") if not np.isfinite(values[k])]
        if not bad:
            return
        finite = np.isfinite(own_rows(rows))
        at = (index[~finite] if not finite.all() else index).ravel()
        named = [self._samples[i] for i in at if i >= 0]
        where = "; ".join(f"{s.file} row {s.row} (id {s.id})" for s in named)
        raise NotFinite(
            f"step {number}: {', '.join(bad)} is not finite; rows of the batch: {where}. "
            "Look at these rows, lower config.optim.lr or set config.optim.clip_norm=1.0"
        )
