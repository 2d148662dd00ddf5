"""Seven rows of data with images, and batches of them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import tiny_data

from medmoe_jax.config import DataConfig
from medmoe_jax.data import tokens
from medmoe_jax.data.images import ImageSpec
from medmoe_jax.data.pipeline import Batches

PATCHES = 4
ROWS = 7
SPEC = ImageSpec(8, 8, "pad")


def tokenizer(folder: Path) -> Any:
    return tokens.load_tokenizer(tiny_data.save_tokenizer(folder), "phi")


def config(folder: Path) -> DataConfig:
    """Seven rows: row 5 has two images, row 6 none, later rows longer answers."""
    rows = [tiny_data.row(i, "yes " * (4 * i + 1), modality="CT") for i in range(ROWS)]
    for number in range(ROWS):
        tiny_data.save_image(folder / "images" / f"i{number}.png", number)
    rows[5]["image"] = ["i5.png", "i0.png"]
    rows[5]["conversations"][0]["value"] = "<image> <image> Which?"
    del rows[6]["image"], rows[6]["modality"]
    rows[6]["conversations"][0]["value"] = "What is asthma?"
    file = tiny_data.save_rows(folder / "rows.json", rows)
    return DataConfig(
        files=(str(file),),
        image_folder=str(folder / "images"),
        max_length=256,
        buckets=(80, 90, 100, 120, 256),
    )


def take(batches: Batches, count: int | None) -> list[dict[str, np.ndarray]]:
    taken = [dict(batch) for batch in itertools.islice(batches, count)]
    batches.close()
    return taken
