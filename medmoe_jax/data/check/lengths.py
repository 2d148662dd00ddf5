"""How long samples are once images are expanded, and how much of the batches is padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from medmoe_jax.config import DataConfig
from medmoe_jax.data import order
from medmoe_jax.data.check import sample_fault
from medmoe_jax.data.check.findings import ERROR, Finding, kind_of
from medmoe_jax.data.check.rows import Row
from medmoe_jax.data.lengths import sample_lengths

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEED = 0  # of the order of samples


def measure(
    rows: Sequence[Row], cfg: DataConfig, tokenizer: PreTrainedTokenizerBase, n_patches: int
) -> tuple[np.ndarray, list[Finding]]:
    """i64[N], tokens of each row with its images, 0 where it cannot be rendered; and the rows that
    training would refuse."""
    findings = []
    for row in rows:
        sample = row.sample
        fault = sample_fault(sample, cfg, tokenizer, n_patches)
        if fault:
            kind = kind_of(fault, "unusable row")
            findings.append(Finding(ERROR, kind, sample.file, sample.row, sample.id, fault))
    samples = [row.sample for row in rows]
    return sample_lengths(samples, cfg.template, tokenizer, n_patches), findings


def padding(lengths: np.ndarray, cfg: DataConfig, batch_size: int) -> dict[str, Any]:
    """How much of the batches of an epoch holds no token.

    Args:
      lengths: of the rows, tokens; those above max_length are left out, as in training.
      cfg: batching, buckets and max_length; `pack` fills rows of max_length.
      batch_size: rows of a micro-batch.

    Returns:
      `waste`: way of batching -> share of all places, 0 to 1; `batching`: the configured one;
      `rows`: length that its batches are padded to -> samples that need no longer one. `waste` and
      `rows` are empty without a usable sample.
    """
    used = lengths[(lengths > 0) & (lengths <= cfg.max_length)]
    waste, counts = {}, {}
    for mode in order.MODES if used.size else ():
        plan = order.plan(
            used,
            [np.arange(len(used))],
            (),
            mode=mode,
            batch_size=batch_size,
            seed=SEED,
            room=cfg.max_length,
            buckets=cfg.buckets,
            most_buckets=cfg.most_buckets,
            train=True,
        )
        held = places = 0
        for number in range(plan.batches(1)):
            rows, length = plan.batch(number)
            held += int(used[np.concatenate(rows)].sum())
            places += length * len(rows)
        waste[mode] = 1 - held / places
        if mode == cfg.batching:
            sizes = np.array(plan.buckets)
            needed = np.bincount(np.searchsorted(sizes, used), minlength=len(sizes))
            counts = {int(s): int(n) for s, n in zip(sizes, needed, strict=True)}
    return {"batching": cfg.batching, "waste": waste, "rows": counts}
