"""How samples of known lengths become rows, rows become batches, and what batches are padded to."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

STEP = 64  # places: chosen lengths of batches are multiples of it


def fill_rows(sizes: np.ndarray, room: int) -> list[list[int]]:
    """Puts samples into as few rows as best-fit decreasing finds.

    Args:
      sizes: i64[N], places of each sample, at most `room`.
      room: places of a row.

    Returns:
      For each row the numbers of its samples, longest first; samples of equal length keep their
      order, so that shuffled samples meet others in every epoch.
    """
    rows: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (places left, row), ascending
    for sample in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[sample])
        at = bisect_left(spaces, (size, -1))
        if at == len(spaces):
            left, row = room, len(rows)
            rows.append([])
        else:
            left, row = spaces.pop(at)
        rows[row].append(sample)
        insort(spaces, (left - size, row))
    return rows


def order_rows(
    sizes: np.ndarray, batch: int, begun: int, window: int, rng: np.random.Generator
) -> np.ndarray:
    """Shuffles rows so that those of one batch are of like length.

    Inside a window of batches the rows are sorted by length; then the batches are shuffled. The
    rows that complete the batch which the epoch before has begun, and those that begin the batch
    which the next epoch completes, are of middle length, so that they match.

    Args:
      sizes: i64[R], places of each row.
      batch: rows of a batch.
      begun: rows of the first batch that are there already.
      window: batches whose rows are sorted together.
      rng: of the order.

    Returns:
      i64[R], the rows in their order.
    """
    kind = -(-sizes // STEP)  # finer differences are left to chance
    order = rng.permutation(len(sizes))
    head = min(-begun % batch, len(order))
    edges = head + (len(order) - head) % batch
    middling = np.abs(kind - np.median(kind))[order]
    first = np.argsort(middling, kind="stable")
    border, body = order[first[:edges]], order[np.sort(first[edges:])]
    for start in range(0, len(body), window * batch):
        part = body[start : start + window * batch]
        part[:] = part[np.argsort(kind[part], kind="stable")]
    body = body.reshape(-1, batch)[rng.permutation(len(body) // batch)].ravel()
    return np.concatenate([border[:head], body, border[head:]])


def choose_lengths(longest: Sequence[int], most: int) -> list[int]:
    """The lengths, at most `most`, to which batches are padded: few places are wasted.

    Starting from the multiples of STEP that fit best, the length that saves least is left out until
    few enough remain.

    Args:
      longest: places of the longest row of each batch.
      most: each length is a compilation.

    Returns:
      Ascending; the last one holds every batch.
    """
    fitting, count = np.unique(-(-np.asarray(longest) // STEP) * STEP, return_counts=True)
    lengths, counts = fitting.tolist(), count.tolist()
    while len(lengths) > most:
        costs = [
            n * (longer - length)
            for length, longer, n in zip(lengths, lengths[1:], counts, strict=False)
        ]
        least = int(np.argmin(costs))
        counts[least] += counts.pop(least + 1)  # they go to the next one
        lengths.pop(least)
    return lengths


def shares(weights: Sequence[float], total: int) -> list[int]:
    """Splits `total` in proportion to `weights`, by largest remainder; the parts sum to it."""
    exact = total * np.asarray(weights, np.float64) / np.sum(weights)
    parts = np.floor(exact).astype(np.int64)
    parts[np.argsort(parts - exact, kind="stable")[: total - int(parts.sum())]] += 1
    return parts.tolist()
