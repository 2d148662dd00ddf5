"""LLaVA-Med's files in miniature: alignment and instruct JSON, images, parquet mirrors."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

FLAGS = ("chest_xray", "mri", "histology", "gross", "ct_scan")


def picture(seed: int, kind: str = "JPEG") -> bytes:
    """A small image."""
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 28, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def images(folder: Path, number: int) -> Path:
    """p0.jpg, p1.jpg, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(number):
        (folder / f"p{i}.jpg").write_bytes(picture(i))
    return folder


def talk(*texts: str) -> list[dict[str, str]]:
    """human and gpt in turn."""
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def aligned(i: int, **change: Any) -> dict[str, Any]:
    """A row of the alignment file."""
    row = {
        "id": f"p{i}",
        "image": f"p{i}.jpg",
        "conversatons": talk("Describe the image briefly.\n<image>", f"Figure {i}.\nTwo lines."),
    }
    return row | change


def instructed(i: int, *on: str, **change: Any) -> dict[str, Any]:
    """A row of the instruct files."""
    row = {
        "id": f"p{i}",
        "image": f"p{i}.jpg",
        "domain": {flag: flag in on for flag in FLAGS},
        "conversations": talk(
            "<image>\nWhat is shown?" if i % 2 else "What is shown?\n<image>",
            f"Thing {i}.",
            "And what else?",
            "Nothing.",
        ),
    }
    return row | change


def write_json(file: Path, rows: list[Any]) -> Path:
    """A JSON list."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return file


def write_parquet(file: Path, rows: list[dict[str, Any]]) -> Path:
    """A table."""
    import pyarrow
    from pyarrow import parquet

    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file
