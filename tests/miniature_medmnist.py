"""MedMNIST files in miniature, with the fields of the real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

COLOUR = ("dermamnist", "bloodmnist")
ROWS = {"train": 5, "val": 2, "test": 3}


def medmnist(folder: Path, flag: str, size: int = 28, classes: int = 2, **change: Any) -> Path:
    """Writes a file and returns it; `change` replaces arrays, None leaves one out."""
    rng = np.random.default_rng(len(flag) + size)
    arrays = {}
    for split, rows in ROWS.items():
        shape = (rows, size, size, 3) if flag in COLOUR else (rows, size, size)
        arrays[f"{split}_images"] = rng.integers(0, 256, shape, np.uint8)
        labels = (np.arange(rows) % classes).astype(np.uint8)
        arrays[f"{split}_labels"] = labels[:, None]
    arrays |= change
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / (f"{flag}.npz" if size == 28 else f"{flag}_{size}.npz")
    kept = {key: value for key, value in arrays.items() if value is not None}
    np.savez_compressed(file, **kept)
    return file
