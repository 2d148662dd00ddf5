"""Questions and predictions: read from files, checked, and paired into `Item`s."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medmoe_jax.config import MODALITIES
from medmoe_jax.data.problems import DataError
from medmoe_jax.data.sources import MODALITY_NAMES, question_id, records
from medmoe_jax.metrics import Answer

Rows = list[dict[str, Any]]
PAIRINGS = ("id", "order")
IMAGE = "<image>"


@dataclass(frozen=True)
class Item:
    """One question with the answer given to it."""

    id: Any  # as the question file has it
    image: str  # its images' paths; '' = text only
    question: str  # without <image>
    prompt: str  # as the prediction has it; the question where it has none
    reference: str
    prediction: str
    answer_type: str  # as in the question file; '' where it does not tell
    modality: str  # one of config.MODALITIES where it is one of them; '' where unknown
    question_type: str
    task: str  # of a classification; '' otherwise
    options: tuple[str, ...]  # its classes; empty where the row is no classification
    label: int  # index in options; -1 where the row is no classification
    confidence: float | None  # probability of the whole answer
    scores: dict[str, float] | None  # probability of each option
    shown: str  # what the model saw: shown, blank, noise or shuffled; '' where unknown
    error: str  # why there is no answer; '' otherwise

    @property
    def answer(self) -> Answer:
        """What the text metrics take."""
        return Answer(self.reference, self.prediction, self.answer_type, self.question)

    @property
    def cluster(self) -> str:
        """Rows with the same value are not independent: they ask about the same image."""
        return f"image {self.image}" if self.image else f"row {self.id}"


def read(path: str | Path) -> Rows:
    """Objects of a JSON list or of a JSONL file.

    Raises:
      DataError: the file cannot be read; the message names the row.
    """
    rows = []
    for number, row, fault in records(Path(path)):
        if fault or not isinstance(row, dict):
            reason = fault or f"must be an object, not {type(row).__name__}"
            raise DataError(f"{path} row {number}: {reason}")
        rows.append(row)
    return rows


def pair(
    rows: Sequence[dict[str, Any]],
    predictions: Sequence[dict[str, Any]],
    how: str = "id",
    names: tuple[str, str] = ("the questions", "the predictions"),
) -> list[Item]:
    """Questions with their answers, in the order of the questions.

    Args:
      rows: with id (or question_id) and conversations (or conversatons); see `data/sources.py`. A
        row without an id is called by its number, as in `data/questions.py`.
      predictions: with question_id and text.
      how: 'id', or 'order' as the official script pairs, which looks at no id.
      names: of the two files, for messages.

    Raises:
      DataError: ids that are missing, extra or doubled, different numbers of rows, or a row that
        lacks something.
    """
    if how not in PAIRINGS:
        raise DataError(f"rows are paired by 'id' or by 'order', not by {how!r}")
    if not rows:
        raise DataError(f"{names[0]}: no rows")
    ids = [question_id(row, number) for number, row in enumerate(rows)]
    keys = [str(key) for key in ids]
    if how == "order":
        if len(rows) != len(predictions):
            raise DataError(
                f"{names[0]} has {len(rows)} rows, {names[1]} has {len(predictions)}: they cannot "
                "be paired by order"
            )
        said = list(predictions)
    else:
        asked = [str(row.get("question_id")) for row in predictions]
        _once(keys, names[0])
        _once(asked, names[1])
        by_id = dict(zip(asked, predictions, strict=True))
        missing, extra = sorted(set(keys) - by_id.keys()), sorted(by_id.keys() - set(keys))
        if missing or extra:
            raise DataError(
                f"{names[1]} and {names[0]} do not fit: {len(missing)} ids without a prediction "
                f"{missing[:5]}, {len(extra)} predictions without a question {extra[:5]}. Answer "
                "the same file, or use --pair order if the rows correspond one to one"
            )
        said = [by_id[key] for key in keys]
    return [
        _item(row, key, prediction, names)
        for row, key, prediction in zip(rows, ids, said, strict=True)
    ]


def _once(keys: Sequence[str], name: str) -> None:
    doubled = [key for key, times in Counter(keys).items() if times > 1]
    if doubled:
        raise DataError(
            f"{name}: {len(doubled)} ids occur more than once: {doubled[:5]}. Make them unique, or "
            "use --pair order if the rows of both files correspond one to one"
        )


def _item(
    row: dict[str, Any], key: Any, prediction: dict[str, Any], names: tuple[str, str]
) -> Item:
    here, there = f"{names[0]}: row {key!r}", f"{names[1]}: the answer to {key!r}"
    turns = row.get("conversations") or row.get("conversatons") or []
    try:
        texts = [turn["value"] for turn in turns]
        if turns and turns[0].get("from") == "gpt":
            texts = texts[1:]
        question, reference = map(_text, texts[:2])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{here} has no question with an answer") from error
    question = question.replace(IMAGE, "").strip()
    if not isinstance(prediction.get("text"), str):
        raise DataError(f"{there} has no 'text'")
    metadata = prediction.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise DataError(f"{there}: 'metadata' must be an object")
    options, label = _classes(row, here)
    image = row.get("image") or ""
    return Item(
        id=key,
        image=" + ".join(map(str, image)) if isinstance(image, list) else str(image),
        question=question,
        prompt=str(prediction.get("prompt", question)),
        reference=reference,
        prediction=prediction["text"],
        answer_type=str(_first(row, "answer_type") or ""),
        modality=_modality(row),
        question_type=str(_first(row, "question_type", "content_type") or ""),
        task=str(_first(row, "task") or ""),
        options=options,
        label=label,
        confidence=_probability(metadata.get("confidence"), there),
        scores=_scores(metadata.get("options"), options, there),
        shown=str(metadata.get("images") or ""),
        error=str(metadata.get("error") or ""),
    )


def _text(value: Any) -> str:
    """Text or a number as text. Raises ValueError on anything else: it is no answer."""
    finite = isinstance(value, (int, float)) and math.isfinite(value)
    if isinstance(value, bool) or not (finite or isinstance(value, str)):
        raise ValueError(repr(value))
    return str(value)


def _first(row: dict[str, Any], *keys: str) -> Any:
    return next((row[key] for key in keys if row.get(key) not in (None, "")), None)


def _modality(row: dict[str, Any]) -> str:
    domain = row.get("domain")
    named = _first(row, "modality")
    flags = [name for name, on in domain.items() if on] if isinstance(domain, dict) else []
    known = set()
    for name in flags if named is None else [str(named)]:
        place = MODALITY_NAMES.get("".join(c for c in name.lower() if c.isalpha()))
        known.add(name if place is None else MODALITIES[place])
    return known.pop() if len(known) == 1 else ""


def _classes(row: dict[str, Any], where: str) -> tuple[tuple[str, ...], int]:
    options, label = row.get("options"), row.get("label")
    if not options or label is None:
        return (), -1
    if not isinstance(options, list) or len(set(map(str, options))) < len(options):
        raise DataError(f"{where}: 'options' must be a list of different texts, not {options!r}")
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(options):
        raise DataError(f"{where}: 'label' must be 0 to {len(options) - 1}, not {label!r}")
    return tuple(map(str, options)), label


def _probability(value: Any, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1.001:
        raise DataError(f"{where}: a probability must be a number from 0 to 1, not {value!r}")
    return min(float(value), 1.0)  # sums of rounded numbers may lie a little above 1


def _scores(value: Any, options: tuple[str, ...], where: str) -> dict[str, float] | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise DataError(f"{where}: 'options' must be an object of probabilities, not {value!r}")
    found = {str(name): _probability(p, where) for name, p in value.items()}
    lacking = [name for name in options if found.get(name) is None]
    if lacking:
        raise DataError(f"{where}: no probability of the options {lacking}; it has {list(found)}")
    return {name: p for name, p in found.items() if p is not None}
