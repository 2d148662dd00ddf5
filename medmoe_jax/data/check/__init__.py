"""Data files -> rows that are known to be usable, before any image is decoded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from medmoe_jax.config import DataConfig
from medmoe_jax.data import merge, templates, tokens
from medmoe_jax.data.problems import DataError, Problem, settle
from medmoe_jax.data.sources import Loaded, Sample, read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_samples(
    files: Sequence[str | Path],
    cfg: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    n_patches: int,
) -> Loaded:
    """Reads files and checks every row as far as possible without decoding images.

    Args:
      files: usually `cfg.files` or `cfg.eval_files`.
      cfg: image folder, template, max_length and on_error are used.
      tokenizer: from `tokens.load_tokenizer`.
      n_patches: places one image takes.

    Returns:
      Usable rows, the problems of all others (only with on_error='skip'), and counts of notes.

    Raises:
      DataError: on_error='error' and some row has a problem, all of them in one message.
    """
    templates.check_template(cfg.template)
    read = read_rows(files, cfg.image_folder)
    checked = Loaded([], read.problems, read.notes)
    for sample in read.samples:
        fault = sample_fault(sample, cfg, tokenizer, n_patches)
        if fault:
            checked.problems.append(Problem(sample.file, sample.row, sample.id, fault))
        else:
            checked.samples.append(sample)
    settle(checked.problems, cfg.on_error, checked.total)
    return checked


def sample_fault(
    sample: Sample, cfg: DataConfig, tokenizer: PreTrainedTokenizerBase, n_patches: int
) -> str:
    """Why the sample's text cannot be used: template, length, or nothing to learn; '' if it can.

    A byte-level tokenizer makes at most one token of a byte, so most samples are seen to be short
    enough without tokenising them. Over-long samples are never cut: the official collator cuts the
    text at `model_max_length` before images are expanded, which drops answers silently.
    """
    try:
        spans = templates.render(cfg.template, sample.turns)
    except DataError as error:
        return str(error)
    if not any(span.answer for span in spans):
        return "no answer to learn from"
    most = sum(len(span.text.encode()) for span in spans) + len(sample.images) * n_patches
    if most > cfg.max_length:
        length = merge.merged_length(tokens.encode(spans, tokenizer).ids, n_patches)
        if length > cfg.max_length:
            return (
                f"{length} places with its {len(sample.images)} image(s), max_length is "
                f"{cfg.max_length} (--config.data.max_length)"
            )
    return ""
