"""Rows of sample numbers -> the arrays of a batch: text tokenised, images decoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from medmoe_jax.config import DataConfig
from medmoe_jax.data import merge, templates, tokens
from medmoe_jax.data.check import sample_fault
from medmoe_jax.data.image_store import ImageStore
from medmoe_jax.data.order import Order
from medmoe_jax.data.problems import DataError, Problem
from medmoe_jax.data.sources import UNKNOWN, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_ROW = -1


@dataclass
class Collator:
    """Number of a batch -> (that number, the part of the batch that is read here, problems).

    Only the samples of this part are tokenised and decoded.
    """

    samples: Sequence[Sample]
    tokenizer: PreTrainedTokenizerBase
    images: ImageStore
    edge: int  # pixels of an image
    n_patches: int
    cfg: DataConfig
    order: Order
    process_index: int
    process_count: int
    drop_empty: bool  # {} in place of a batch that has no usable sample

    def __post_init__(self) -> None:
        counts = np.array([len(sample.images) for sample in self.samples])
        self.images_a_row = self.order.images_a_row(counts)
        self.samples_a_row = self.order.samples_a_row()

    def __call__(self, number: int) -> tuple[int, dict[str, np.ndarray], list[Problem]]:
        rows, length = self.order.batch(number)
        local = self.order.batch_size // self.process_count
        rows = rows[self.process_index * local : (self.process_index + 1) * local]
        shape = (local, self.images_a_row, self.edge, self.edge, 3)
        images = np.zeros(shape, np.uint8)
        source = np.full((local, self.samples_a_row), NO_ROW, np.int64)
        modality = np.full((local, self.samples_a_row), UNKNOWN, np.int32)
        texts: list[list[merge.Merged]] = [[] for _ in range(local)]
        problems = []
        for place, row in enumerate(rows):
            shown = 0
            for i in row.tolist():
                sample = self.samples[i]
                try:
                    text, pixels = self._text(sample), self.images.read(sample)
                except DataError as error:
                    problems.append(Problem(sample.file, sample.row, sample.id, str(error)))
                    continue
                for picture in pixels:
                    images[place, shown] = picture
                    shown += 1
                at = len(texts[place])
                source[place, at], modality[place, at] = i, sample.modality
                texts[place].append(text)
        if self.drop_empty and (source == NO_ROW).all():
            return number, {}, problems
        if self.order.mode == "pack":
            batch = merge.pack_rows(texts, length)
        else:
            batch = merge.pad_rows([merge.join(samples) for samples in texts], length)
            source, modality = source[:, 0], modality[:, 0]
        return number, batch | {"images": images, "modality": modality, "row": source}, problems

    def _text(self, sample: Sample) -> merge.Merged:
        """The sample in merged coordinates. Raises DataError where it cannot be used."""
        spans = templates.render(self.cfg.template, sample.turns)
        text = merge.expand(*tokens.encode(spans, self.tokenizer), self.n_patches)
        if len(text.tokens) > self.cfg.max_length or (text.labels == tokens.IGNORE).all():
            fault = sample_fault(sample, self.cfg, self.tokenizer, self.n_patches)
            raise DataError(fault or "no token to learn in its answers")
        return text
