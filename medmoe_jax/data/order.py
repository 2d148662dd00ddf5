"""Which samples stand in which row of which batch, for every batch of an endless run.

A pure function of the samples' lengths, the seed and the number of the batch, the same in every
process and whatever the number of processes.

One epoch draws as many samples as there are. Without weights it is every sample once. With weights
each set of samples gives its share of the epoch, exact to the sample, and goes through its own
rounds: every sample of a set is drawn before any of it is drawn again, so a small set with a large
weight comes round several times an epoch and a large one with a small weight takes several epochs.

The samples drawn are shuffled and become rows: one sample each, or several ('pack'). Rows become
batches by chance ('shuffle') or so that those of a batch are of like length ('group', 'pack').
Batches run across the border between epochs, so no row is left out.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from medmoe_jax.data import packing
from medmoe_jax.data.problems import DataError

MODES = ("shuffle", "group", "pack")
PACKED = 2048  # samples whose rows are filled together
WINDOW = 32  # batches whose rows are sorted by length together
_DRAW, _SHUFFLE, _ROWS = range(3)  # what a random number generator is for


class Rows(NamedTuple):
    """The rows of an epoch, in their order."""

    samples: list[np.ndarray]  # of each row, the numbers of its samples
    sizes: np.ndarray  # i64[R], places of each row


@dataclass
class Order:
    """Batch number -> rows. `plan` checks the settings and makes one."""

    lengths: np.ndarray  # i64[N], places of each sample
    sets: tuple[np.ndarray, ...]  # the numbers of each set's samples
    shares: tuple[int, ...]  # samples that each set gives to an epoch
    mode: str  # one of MODES
    batch_size: int  # rows of a batch
    seed: int
    room: int  # most places of a row
    buckets: tuple[int, ...]  # lengths of batches, ascending; the last one is `room`
    train: bool  # False: once, in order, a sample a row
    _starts: list[int] = field(default_factory=lambda: [0])  # of each epoch, its first row
    _recent: dict[int, Rows] = field(default_factory=dict)  # of the last two epochs asked for

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_recent": {}}  # a worker process makes its own

    def batch(self, number: int) -> tuple[list[np.ndarray], int]:
        """The rows of a batch, each the numbers of its samples, and the length to pad them to.

        Only the last batch without training has fewer rows than `batch_size`.
        """
        rows, longest = self._batch(number)
        return rows, next(length for length in self.buckets if length >= longest)

    def batches(self, epochs: float) -> int:
        """How many batches hold that many epochs; the last one may go on into the next epoch."""
        whole = int(epochs)
        rows: float = self._start(whole)
        if epochs > whole:
            rows += (epochs - whole) * len(self._rows(whole).samples)
        return max(1, math.ceil(rows / self.batch_size))

    def choose_buckets(self, most: int) -> None:
        """Replaces `buckets` by at most `most` lengths that suit the batches of the first epoch,
        and `room`, which holds whatever other epochs bring."""
        longest = [self._batch(number)[1] for number in range(self.batches(1))]
        chosen = [n for n in packing.choose_lengths(longest, most) if n < self.room]
        self.buckets = (*chosen, self.room)

    def samples_a_row(self) -> int:
        """Most samples that a row of any epoch can hold."""
        if self.mode != "pack":
            return 1
        return self.room // int(self.lengths[self.lengths > 0].min(initial=self.room))

    def images_a_row(self, images: np.ndarray) -> int:
        """Most images that a row of any epoch can hold, at least 1; images: i64[N], by sample."""
        if self.mode != "pack":
            return max(1, int(images.max()))
        # No more than if it were filled with the sample that has most images for its length.
        held = self.room * images // np.maximum(self.lengths, 1)
        return max(1, int(held[self.lengths > 0].max(initial=1)))

    def _batch(self, number: int) -> tuple[list[np.ndarray], int]:
        """The rows of a batch, and the places of the longest."""
        rows: list[np.ndarray] = []
        first, last, longest = number * self.batch_size, (number + 1) * self.batch_size, 0
        epoch = self._epoch_of(first)
        while first < last and (self.train or epoch == 0):
            start, found = self._start(epoch), self._rows(epoch)
            rows += found.samples[first - start : last - start]
            longest = max(longest, int(found.sizes[first - start : last - start].max()))
            epoch += 1
            first = self._start(epoch)
        return rows, longest

    def _start(self, epoch: int) -> int:
        """Number of the epoch's first row, counted from the first epoch."""
        if self.mode != "pack":
            return epoch * sum(self.shares)
        while len(self._starts) <= epoch:  # how many rows are filled is known by filling them
            known = len(self._starts) - 1
            self._starts.append(self._starts[known] + len(self._rows(known).samples))
        return self._starts[epoch]

    def _epoch_of(self, row: int) -> int:
        if self.mode != "pack":
            return row // sum(self.shares)
        while self._starts[-1] <= row:
            self._start(len(self._starts))
        return bisect_right(self._starts, row) - 1

    def _rows(self, epoch: int) -> Rows:
        if epoch not in self._recent:
            self._recent = {n: rows for n, rows in self._recent.items() if n == epoch - 1}
            self._recent[epoch] = self._make_rows(epoch)
        return self._recent[epoch]

    def _make_rows(self, epoch: int) -> Rows:
        if not self.train:
            return Rows(list(np.arange(len(self.lengths))[:, None]), self.lengths)
        drawn = self._draw(epoch)
        if self.mode == "pack":
            rows = [
                part[filled]
                for part in np.split(drawn, range(PACKED, len(drawn), PACKED))
                for filled in packing.fill_rows(self.lengths[part], self.room)
            ]
        else:
            rows = list(drawn[:, None])
        sizes = np.array([self.lengths[row].sum() for row in rows])
        if self.mode == "shuffle":
            return Rows(rows, sizes)
        begun = self._start(epoch) % self.batch_size
        rng = self._rng(_ROWS, epoch)
        order = packing.order_rows(sizes, self.batch_size, begun, WINDOW, rng)
        return Rows([rows[row] for row in order], sizes[order])

    def _draw(self, epoch: int) -> np.ndarray:
        """i64, the samples of an epoch, shuffled."""
        parts = []
        for number, (members, share) in enumerate(zip(self.sets, self.shares, strict=True)):
            places = np.arange(epoch * share, (epoch + 1) * share)
            rounds, place = places // len(members), places % len(members)
            for one in np.unique(rounds).tolist():
                shuffled = self._rng(_DRAW, number, one).permutation(members)
                parts.append(shuffled[place[rounds == one]])
        return self._rng(_SHUFFLE, epoch).permutation(np.concatenate(parts))

    def _rng(self, *what: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, *what))


