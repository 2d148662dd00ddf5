"""Modalities that answered questions tell of, for data sets that do not state them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

from medmoe_jax.data.prepare.texts import is_yes_no

BY_ANSWER = "answers to questions for the modality of the same image"
DISAGREE = "answers to questions for the modality of the same image disagree: unknown"
_NAMES = {
    "CT": re.compile(r"\b(ct|cat scan|computed tomography|computerized tomography)\b", re.I),
    "MRI": re.compile(r"\b(mri?|magnetic resonance|flair|dwi|t[12])\b", re.I),
    "X-ray": re.compile(r"\b(x[- ]?rays?|xrs?|cxr|radiograph[sy]?|plain films?)\b", re.I),
}
_ASKS = re.compile(
    r"\bmodality\b|\b(type|kind) of (image|imaging|scan|study|radiograph)"
    r"|\bhow (is|was) (this|the) (image|scan|picture)"
    r"|^(is|was) (this|the image) an? ",
    re.I,
)


def asks_modality(question: str) -> bool:
    """Whether a question is for the modality."""
    return bool(_ASKS.search(question))


def spoken_modality(question: str, answer: str) -> str:
    """The modality that an answered question names, '' if none or several: 'yes' takes it from the
    question, other answers from themselves."""
    if is_yes_no(answer):
        text = question if answer.strip().lower().startswith("y") else ""
    else:
        text = answer
    found = [name for name, pattern in _NAMES.items() if pattern.search(text)]
    return found[0] if len(found) == 1 else ""


def modalities(asked: Iterable[tuple[str, str, str]]) -> dict[str, set[str]]:
    """Image -> modalities that its questions for the modality were answered with.

    Args:
      asked: image, question and answer of such questions.
    """
    found: dict[str, set[str]] = defaultdict(set)
    for image, question, answer in asked:
        name = spoken_modality(question, answer)
        if name:
            found[image].add(name)
    return found


def infer(spoken: Mapping[str, set[str]], image: str) -> tuple[str, str]:
    """Modality and rule for an image; ('', '') where no answer tells, ('', DISAGREE) where several
    do, differently."""
    names = spoken.get(image, set())
    if len(names) == 1:
        return next(iter(names)), BY_ANSWER
    return "", DISAGREE if names else ""
