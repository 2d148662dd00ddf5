"""What is looked at: conversations with their answers, as rows of tokens and as batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medmoe_jax import generate
from medmoe_jax.config import MODALITIES
from medmoe_jax.data import merge, templates, tokens
from medmoe_jax.data.image_store import ImageStore
from medmoe_jax.data.problems import DataError
from medmoe_jax.data.sources import UNKNOWN, Sample
from medmoe_jax.responder import Responder

KINDS = ("image", "question", "answer")  # of tokens; the template's words belong to the question
PADDING = len(KINDS)  # kind of a place that holds no token


@dataclass(frozen=True)
class Row:
    """One conversation.

    Attributes:
      merged: its tokens; labels mark the answers.
      pixels: uint8[K, H, W, 3].
      modality: index in config.MODALITIES, UNKNOWN without a label.
    """

    merged: merge.Merged
    pixels: np.ndarray
    modality: int = UNKNOWN


def kinds(batch: dict[str, np.ndarray]) -> np.ndarray:
    """Kind of every place of a batch with labels: i32[B, T], index in KINDS, or PADDING."""
    found = np.where(batch["labels"] != tokens.IGNORE, KINDS.index("answer"), 1)
    found = np.where(batch["image_pos"] >= 0, KINDS.index("image"), found)
    return np.where(batch["mask"], found, PADDING).astype(np.int32)


def of_sample(model: Responder, sample: Sample, store: ImageStore) -> Row:
    """A row of data, with all its answers, as training sees it.

    Raises:
      DataError: an image cannot be read, or it does not fit the model.
    """
    spans = templates.render(model.template, sample.turns)
    merged = merge.expand(
        *tokens.encode(spans, model.tokenizer), n_patches=model.config.vision.patches
    )
    model.check_length(len(merged.tokens) - 1)
    shown, edge = store.read(sample), model.spec.crop
    pixels = np.stack(shown) if shown else np.zeros((0, edge, edge, 3), np.uint8)
    return Row(merged, pixels, sample.modality)


def of_answer(model: Responder, question: str, pixels: np.ndarray, answer: Sequence[int]) -> Row:
    """A prompt with an answer behind it, given as ids.

    Raises:
      DataError: it does not fit the model.
    """
    text = templates.prompt(model.template, question, len(pixels))
    prompt = tokens.encode_prompt(text, model.tokenizer)
    labels = [tokens.IGNORE] * len(prompt) + list(answer)
    merged = merge.expand([*prompt, *answer], labels, model.config.vision.patches)
    model.check_length(len(merged.tokens) - 1)
    return Row(merged, pixels)


def batch(rows: Sequence[Row], size: int = 0) -> dict[str, np.ndarray]:
    """Right-padded arrays of static size, filled up to `size` rows.

    Returns:
      tokens, image_pos, labels i32[B, T], mask bool[B, T], modality i32[B], and images
      uint8[B, K, H, W, 3] unless no row has one.
    """
    many = max(size, len(rows))
    length = generate.bucket(max(len(row.merged.tokens) for row in rows))
    nothing = merge.expand([], None, 1)
    found = merge.pad_rows([row.merged for row in rows] + [nothing] * (many - len(rows)), length)
    found["modality"] = np.full(many, UNKNOWN, np.int32)
    found["modality"][: len(rows)] = [row.modality for row in rows]
    most = max(len(row.pixels) for row in rows)
    if most:
        found["images"] = np.zeros((many, most, *rows[0].pixels.shape[1:]), np.uint8)
        for place, row in enumerate(rows):
            found["images"][place, : len(row.pixels)] = row.pixels
    return found


def batches(rows: Iterable[Row], size: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches of `size` rows in their order; the last one is filled up with padding."""
    waiting: list[Row] = []
    for row in rows:
        waiting.append(row)
        if len(waiting) == size:
            yield batch(waiting, size)
            waiting = []
    if waiting:
        yield batch(waiting, size)


def draw(samples: Sequence[Sample], n: int, seed: int) -> list[Sample]:
    """At most `n` samples at random, of each modality as many as of the others where it has them.

    Args:
      samples: rows with and without a modality.
      n: how many; 0 = all, as they are.
      seed: same seed, same rows.
    """
    if not n or n >= len(samples):
        return list(samples)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(samples)).tolist()
    groups: dict[int, list[int]] = {m: [] for m in (*range(len(MODALITIES)), UNKNOWN)}
    for i in order:
        groups[samples[i].modality].append(i)
    # The first of every modality, then the second of every modality, ...
    turns = sorted((turn, m, i) for m, own in groups.items() for turn, i in enumerate(own))
    return [samples[i] for i in sorted(i for _, _, i in turns[:n])]


def find(samples: Sequence[Sample], name: str) -> Sample:
    """The sample with this id, or else the one at this place (from 0).

    Raises:
      DataError: there is none.
    """
    for sample in samples:
        if sample.id == name:
            return sample
    if name.isdecimal() and int(name) < len(samples):
        return samples[int(name)]
    raise DataError(
        f"no row has the id {name!r}, and it is no number below {len(samples)}; ids are like "
        f"{samples[0].id!r} in {Path(samples[0].file).name}"
    )
