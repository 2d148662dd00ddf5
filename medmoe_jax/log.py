"""Metrics of a run: one JSON object a line in `metrics.jsonl`, the same to TensorBoard, and a
progress bar.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tqdm import tqdm


class MetricWriter:
    """Appends metrics; after a resume, what was written beyond the restored step is dropped
    first.
    """

    def __init__(self, workdir: Path, first_step: int, tensorboard: bool) -> None:
        path = workdir / "metrics.jsonl"
        kept = []
        if path.exists():
            lines = path.read_text().splitlines()
            # The last line may be cut off where the run was killed.
            kept = [
                line
                for line in lines
                if line.endswith("}") and json.loads(line)["step"] <= first_step
            ]
        path.write_text("".join(f"{line}\n" for line in kept))
        self._file = path.open("a", buffering=1)
        self._board = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Writes scalars under `step`."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            if self._board is not None:
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def progress(total: int, done: int, name: str) -> tqdm:
    """A progress bar with time left, on stderr."""
    return tqdm(
        total=total, initial=done, desc=name, unit="step", dynamic_ncols=True, mininterval=1.0
    )
