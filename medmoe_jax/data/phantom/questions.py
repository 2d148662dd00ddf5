"""Captions and questions whose answers follow from the facts of one image and from nothing else.

Words are chosen so that no answer of a closed question is a part of another one ("zero" instead of
"none", which contains "one"): official metrics look for substrings. "Left" and "upper" are those of
the image.
"""

from __future__ import annotations

from dataclasses import dataclass

from medmoe_jax.config import MODALITIES
from medmoe_jax.data.phantom.facts import (
    COUNTS,
    DENSITIES,
    ORGANS,
    PLANES,
    SIZES,
    WEIGHTINGS,
    Facts,
)

# Pairs that are asked against each other; the others would hardly be confused.
PLANE_PAIRS = (
    ("axial", "coronal"),
    ("axial", "sagittal"),
    ("coronal", "sagittal"),
    ("frontal", "lateral"),
)
ORGAN_PAIRS = (
    ("lungs", "liver"),
    ("lungs", "knee"),
    ("liver", "brain"),
    ("brain", "knee"),
    ("colon", "muscle"),
    ("muscle", "fat"),
)
COUNT_PAIRS = (("zero", "one"), ("one", "two"), ("two", "three"))
KINDS = ("MODALITY", "PLANE", "ORGAN", "PRES", "POS", "COUNT", "SIZE", "ATTRIB")
CAPTION_PROMPTS = (
    "Describe the image.",
    "Describe this image briefly.",
    "What does this image show?",
    "Give a short description of the image.",
    "Write a caption for this image.",
    "Summarize the findings in the image.",
    "What can be seen in the picture?",
    "Provide a brief report of this image.",
)


@dataclass(frozen=True)
class Question:
    """One question about one image. `kind` is one of KINDS; `closed`: the answer is yes, no or an
    option named in `text`."""

    text: str
    answer: str
    kind: str
    closed: bool


def article(word: str) -> str:
    """The word with "a" or "an" before it, by its sound."""
    return f"{'an' if word[0] in 'aeiou' or word in ('MRI', 'X-ray') else 'a'} {word}"


def pictured(organ: str) -> str:
    """The organ as it stands after "show": tissues take no article."""
    return organ if organ in ("muscle", "fat") else f"the {organ}"


def caption(facts: Facts) -> str:
    """All facts of an image in two sentences of a fixed grammar."""
    if facts.modality == "Pathology":
        first = f"A Pathology image of {pictured(facts.organ)} with {facts.density} nuclei."
    else:
        plane = article(facts.plane).capitalize()
        weighting = f"{facts.weighting} weighted " if facts.weighting else ""
        first = f"{plane} {weighting}{facts.modality} image of {pictured(facts.organ)}."
    if not facts.lesions:
        return f"{first} There are zero lesions."
    places = " and ".join(facts.quadrants)
    verb, noun = ("is", "lesion") if len(facts.lesions) == 1 else ("are", "lesions")
    return f"{first} There {verb} {facts.count} {facts.size} {noun}, {places}."


def _either(kind: str, pairs: tuple[tuple[str, str], ...], value: str, text: str) -> list[Question]:
    """Closed questions "A or B?" for the pairs that hold the true value."""
    return [Question(text.format(*pair), value, kind, True) for pair in pairs if value in pair]


def _open(kind: str, answer: str, *texts: str) -> list[Question]:
    return [Question(text, answer, kind, False) for text in texts]


def _yes_no(kind: str, truth: bool, *texts: str) -> list[Question]:
    return [Question(text, "yes" if truth else "no", kind, True) for text in texts]


