"""BLEU beside sacrebleu."""

from __future__ import annotations

import random

import pytest

from medmoe_jax.evaluation import bleu


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
