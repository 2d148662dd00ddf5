"""Merged coordinates: every image takes the places of its patches in the token sequence.

Source: `prepare_inputs_labels_for_multimodal` of Med-MoE, without its embedding step: the model
puts patch embedding `image_pos` where `image_pos >= 0` and the embedding of `tokens` elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from medmoe_jax.data.problems import DataError
from medmoe_jax.data.tokens import IGNORE, IMAGE_ID


class Merged(NamedTuple):
    """One row in merged coordinates, not padded; T = text tokens + images * patches."""

    tokens: np.ndarray  # i32[T], 0 at image places
    image_pos: np.ndarray  # i32[T], image * patches + patch, -1 at text places
    labels: np.ndarray  # i32[T], -100 = no loss


def merged_length(ids: Sequence[int], n_patches: int) -> int:
    """Places the ids take once every image is expanded."""
    return len(ids) + list(ids).count(IMAGE_ID) * (n_patches - 1)


def expand(ids: Sequence[int], labels: Sequence[int] | None, n_patches: int) -> Merged:
    """Replaces every IMAGE_ID by the places of one image.

    Args:
      ids: token ids of one row, IMAGE_ID = an image.
      labels: one an id, or None for -100 everywhere. Labels of image places are -100.
      n_patches: patches of one image.

    Raises:
      DataError: ids and labels differ in length, or there is a negative id.
    """
    flat = np.asarray(ids, np.int64)
    targets = np.full(flat.shape, IGNORE) if labels is None else np.asarray(labels, np.int64)
    if flat.ndim != 1 or targets.shape != flat.shape:
        raise DataError(f"ids {flat.shape} and labels {targets.shape} must be two equal lists")
    is_image = flat == IMAGE_ID
    if (flat[~is_image] < 0).any():
        raise DataError(f"negative token id {flat[~is_image].min()}; only {IMAGE_ID} has a meaning")
    repeats = np.where(is_image, n_patches, 1)
    image = np.repeat(is_image, repeats)
    image_pos = np.where(image, np.cumsum(image) - 1, -1)
    return Merged(
        np.where(image, 0, np.repeat(flat, repeats)).astype(np.int32),
        image_pos.astype(np.int32),
        np.where(image, IGNORE, np.repeat(targets, repeats)).astype(np.int32),
    )


def pad_rows(rows: Sequence[Merged], length: int) -> dict[str, np.ndarray]:
    """Stacks rows, padded on the right.

    Args:
      rows: B rows; an empty one becomes a row of padding.
      length: T, at least the longest row.

    Returns:
      tokens, image_pos, labels i32[B, T] and mask bool[B, T] of a Batch.

    Raises:
      DataError: a row is longer than `length`.
    """
    shape = (len(rows), length)
    batch = {
        "tokens": np.zeros(shape, np.int32),
        "image_pos": np.full(shape, -1, np.int32),
        "labels": np.full(shape, IGNORE, np.int32),
        "mask": np.zeros(shape, bool),
    }
    for number, row in enumerate(rows):
        size = len(row.tokens)
        if size > length:
            raise DataError(f"row {number} has {size} places, the batch only {length}")
        batch["tokens"][number, :size] = row.tokens
        batch["image_pos"][number, :size] = row.image_pos
        batch["labels"][number, :size] = row.labels
        batch["mask"][number, :size] = True
    return batch


def join(samples: Sequence[Merged]) -> Merged:
    """Several samples one behind the other in a row; their images are counted through.

    The first label of each sample is -100: nothing stands before it that could predict it, and the
    end of the sample in front must not learn to.
    """
    if not samples:
        return expand([], None, 1)
    places = [int((sample.image_pos >= 0).sum()) for sample in samples]
    labels = [sample.labels.copy() for sample in samples]
    for part in labels:
        part[:1] = IGNORE
    positions = [
        np.where(sample.image_pos >= 0, sample.image_pos + before, -1)
        for sample, before in zip(samples, np.cumsum([0, *places[:-1]]), strict=True)
    ]
    return Merged(
        np.concatenate([sample.tokens for sample in samples]),
        np.concatenate(positions).astype(np.int32),
        np.concatenate(labels),
    )


def pack_rows(rows: Sequence[Sequence[Merged]], length: int) -> dict[str, np.ndarray]:
    """Stacks rows that hold several samples each, padded on the right.

    Args:
      rows: B rows, each the samples that stand in it; one without any becomes padding.
      length: T, at least the longest row.

    Returns:
      What `pad_rows` returns, and i32[B, T]: segments (1, 2, ... by sample, 0 for padding) and
      positions (0, 1, ... in each sample; padding goes on counting).

    Raises:
      DataError: a row is longer than `length`.
    """
    batch = pad_rows([join(samples) for samples in rows], length)
    segments = np.zeros((len(rows), length), np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (len(rows), 1))
    for row, samples in enumerate(rows):
        start = 0
        for number, sample in enumerate(samples, 1):
            size = len(sample.tokens)
            segments[row, start : start + size] = number
            positions[row, start:] = np.arange(length - start)
            start += size
    return batch | {"segments": segments, "positions": positions}


def from_official(
    input_ids: np.ndarray,
    attention_mask: np.ndarray | None,
    labels: np.ndarray | None,
    pixel_values: np.ndarray | None,
    n_patches: int,
    image_size: int,
) -> dict[str, np.ndarray]:
    """A Batch from the arrays that the official model's forward takes.

    Args:
      input_ids: i64[B, S], -200 = an image.
      attention_mask: bool[B, S], False = left out; None = all True.
      labels: i64[B, S], -100 = no loss; None = no loss anywhere.
      pixel_values: f32[N, 3, H, W] normalised images in row order, one unused entry for each row
        without an image token; None where no row has one.
      n_patches: patches of one image.
      image_size: H = W, pixels.

    Returns:
      A Batch whose length is that of the longest row, images f32[B, K, H, W, 3], modality -1, row
      0..B-1.

    Raises:
      DataError: shapes do not fit, or the number of images is not what the rows need.
    """
    used = np.ones(input_ids.shape, bool) if attention_mask is None else attention_mask.astype(bool)
    targets = np.full(input_ids.shape, IGNORE) if labels is None else labels
    if input_ids.ndim != 2 or used.shape != input_ids.shape or targets.shape != input_ids.shape:
        raise DataError(
            f"input_ids {input_ids.shape}, attention_mask {used.shape} and labels {targets.shape} "
            "must be three arrays of one shape [B, S]"
        )
    rows = [
        expand(ids[keep], target[keep], n_patches)
        for ids, target, keep in zip(input_ids, targets, used, strict=True)
    ]
    batch = pad_rows(rows, max(len(row.tokens) for row in rows))
    counts = ((input_ids == IMAGE_ID) & used).sum(axis=1)
    if pixel_values is None:
        pixel_values = np.zeros((int(np.maximum(counts, 1).sum()), 3, image_size, image_size))
        if counts.any():
            raise DataError(f"{int(counts.sum())} image tokens, but pixel_values is missing")
    expected = (int(np.maximum(counts, 1).sum()), 3, image_size, image_size)
    if pixel_values.shape != expected:
        raise DataError(
            f"pixel_values has shape {pixel_values.shape}; the image tokens need {expected} (one "
            "entry an image token, and one for each row without any)"
        )
    images = np.zeros((len(rows), max(1, int(counts.max())), image_size, image_size, 3), np.float32)
    first = 0
    for number, count in enumerate(counts):
        images[number, :count] = pixel_values[first : first + count].transpose(0, 2, 3, 1)
        first += max(1, int(count))
    return batch | {
        "images": images,
        "modality": np.full(len(rows), -1, np.int32),
        "row": np.arange(len(rows), dtype=np.int64),
    }
