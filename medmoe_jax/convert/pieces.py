"""Which tensors the opened files hold, by the table's keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medmoe_jax.config import LlmConfig
from medmoe_jax.convert.report import Report
from medmoe_jax.convert.spellings import Slice, canonical, ignored
from medmoe_jax.convert.table import Row
from medmoe_jax.convert.torch_files import TensorInfo, Weights


@dataclass(frozen=True)
class Piece:
    """Where one tensor of the table is found: a tensor in a file, or a slice of one."""

    weights: Weights
    info: TensorInfo
    slice: Slice | None = None

    def shape(self, config: LlmConfig) -> tuple[int, ...] | None:
        """Its shape; None where it is a slice of a tensor that has not the right number of rows."""
        return self.slice.shape(self.info.shape, config) if self.slice else self.info.shape

    def read(self, config: LlmConfig) -> np.ndarray:
        """Its values."""
        array = self.weights.read(self.info.key)
        return self.slice.cut(array, config) if self.slice else array


def collect(weights: Weights, report: Report) -> dict[str, list[Piece]]:
    """All tensors of a checkpoint by the table's keys; those of no use are told to `report`."""
    pieces: dict[str, list[Piece]] = {}
    for key, info in weights.infos.items():
        reason = ignored(key)
        if reason:
            report.ignore(key, reason)
            continue
        for name, part in canonical(key):
            pieces.setdefault(name, []).append(Piece(weights, info, part))
    return pieces


def leave_out(pieces: dict[str, list[Piece]], prefix: str, reason: str, report: Report) -> None:
    """Takes the tensors whose key begins with `prefix` out of `pieces`."""
    for key in [key for key in pieces if key.startswith(prefix)]:
        for piece in pieces.pop(key):
            report.ignore(piece.info.key, reason)


def source_order(rows: Sequence[Row], pieces: dict[str, list[Piece]]) -> list[Row]:
    """The rows that have a source, in the order in which their tensors lie in the files."""
    found = [row for row in rows if pieces.get(row.key)]
    return sorted(found, key=lambda r: _place(pieces[r.key][0].info))


def _place(info: TensorInfo) -> tuple[str, int]:
    return str(info.file), info.offset
