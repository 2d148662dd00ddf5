"""BLEU beside sacrebleu."""

from __future__ import annotations

import random

import pytest

from medmoe_jax.evaluation import bleu
from medmoe_jax.evaluation.report import report


def test_bleu_is_sacrebleu() -> None:
    sacrebleu = pytest.importorskip("sacrebleu.metrics")
    scorer = sacrebleu.BLEU(lowercase=True, effective_order=True)
    draw = random.Random(2)
    pairs = [
        tuple(
            " ".join(draw.choices(["Left", "lung", "a", "b,"], k=draw.randrange(7))) for _ in "rp"
        )
        for _ in range(60)
    ]
    counted = bleu.counts(pairs)
    for (reference, prediction), row in zip(pairs, counted, strict=True):
        want = scorer.sentence_score(prediction, [reference]).score
        assert 100 * bleu.score(row) == pytest.approx(want, abs=1e-9)
    corpus = scorer.corpus_score([p for _, p in pairs], [[r for r, _ in pairs]]).score
    assert 100 * bleu.score(counted.sum(0)) == pytest.approx(corpus, abs=1e-9)
    assert bleu.counts([]).shape == (0, 10)


def test_draws_without_an_open_question_say_nothing_of_bleu() -> None:
    """Two of 40 images have one: a draw that has neither is no draw with BLEU 0."""
    rows, predictions = [], []
    for i in range(40):
        kind, answer = ("open", "the left lung") if i < 2 else ("closed", "yes")
        turns = [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": answer}]
        row = {"id": i, "image": f"{i}.png", "answer_type": kind, "conversations": turns}
        rows.append(row)
        predictions.append({"question_id": i, "text": answer})
    found = report(rows, predictions, metric="strict", samples=300)["strict"]
    assert found["aggregate_percent"]["Open BLEU"] == pytest.approx(100)
    assert found["ci95_percent"]["Open BLEU"] == pytest.approx([100, 100])
