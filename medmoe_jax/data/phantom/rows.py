"""Rows of the JSON files, in the formats of LLaVA-Med and Med-MoE with their quirks.

The quirks: the key `conversatons` of the captions, the place of `<image>`, answer types in two
spellings. Source: LLaVA-Med's data description and `instruct_postprocess.py`; Med-MoE's
`train_all.json` as `moellava/train/train.py` and `moellava/eval/run_eval.py` read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from medmoe_jax.data.phantom import signs
from medmoe_jax.data.phantom.balance import select
from medmoe_jax.data.phantom.facts import ORGANS, PLANES, SIZES, Facts
from medmoe_jax.data.phantom.questions import CAPTION_PROMPTS, Question, caption, questions

Rows = list[dict[str, Any]]

# The real files have no flag for X-rays of other regions; the nearest one is set for them.
DOMAINS = {"CT": "ct_scan", "MRI": "mri", "X-ray": "chest_xray", "Pathology": "histology"}
CONDITIONS = ("healthy", "lesion")
CLASS_PROMPTS = {
    "organ": "Which organ does the image show?",
    "condition": "What is the condition?",
    "plane": "Which plane does the image show?",
    "size": "How large are the lesions?",
}


def _turns(question: str, answer: str) -> Rows:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def image_name(split: str, index: int) -> str:
    return f"{split}_{index:06d}"


def alignment(split: str, studies: Sequence[Facts], rng: np.random.Generator) -> Rows:
    """One caption an image, in the format of `llava_med_alignment_500k.json`."""
    rows = []
    for index, facts in enumerate(studies):
        name = image_name(split, index)
        prompt = CAPTION_PROMPTS[rng.integers(len(CAPTION_PROMPTS))]
        turns = _turns(f"{prompt}\n<image>", caption(facts))
        rows.append({"id": name, "image": f"{name}.png", "conversatons": turns})
    return rows


def instruct(split: str, studies: Sequence[Facts], rng: np.random.Generator) -> Rows:
    """Conversations of 3 to 6 rounds, in the format of `llava_med_instruct_60k.json`.

    A third of them end with the caption.
    """
    rounds = rng.integers(3, 7, len(studies))
    described = rng.random(len(studies)) < 1 / 3
    asked = [questions(facts) for facts in studies]
    chosen = select(asked, int((rounds - described).sum()), rng, (rounds - described).tolist())
    rows = []
    for index, facts in enumerate(studies):
        mine = chosen[index][: 6 - described[index]]
        taken = {question.text for question in mine}
        spare = [question for question in asked[index] if question.text not in taken]
        for pick in rng.permutation(len(spare))[: max(0, 3 - described[index] - len(mine))]:
            mine.append(spare[pick])
        if described[index]:
            prompt = CAPTION_PROMPTS[rng.integers(len(CAPTION_PROMPTS))]
            mine.append(Question(prompt, caption(facts), "CAPTION", False))
        turns = [turn for q in mine for turn in _turns(q.text, q.answer)]
        first = turns[0]["value"]
        turns[0]["value"] = f"<image>\n{first}" if rng.random() < 0.5 else f"{first}\n<image>"
        name = image_name(split, index)
        flags = {
            domain: domain == DOMAINS[facts.modality]
            for domain in ("chest_xray", "mri", "histology", "gross", "ct_scan")
        }
        rows.append({"id": name, "image": f"{name}.png", "domain": flags, "conversations": turns})
    return rows


def stage3(split: str, studies: Sequence[Facts], rng: np.random.Generator, total: int) -> Rows:
    """About `total` single questions in random order, in the format of Med-MoE's
    `train_all.json`."""
    chosen = select([questions(f) for f in studies], total, rng)
    return _single(split, studies, rng, chosen, "")


def rules(split: str, studies: Sequence[Facts], rng: np.random.Generator, total: int) -> Rows:
    """About `total` questions of `signs.py`, as `stage3` has them."""
    shares = {True: signs.SHARES, False: signs.SHARES}
    chosen = select([signs.questions(f) for f in studies], total, rng, shares=shares)
    return _single(split, studies, rng, chosen, "sign_")


def _single(
    split: str,
    studies: Sequence[Facts],
    rng: np.random.Generator,
    asked: Sequence[Sequence[Question]],
    mark: str,
) -> Rows:
    """A row for each question, in random order."""
    rows = []
    for index, chosen in enumerate(asked):
        for number, question in enumerate(chosen):
            spelling = ("open", "close") if rng.random() < 0.5 else ("OPEN", "CLOSED")
            rows.append(
                {
                    "id": f"{image_name(split, index)}_{mark}{number}",
                    "image": f"{image_name(split, index)}.png",
                    "answer_type": spelling[question.closed],
                    "modality": studies[index].modality,
                    "question_type": question.kind,
                    "conversations": _turns(f"<image>\n{question.text}", question.answer),
                }
            )
    return [rows[i] for i in rng.permutation(len(rows))]


def classify(split: str, studies: Sequence[Facts], rng: np.random.Generator) -> Rows:
    """Two labelled tasks as prompts with options: the organ (every image), and healthy or lesion
    (half and half)."""
    healthy = [i for i, facts in enumerate(studies) if not facts.lesions]
    ill = [i for i, facts in enumerate(studies) if facts.lesions]
    size = min(len(healthy), len(ill))
    second = {int(i) for group in (healthy, ill) for i in rng.permutation(group)[:size]}
    rows = []
    for index, facts in enumerate(studies):
        rows.append(_labelled(split, index, facts, "organ", ORGANS, facts.organ))
        if index in second:
            condition = CONDITIONS[bool(facts.lesions)]
            rows.append(_labelled(split, index, facts, "condition", CONDITIONS, condition))
    return rows


def classify_more(split: str, studies: Sequence[Facts]) -> Rows:
    """Two further labelled tasks, each where it applies: the plane, and the size of the lesions."""
    rows = []
    for index, facts in enumerate(studies):
        if facts.plane:
            rows.append(_labelled(split, index, facts, "plane", PLANES, facts.plane))
        if facts.size:
            rows.append(_labelled(split, index, facts, "size", SIZES, facts.size))
    return rows


def _labelled(
    split: str, index: int, facts: Facts, task: str, options: tuple[str, ...], answer: str
) -> dict[str, Any]:
    """One row of a classification."""
    prompt = f"<image>\n{CLASS_PROMPTS[task]} Options: {', '.join(options)}."
    return {
        "id": f"{image_name(split, index)}_{task}",
        "image": f"{image_name(split, index)}.png",
        "answer_type": "CLOSED",
        "modality": facts.modality,
        "question_type": "CLASS",
        "task": task,
        "label": options.index(answer),
        "options": list(options),
        "conversations": _turns(prompt, answer),
    }


def study(split: str, index: int, facts: Facts) -> dict[str, Any]:
    """The row of `studies.jsonl`: every fact by name, and the lesions as shares of the longer
    side."""
    return {
        "image": f"{image_name(split, index)}.png",
        "split": split,
        "modality": facts.modality,
        "organ": facts.organ,
        "plane": facts.plane,
        "weighting": facts.weighting,
        "density": facts.density,
        "count": len(facts.lesions),
        "side": facts.side,
        "size": facts.size,
        "lesions": [
            {"x": round(s.x / 2, 4), "y": round(s.y / 2, 4), "diameter": round(s.radius, 4)}
            | {"quadrant": s.quadrant}
            for s in facts.lesions
        ],
    }