def plan(
    lengths: np.ndarray,
    sets: Sequence[np.ndarray],
    weights: Sequence[float],
    *,
    mode: str,
    batch_size: int,
    seed: int,
    room: int,
    buckets: Sequence[int],
    most_buckets: int,
    train: bool,
) -> Order:
    """The order of a run.

    Args:
      lengths: i64[N], places of each sample, at most `room`.
      sets: the numbers of each set's samples; all samples are in one of them.
      weights: of each set in an epoch; empty: every sample once an epoch.
      mode: 'shuffle', 'group' or 'pack'.
      batch_size: rows of a batch, over all processes.
      seed: 0 <= seed < 2**32.
      room: most places of a row.
      buckets: lengths of batches; empty: chosen.
      most_buckets: how many lengths to choose at most, beside `room`.
      train: False: every sample once, in order, a sample a row.

    Raises:
      DataError: settings that cannot work.
    """
    if mode not in MODES:
        raise DataError(f"data.batching {mode!r} is unknown; use one of {', '.join(MODES)}")
    if not 0 <= seed < 2**32:
        raise DataError(f"seed {seed} is not in 0..2**32-1")
    counts = [len(lengths)]
    if weights and train:
        if len(weights) != len(sets) or not all(0 < w < math.inf for w in weights):
            raise DataError(
                f"data.weights {tuple(weights)} must be one positive number for each of the "
                f"{len(sets)} data.files"
            )
        counts = packing.shares(weights, len(lengths))
        for number, (members, count) in enumerate(zip(sets, counts, strict=True)):
            if not len(members) or not count:
                raise DataError(
                    f"data.files[{number}] has {len(members)} usable rows and gives {count} to an "
                    f"epoch of {len(lengths)}; leave it out, or raise its weight in data.weights"
                )
    else:
        sets = [np.arange(len(lengths))]
    order = Order(
        lengths,
        tuple(sets),
        tuple(counts),
        mode if train else "shuffle",
        batch_size,
        seed,
        room,
        (*sorted(length for length in buckets if length < room), room),
        train,
    )
    if not buckets:
        order.choose_buckets(most_buckets)
    return order
