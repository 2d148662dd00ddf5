"""How long samples are once images are expanded, and how much of the batches is padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from medmoe_jax.config import DataConfig
from medmoe_jax.data import merge, templates, tokens
from medmoe_jax.data.check import sample_fault
from medmoe_jax.data.check.findings import ERROR, Finding, kind_of
from medmoe_jax.data.check.rows import Row
from medmoe_jax.data.problems import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEED = 0  # of the order in which batches are drawn


def measure(
    rows: Sequence[Row], cfg: DataConfig, tokenizer: PreTrainedTokenizerBase, n_patches: int
) -> tuple[np.ndarray, list[Finding]]:
    """i64[N], tokens of each row with its images, 0 where it cannot be rendered; and the rows that
    training would refuse."""
    lengths, findings = np.zeros(len(rows), np.int64), []
    for place, row in enumerate(rows):
        sample = row.sample
        fault = sample_fault(sample, cfg, tokenizer, n_patches)
        if fault:
            kind = kind_of(fault, "unusable row")
            findings.append(Finding(ERROR, kind, sample.file, sample.row, sample.id, fault))
        try:
            spans = templates.render(cfg.template, sample.turns)
        except DataError:
            continue
        lengths[place] = merge.merged_length(tokens.encode(spans, tokenizer).ids, n_patches)
    return lengths, findings


def padding(lengths: np.ndarray, cfg: DataConfig, batch_size: int) -> dict[str, Any]:
    """Share of all places of the batches that hold no token, 0 to 1.

    Args:
      lengths: of the rows, tokens; those above max_length are left out, as in training.
      cfg: buckets and max_length.
      batch_size: rows of a micro-batch.

    Returns:
      `buckets`: share for batches drawn at random, each as long as the bucket of its longest row;
      `packed`: share where rows of max_length tokens are filled with several samples, the longest
      first, each into the fullest row with room; `rows`: samples of each bucket.
    """
    used = lengths[(lengths > 0) & (lengths <= cfg.max_length)]
    sizes = np.array([b for b in sorted(cfg.buckets) if b < cfg.max_length] + [cfg.max_length])
    if not used.size:
        return {"buckets": None, "packed": None, "rows": {}}
    order = np.random.default_rng(SEED).permutation(used)
    whole = order[: len(order) // batch_size * batch_size] if len(order) >= batch_size else order
    batches = whole.reshape(-1, min(batch_size, len(whole)))
    longest = sizes[np.searchsorted(sizes, batches.max(1))]
    places = int((longest * batches.shape[1]).sum())
    counts = np.bincount(np.searchsorted(sizes, used), minlength=len(sizes))
    rows = _packed_rows(used, cfg.max_length)
    return {
        "buckets": 1 - int(batches.sum()) / places,
        "packed": 1 - int(used.sum()) / (rows * cfg.max_length),
        "rows": {int(size): int(count) for size, count in zip(sizes, counts, strict=True)},
    }


def _packed_rows(lengths: np.ndarray, size: int) -> int:
    """Rows of `size` that hold all samples: the best fit for each, from the longest down.

    Rows are counted by the room they have left, so that the time does not grow with their number.
    """
    room = np.zeros(size + 1, np.int64)
    rows = 0
    for length in np.sort(lengths)[::-1].tolist():
        fitting = np.flatnonzero(room[length:])
        if fitting.size:
            left = int(fitting[0]) + length
            room[left] -= 1
        else:
            left, rows = size, rows + 1
        room[left - length] += 1
    return rows
