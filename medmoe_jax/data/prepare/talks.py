"""Rows that are conversations already: the files of Med-MoE and of the LLaVA family."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from medmoe_jax.config import MODALITIES
from medmoe_jax.data import sources
from medmoe_jax.data.prepare.texts import Reading
from medmoe_jax.data.problems import DataError
from medmoe_jax.data.templates import IMAGE_TOKEN


def turns(reading: Reading, row: dict[str, Any], images: Sequence[str]) -> list[tuple[str, str]]:
    """Questions and answers of a row, with <image> where the row has it.

    Raises:
      DataError: no conversation that can be used, or another number of <image> than images.
    """
    if "conversations" not in row and "conversatons" in row:
        reading.handled.append("'conversatons' written as 'conversations'")
    for turn in row.get("conversations", row.get("conversatons")) or ():
        value = turn.get("value") if isinstance(turn, dict) else None
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            reading.handled.append("a turn: a number, written as text")
    said = [text for _, text in sources.read_turns(row)]
    found = sum(text.count(IMAGE_TOKEN) for text in said)
    if not found and images:
        reading.handled.append(f"{IMAGE_TOKEN} added before the first question")
    elif found != len(images):
        raise DataError(f"{found} <image> in the text, but {len(images)} image(s)")
    clean = [
        # With an image, the first question may be empty.
        reading.text(text, ("question", "answer")[place % 2], lines=True) if text.strip() else text
        for place, text in enumerate(said)
    ]
    return list(zip(clean[::2], clean[1::2], strict=True))


def stated_modality(reading: Reading, row: dict[str, Any]) -> str:
    """What `modality` or the flags in `domain` say."""
    if row.get("modality") not in (None, ""):
        return reading.modality(row["modality"])
    index = sources.read_modality(row, Counter())
    return "" if index == sources.UNKNOWN else MODALITIES[index]
