"""A contact sheet: samples of every modality, each with a question and its answer, to be looked
at."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from medmoe_jax.config import MODALITIES
from medmoe_jax.data.phantom.questions import caption, questions
from medmoe_jax.data.phantom.render import draw_image

TEXT_HEIGHT = 76  # pixels below an image: five lines of the built-in font
LINE = 38  # letters that fit beside each other below an image of 224 pixels


def contact_sheet(seed: int, columns: int = 6, rows: int = 2, size: int = 224) -> Image.Image:
    """`rows` rows of `columns` training images for each modality, with caption and question below.

    Source: the first images of the training split, so the sheet shows what `write` writes.
    """
    cell = max(size, 224)
    height = cell + TEXT_HEIGHT
    sheet = Image.new("RGB", (columns * cell, len(MODALITIES) * rows * height), "white")
    pen = ImageDraw.Draw(sheet)
    rng = np.random.default_rng(seed)
    for band in range(len(MODALITIES)):
        for place in range(rows * columns):
            image, facts = draw_image(seed, "train", place * len(MODALITIES) + band, size)
            left = place % columns * cell
            top = (band * rows + place // columns) * height
            picture = Image.fromarray(image).convert("RGB")
            sheet.paste(
                picture, (left + (cell - picture.width) // 2, top + (cell - picture.height) // 2)
            )
            asked = questions(facts)
            question = asked[rng.integers(len(asked))]
            lines = [*_lines(caption(facts)), *_lines(f"{question.text} - {question.answer}")]
            pen.multiline_text((left + 4, top + cell + 2), "\n".join(lines[:5]), "black", spacing=2)
    return sheet


def _lines(text: str) -> list[str]:
    """Breaks a text between words."""
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) + 1 > LINE:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines
