"""Texts, answer types and modalities of a row: put right, and given by a stated rule where the
source does not tell. What was put right is counted, and a rule that gave a value stands in the row.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from medmoe_jax.config import MODALITIES
from medmoe_jax.data.prepare.types import SPLITS, Draft, Picture
from medmoe_jax.data.problems import DataError, check_text
from medmoe_jax.data.sources import ANSWER_TYPES, CLOSED, MODALITY_NAMES
from medmoe_jax.data.templates import GPT, HUMAN, IMAGE_TOKEN

YES_NO = "CLOSED if the answer is yes or no, otherwise OPEN"
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "validate": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}  # lower case -> SPLITS


def split_of(name: str) -> str:
    """The split that a file name or a column tells of ('train-00000-of-00001.parquet',
    'validation.json', 'test_rad'), '' where it tells of none or of several."""
    words = "".join(c if c.isalpha() else " " for c in name.lower()).split()
    found = {SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES}
    return found.pop() if len(found) == 1 else ""


def modality_name(text: Any) -> str:
    """One of config.MODALITIES for a spelling of it, '' for anything else."""
    letters = "".join(c for c in str(text).lower() if c.isalpha())
    place = MODALITY_NAMES.get(letters)
    return "" if place is None else MODALITIES[place]


def is_yes_no(answer: str) -> bool:
    """Whether an answer is yes or no, whatever its case and its full stop."""
    return answer.strip().rstrip(".").strip().lower() in ("yes", "no")


@dataclass
class Reading:
    """One row while it is read: collects what was put right and which rules gave a value."""

    split: str  # one of SPLITS
    source: str  # name of the data set
    licence: str
    handled: list[str] = field(default_factory=list)
    rules: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise DataError(f"split {self.split!r} is unknown; use one of {', '.join(SPLITS)}")

    def text(self, value: Any, what: str, lines: bool = False) -> str:
        """Text of a question or an answer.

        Args:
          value: text, or a number, which is written as text.
          what: 'question' or 'answer', for messages.
          lines: keep line feeds and white space inside the text.

        Returns:
          The text without outer white space; tabs, line feeds and runs of spaces become a space.

        Raises:
          DataError: empty, or neither text nor number.
        """
        if isinstance(value, bool) or not isinstance(value, (str, int, float, type(None))):
            raise DataError(f"the {what} must be text, not {value!r}")
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            value = ""
        if isinstance(value, (int, float)):
            self.handled.append(f"{what}: a number, written as text")
            value = str(int(value)) if float(value).is_integer() else str(value)
        clean = value.strip() if lines else " ".join(value.split())
        if clean != value:
            self.handled.append(f"{what}: stray white space removed")
        if IMAGE_TOKEN in clean and not lines:
            self.handled.append(f"{what}: {IMAGE_TOKEN} removed")
            clean = " ".join(clean.replace(IMAGE_TOKEN, " ").split())
        if not clean:
            raise DataError(f"the {what} is empty")
        check_text(clean, what)
        return clean

    def answer_type(self, value: Any, answer: str) -> str:
        """'OPEN' or 'CLOSED', by the rule YES_NO where the source has no known type."""
        given = "" if value is None or value != value else str(value)  # NaN differs from itself
        known = ANSWER_TYPES.get(given.strip().lower(), "")
        if known:
            name = "CLOSED" if known == CLOSED else "OPEN"
            if given != given.strip():
                self.handled.append("answer_type: stray white space removed")
            elif given != name:
                self.handled.append(f"answer_type: {given!r} written as {name}")
            return name
        if given.strip():
            self.handled.append(f"answer_type: unknown {given.strip()!r}, given by rule")
        self.rules["answer_type"] = YES_NO
        return "CLOSED" if is_yes_no(answer) else "OPEN"

    def modality(self, value: Any) -> str:
        """One of config.MODALITIES; another name as it is; '' where the source has none."""
        given = "" if value is None or value != value else str(value).strip()
        return modality_name(given) or given

    def draft(
        self,
        *,
        file: str,
        place: int,
        id: Any,
        turns: Sequence[tuple[str, str]],
        answer_type: str,
        modality: str,
        question_type: str = "",
        pictures: Sequence[Picture] = (),
        more: dict[str, Any] | None = None,
    ) -> Draft:
        """The row of the manifest.

        Args:
          file: of the source.
          place: 0-based position in it.
          id: the source's; made unique later, if need be.
          turns: questions and answers, (text, text) each; the images come before the first
            question unless it says itself where.
          answer_type: 'OPEN', 'CLOSED' or ''.
          modality: '' where unknown.
          question_type: '' where unknown.
          pictures: images of the row.
          more: further fields, such as `options`.

        Raises:
          DataError: a field holds halves of characters.
        """
        talk = []
        for question, answer in turns:
            talk += [{"from": HUMAN, "value": question}, {"from": GPT, "value": answer}]
        if pictures and not any(IMAGE_TOKEN in turn["value"] for turn in talk):
            talk[0]["value"] = f"{IMAGE_TOKEN}\n" * len(pictures) + talk[0]["value"]
        row = {
            "id": str(id),
            "conversations": talk,
            "answer_type": answer_type,
            "modality": modality,
            "question_type": question_type,
            "split": self.split,
            "source": self.source,
            "licence": self.licence,
            **(more or {}),
            "origin": f"{file} row {place}",
            "rules": dict(self.rules),
        }
        check_text(json.dumps(row, ensure_ascii=False), "row")
        return Draft(file, place, row, tuple(pictures), tuple(self.handled))
