"""How many places every sample takes, known before any batch is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from medmoe_jax.data import templates
from medmoe_jax.data.problems import DataError
from medmoe_jax.data.sources import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOGETHER = 1000  # samples tokenised at once, on all cores


def sample_lengths(
    samples: Sequence[Sample], template: str, tokenizer: PreTrainedTokenizerBase, n_patches: int
) -> np.ndarray:
    """Places of every sample, its images expanded, as `merge.expand` makes them.

    Args:
      samples: rows.
      template: one of `templates.TEMPLATES`.
      tokenizer: from `tokens.load_tokenizer`.
      n_patches: places one image takes.

    Returns:
      i64[N], 0 where the template cannot hold the sample.
    """
    lengths = np.zeros(len(samples), np.int64)
    for start in range(0, len(samples), TOGETHER):
        texts: list[str] = []  # between images; tokenised as in `tokens.encode`
        owners: list[int] = []
        for place, sample in enumerate(samples[start : start + TOGETHER], start):
            try:
                spans = templates.render(template, sample.turns)
            except DataError:
                continue
            parts = "".join(span.text for span in spans).split(templates.IMAGE_TOKEN)
            lengths[place] = (len(parts) - 1) * n_patches
            texts += parts
            owners += [place] * len(parts)
        if texts:
            ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False).input_ids
            np.add.at(lengths, owners, [len(part) for part in ids])
    return lengths
