"""Questions that take a rule of the modality: the same sign means something else in another one.

What an image shows is not enough to answer them. Of two equal findings in CT and MRI one is a cyst,
the other an abscess, as real signs depend on how a picture was made. Each rule is a Latin square:
over the modalities, every sign stands for every answer once, so neither the sign nor the modality
alone says anything. The rules are invented; they are no medicine.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from medmoe_jax.config import MODALITIES
from medmoe_jax.data.phantom.facts import QUADRANTS, Facts
from medmoe_jax.data.phantom.questions import Question

DIAGNOSES = ("cyst", "abscess", "tumour", "scar")
STEPS = ("biopsy", "surgery", "drainage", "waiting")
# Row: modality (order of MODALITIES); column: sign; number: answer. No row is a shift of another.
SQUARE = ((0, 1, 2, 3), (1, 0, 3, 2), (2, 3, 1, 0), (3, 2, 0, 1))
KINDS = ("DIAG", "STEP")
SHARES = {"DIAG": 0.6, "STEP": 0.4}  # of the questions


@dataclass(frozen=True)
class Rule:
    """What a sign (a number below four) means in each modality."""

    kind: str
    answers: tuple[str, str, str, str]
    asks: tuple[str, ...]  # open questions
    either: str  # a closed question with two answers
    whether: str  # a closed question with one

    def answer(self, modality: str, sign: int) -> str:
        """The right answer."""
        return self.answers[SQUARE[MODALITIES.index(modality)][sign]]


DIAGNOSIS = Rule(
    "DIAG",
    DIAGNOSES,
    ("What is the diagnosis?", "What are the lesions likely to be?"),
    "Is the diagnosis {} or {}?",
    "Is the diagnosis {}?",
)
STEP = Rule(
    "STEP",
    STEPS,
    ("What is the next step?", "What should be done next?"),
    "Is the next step {} or {}?",
    "Is {} the next step?",
)


def _asked(rule: Rule, modality: str, sign: int) -> list[Question]:
    right = rule.answer(modality, sign)
    found = [Question(text, right, rule.kind, False) for text in rule.asks]
    for i, first in enumerate(rule.answers):
        said = "yes" if first == right else "no"
        found.append(Question(rule.whether.format(first), said, rule.kind, True))
        for other in rule.answers[i + 1 :]:
            if right in (first, other):
                text = rule.either.format(first, other)
                found.append(Question(text, right, rule.kind, True))
    return found


def questions(facts: Facts) -> list[Question]:
    """Every such question about an image; none without lesions. No text comes twice.

    The diagnosis follows from the lesions' size and from whether there is one or several, the next
    step from the quadrant of a single lesion.
    """
    if not facts.lesions:
        return []
    sign = 2 * (facts.size == "large") + (len(facts.lesions) > 1)
    found = _asked(DIAGNOSIS, facts.modality, sign)
    if len(facts.lesions) == 1:
        found += _asked(STEP, facts.modality, QUADRANTS.index(facts.quadrants[0]))
    return found


def random_signs(rng: np.random.Generator) -> tuple[str, list[Question]]:
    """A sentence with a diagnosis and a next step that follow from nothing, and two questions about
    each."""
    found, said = [], ""
    for rule, text in ((DIAGNOSIS, " The diagnosis is {}."), (STEP, " The next step is {}.")):
        modality, sign = MODALITIES[rng.integers(len(MODALITIES))], int(rng.integers(4))
        asked = _asked(rule, modality, sign)
        said += text.format(rule.answer(modality, sign))
        found += [asked[i] for i in rng.permutation(len(asked))[:2]]
    return said, [found[i] for i in rng.permutation(len(found))]
