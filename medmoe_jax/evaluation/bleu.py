"""BLEU beside the strict figures, by sacrebleu (extra `eval`).

BLEU-4 with sacrebleu's 13a words in lower case and exponential smoothing. Only the n-gram lengths
that the answers have take part (sacrebleu's effective order): most answers are shorter than four
words and would all score 0 otherwise. The answers are one corpus in `Open BLEU`; `Open BLEU
(sentences)` is the mean of each row's own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from medmoe_jax.metrics import MissingExtra

CORPUS, SENTENCES = "Open BLEU", "Open BLEU (sentences)"


def counts(pairs: Iterable[tuple[str, str]]) -> np.ndarray:
    """What BLEU is computed from; the sum over rows belongs to their corpus.

    Args:
      pairs: (reference, prediction).

    Returns:
      i64[n, 10]: matching n-grams (n = 1..4), n-grams of the prediction, words of the prediction,
      words of the reference.

    Raises:
      MissingExtra: sacrebleu is absent.
    """
    scorer = _scorer()(lowercase=True, effective_order=True)
    rows = []
    for reference, prediction in pairs:
        found = scorer.sentence_score(prediction, [reference])
        rows.append([*found.counts, *found.totals, found.sys_len, found.ref_len])
    return np.array(rows, np.int64).reshape(-1, 10)


def score(row: np.ndarray) -> float:
    """BLEU, 0..1, of [10] counts."""
    found = [int(count) for count in row]
    done = _scorer().compute_bleu(
        found[:4], found[4:8], found[8], found[9], smooth_method="exp", effective_order=True
    )
    return min(done.score / 100, 1.0)


def _scorer() -> Any:
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as error:
        raise MissingExtra("BLEU needs sacrebleu: pip install 'medmoe_jax[eval]'") from error
    return BLEU
