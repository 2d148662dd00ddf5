"""What `convert check` found: a comparison of named tensors, and its table."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

# What the check computes. A tensor of such a name that the model does not have is a failure.
_LAYER = r"hidden|attn_out|moe_in|moe_out|router_logits|combine_dense|exp_counts|l_aux"
_WHOLE = (
    "clip_features|projector_out|merged_inputs_embeds|merged_attention_mask|merged_labels|"
    "l_aux_all|final_norm|logits|ce_loss|moe_loss|loss"
)
RESULTS = re.compile(rf"out\.(layer_\d+\.({_LAYER})|{_WHOLE})")
GENERATED = re.compile(r"gen\.(\w+)\.(new_ids|step_logits|new_ids_eos_stop)")
INPUTS = re.compile(
    r"input_ids|attention_mask|labels|pixel_values|gen\.\w+\.(input_ids|pixel_values|eos_stop_id)"
)


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
      name: of the tensor in the file.
      shape: its shape.
      error: largest absolute difference, or the number of places that differ where `tolerance` is
        zero; infinite where shapes differ or the model has no such tensor.
      tolerance: largest `error` that passes; zero for what must be equal.
      note: what else there is to say.
    """

    name: str
    shape: tuple[int, ...]
    error: float
    tolerance: float
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether it passes; NaN does not."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Result:
    """All comparisons, and the tensors of the file that nothing was compared with."""

    rows: list[Row]
    unchecked: list[str]

    @property
    def ok(self) -> bool:
        """Whether something was compared and everything compared passes."""
        return bool(self.rows) and all(row.ok for row in self.rows)

    def text(self) -> str:
        """A table with a row a tensor, and a summary line."""
        cells = [("tensor", "shape", "error", "tolerance", "")]
        for row in self.rows:
            error = f"{row.error:.1e}"
            if row.tolerance == 0 and math.isfinite(row.error):
                error = f"{row.error:.0f} differ"
            limit = f"{row.tolerance:.0e}" if row.tolerance else "equal"
            verdict = "ok" if row.ok else f"FAIL {row.note}"
            cells.append((row.name, "x".join(map(str, row.shape)) or "-", error, limit, verdict))
        widths = [max(len(cell[i]) for cell in cells) for i in range(4)]
        lines = [
            f"{name:<{widths[0]}}  {shape:<{widths[1]}}  {error:>{widths[2]}}  "
            f"{limit:>{widths[3]}}  {verdict}".rstrip()
            for name, shape, error, limit, verdict in cells
        ]
        lines += [f"{name:<{widths[0]}}  not checked" for name in self.unchecked]
        return "\n".join([*lines, self._summary()])

    def _summary(self) -> str:
        failed = [row.name for row in self.rows if not row.ok]
        left = f"; {len(self.unchecked)} not checked" if self.unchecked else ""
        if failed:
            names = ", ".join(failed[:3]) + (", ..." if len(failed) > 3 else "")
            return f"FAIL: {len(failed)} of {len(self.rows)} comparisons, first {names}{left}"
        if not self.rows:
            return f"FAIL: the file holds nothing to compare with{left}"
        worst = max((row.error for row in self.rows if row.tolerance), default=0.0)
        return f"PASS: {len(self.rows)} comparisons, largest error {worst:.1e}{left}"


def compare(got: Mapping[str, np.ndarray], want: Mapping[str, np.ndarray], atol: float) -> Result:
    """Compares what the model computed with what an activation file holds.

    Args:
      got: see `activations` and `generations`.
      want: the file's tensors; whole numbers and truth values must be equal, and of
        `combine_dense` the places that are not zero, as they are the experts chosen.
      atol: largest absolute error of everything else.
    """
    rows: list[Row] = []
    for name, value in got.items():
        if name in want:
            rows.append(_row(name, value, want[name], atol))
            if name.endswith(".combine_dense"):
                chosen = (value > 0, want[name] > 0)
                rows.append(_row(f"{name} (experts chosen)", *chosen, atol))
    unchecked = []
    for name, value in want.items():
        if name in got or INPUTS.fullmatch(name):
            continue
        if RESULTS.fullmatch(name):
            rows.append(Row(name, value.shape, math.inf, atol, "the model has no such tensor"))
        else:
            unchecked.append(name)
    return Result(rows, sorted(unchecked))


def _row(name: str, got: np.ndarray, want: np.ndarray, atol: float) -> Row:
    exact = want.dtype == bool or np.issubdtype(want.dtype, np.integer)
    tolerance = 0.0 if exact else atol
    if got.shape != want.shape:
        return Row(name, want.shape, math.inf, tolerance, f"the model gives shape {got.shape}")
    if exact:
        return Row(name, want.shape, float((got != want).sum()), 0.0)
    difference = np.abs(got.astype(np.float32) - want.astype(np.float32))
    return Row(name, want.shape, float(difference.max(initial=0.0)), tolerance)