def _identity(facts: Facts) -> list[Question]:
    """Modality, plane, organ, weighting and density."""
    pairs = tuple((a, b) for i, a in enumerate(MODALITIES) for b in MODALITIES[i + 1 :])
    asked = _either("MODALITY", pairs, facts.modality, "Is the modality {} or {}?")
    for name in MODALITIES:
        asked += _yes_no("MODALITY", name == facts.modality, f"Is this {article(name)} image?")
    asked += _open(
        "MODALITY", facts.modality, "What is the imaging modality?", "Which modality is shown?"
    )
    asked += _either("ORGAN", ORGAN_PAIRS, facts.organ, "Is the organ {} or {}?")
    for name in ORGANS:
        text = f"Does the image show {pictured(name)}?"
        asked += _yes_no("ORGAN", name == facts.organ, text)
    asked += _open("ORGAN", facts.organ, "Which organ is shown?", "What organ is in the image?")
    if facts.plane:
        asked += _either("PLANE", PLANE_PAIRS, facts.plane, "Is the plane {} or {}?")
        for name in PLANES:
            asked += _yes_no("PLANE", name == facts.plane, f"Is this {article(name)} view?")
        asked += _open("PLANE", facts.plane, "What is the imaging plane?", "Which view is shown?")
    if facts.weighting:
        asked += _either(
            "ATTRIB", (WEIGHTINGS,), facts.weighting, "Is the image {} or {} weighted?"
        )
        asked += _open("ATTRIB", facts.weighting, "What is the weighting?")
    if facts.density:
        asked += _either("ATTRIB", (DENSITIES,), facts.density, "Are the nuclei {} or {}?")
        asked += _open("ATTRIB", facts.density, "What is the density of the nuclei?")
    return asked


def _lesions(facts: Facts) -> list[Question]:
    """Presence, place, number and size."""
    count = len(facts.lesions)
    asked = _yes_no("PRES", count > 0, "Is there a lesion?", "Is any lesion visible?")
    for word in ("left", "right"):
        there = any(word in quadrant for quadrant in facts.quadrants)
        asked += _yes_no("POS", there, f"Is there a lesion on the {word} side?")
    for word in ("upper", "lower"):
        there = any(word in quadrant for quadrant in facts.quadrants)
        asked += _yes_no("POS", there, f"Is there a lesion in the {word} half?")
    asked += _yes_no("COUNT", count > 1, "Is there more than one lesion?")
    asked += _either("COUNT", COUNT_PAIRS, facts.count, "Is the number of lesions {} or {}?")
    asked += _open(
        "COUNT", facts.count, "How many lesions are there?", "What is the number of lesions?"
    )
    for word in SIZES:
        asked += _yes_no("SIZE", word == facts.size, f"Is there a {word} lesion?")
    if count == 1:
        half, side = facts.quadrants[0].split()
        asked += _either(
            "POS", (("left", "right"),), side, "Is the lesion on the {} or the {} side?"
        )
        asked += _either(
            "POS", (("upper", "lower"),), half, "Is the lesion in the {} or the {} half?"
        )
        asked += _open("POS", side, "On which side is the lesion?")
        asked += _open(
            "POS", facts.quadrants[0], "Where is the lesion?", "In which quadrant is the lesion?"
        )
        asked += _either("SIZE", (SIZES,), facts.size, "Is the lesion {} or {}?")
        asked += _open("SIZE", facts.size, "What is the size of the lesion?")
    elif count:
        asked += _either("SIZE", (SIZES,), facts.size, "Are the lesions {} or {}?")
        asked += _open("SIZE", facts.size, "What is the size of the lesions?")
    return asked


def questions(facts: Facts) -> list[Question]:
    """Every question that can be asked about an image; no text comes twice.

    As they stand they are not balanced ("Is there a lesion?" is mostly "yes"): `balance.py`
    selects.
    """
    return _identity(facts) + _lesions(facts)


def answers() -> tuple[str, ...]:
    """All answers of closed questions."""
    named = (*MODALITIES, *PLANES, *ORGANS, *COUNTS, *SIZES, *WEIGHTINGS, *DENSITIES)
    return ("yes", "no", "left", "right", "upper", "lower", *named)
