"""A contact sheet of prepared rows: images with question, answer and types below, to be looked
at."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from medmoe_jax.data import images
from medmoe_jax.data.templates import IMAGE_TOKEN

ROWS = 24  # on a sheet
COLUMNS = 6
CELL = 224  # pixels of an image and its text, across
TEXT_HEIGHT = 104  # pixels below an image
LETTERS = 36  # of the built-in font that fit beside each other in a cell
LINES = 7


class Sample:
    """The first few rows of every kind of a stream: as many as a sheet shows, whatever its
    length."""

    def __init__(self, size: int = ROWS):
        self._size = size
        self._kinds: dict[tuple[str, ...], list[dict[str, Any]]] = {}

    def add(self, row: dict[str, Any]) -> None:
        """Looks at a row. Kinds are split, answer type, modality and question type."""
        kind = tuple(str(row[k]) for k in ("split", "answer_type", "modality", "question_type"))
        if kind not in self._kinds and len(self._kinds) >= self._size:
            return
        rows = self._kinds.setdefault(kind, [])
        shown = {str(other["image"]) for other in rows}
        if len(rows) < self._size and str(row["image"]) not in shown:
            rows.append(row)

    def rows(self) -> list[dict[str, Any]]:
        """One of every kind, then a second one of every kind, and so on."""
        kinds = [self._kinds[kind] for kind in sorted(self._kinds)]
        turns = [rows[n] for n in range(self._size) for rows in kinds if n < len(rows)]
        return turns[: self._size]


def draw_sheet(rows: Sequence[dict[str, Any]], folder: Path) -> Image.Image:
    """Draws rows of a manifest whose images lie in `folder`; of a row with several, the first."""
    columns = min(COLUMNS, max(1, len(rows)))
    height = CELL + TEXT_HEIGHT
    sheet = Image.new("RGB", (columns * CELL, -(-len(rows) // columns) * height), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(12)
    for place, row in enumerate(rows):
        left, top = place % columns * CELL, place // columns * height
        names = [row["image"]] if isinstance(row["image"], str) else row["image"]
        if names and names[0]:
            picture = _thumbnail(folder / names[0])
            at = (left + (CELL - picture.width) // 2, top + (CELL - picture.height) // 2)
            sheet.paste(picture, at)
        pen.multiline_text((left + 4, top + CELL + 2), _text(row), "black", font, spacing=2)
    return sheet


def _thumbnail(path: Path) -> Image.Image:
    with Image.open(path, formats=images.FORMATS) as image:
        picture = images.to_rgb(image)
    scale = min((CELL - 8) / picture.width, (CELL - 8) / picture.height)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.BICUBIC)


def _text(row: dict[str, Any]) -> str:
    kinds = [row[k] or "-" for k in ("split", "answer_type", "modality", "question_type")]
    question, answer = (turn["value"] for turn in row["conversations"][:2])
    asked = " ".join(question.replace(IMAGE_TOKEN, " ").split())
    lines = [" | ".join(kinds)[:LETTERS]]
    lines += textwrap.wrap(f"Q {asked}", LETTERS)[: LINES - 3]
    lines += textwrap.wrap(f"A {' '.join(answer.split())}", LETTERS)
    return "\n".join(lines[:LINES])
