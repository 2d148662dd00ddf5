"""Samples -> batches: a pure function of (seed, batch number), read ahead by Grain.

`order.py` says which samples stand where, `collate.py` makes the arrays. A batch depends on its
number alone, so the state to save is that number, and a run that is resumed sees the same batches
whatever the number of workers or processes. In training the batches are endless, and each epoch has
every sample once (or, with weights, the share of each set). In evaluation the samples come once, in
order, and the last batch is filled with rows of padding.

A row holds one sample, or several with `data.batching = 'pack'`. A row of padding has row -1,
modality -1, mask False, labels -100 and black images. In 'skip' mode a sample whose image turns out
to be broken leaves its place empty, so that the stream does not shift.
"""

from __future__ import annotations

import hashlib
import signal
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grain
import numpy as np
from absl import flags

from medmoe_jax.config import DataConfig
from medmoe_jax.data.collate import Collator
from medmoe_jax.data.image_store import ImageStore
from medmoe_jax.data.images import ImageSpec
from medmoe_jax.data.lengths import sample_lengths
from medmoe_jax.data.order import Order, plan
from medmoe_jax.data.problems import DataError, Problem, settle
from medmoe_jax.data.sources import Sample, belongs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CACHE_BYTES = 2 << 30  # decoded images kept in memory, if all of them fit
ENDLESS = 10**9  # batches
GRACE = 300  # seconds that a worker outlives SIGTERM


class Batches:
    """Iterator over batches with a state that can be saved; made by `build`."""

    def __init__(
        self,
        dataset: grain.MapDataset,
        order: Order,
        cfg: DataConfig,
        identity: dict[str, int | str],
        rows: int,
    ):
        self.order = order
        self._rows = rows
        self._dataset = dataset
        self._cfg = cfg
        self._identity = identity
        self._next = 0
        self._iterator: grain.DatasetIterator | None = None
        self._stop: weakref.finalize | None = None
        self._found: dict[Problem, None] = {}  # a set that keeps the order

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        """The next batch (the Batch of this process; `row` has the numbers of the samples).

        Raises:
          DataError: an image cannot be read (on_error='error'); names file, row, id and image.
            Or no row of all can be used (on_error='skip').
        """
        if self._iterator is None:
            self._iterator = self._start()
            # Also runs when the program ends; Grain's own cleaning up would come too late then.
            self._stop = weakref.finalize(self, self._iterator.close)
        while True:
            number, batch, problems = next(self._iterator)
            settle(problems, self._cfg.on_error)
            self._found |= dict.fromkeys(problems)
            self._next = number + 1
            if batch and self._cfg.workers:  # out of the shared memory that Grain takes back
                return {key: np.array(value) for key, value in batch.items()}
            if batch:
                return batch
            if len({(problem.file, problem.row) for problem in self._found}) == self._rows:
                settle(self.problems, self._cfg.on_error, self._rows)

    @property
    def problems(self) -> list[Problem]:
        """Rows found unusable up to this place in the stream ('skip' mode), each once."""
        return list(self._found)

    def _start(self) -> grain.DatasetIterator:
        dataset = self._dataset[self._next :].to_iter_dataset(
            grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        )
        if self._cfg.workers and not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain's workers read absl flags, also outside absl.app
        options = grain.multiprocessing.MultiprocessingOptions(num_workers=self._cfg.workers)
        return iter(dataset.mp_prefetch(options, _outlive_sigterm))

    def get_state(self) -> dict[str, Any]:
        """JSON-able state: number of the next batch, problems so far, and what the stream is of."""
        found = [asdict(problem) for problem in self._found]
        return {"next_batch": self._next, "problems": found} | self._identity

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken.

        Raises:
          DataError: the state belongs to other data, or to other settings of the order.
        """
        for key, value in self._identity.items():
            if state.get(key) != value:
                raise DataError(
                    f"the saved data position has {key} {state.get(key)!r}, this run {value!r}; "
                    "resume with the data files and settings of the first run, or start in a new "
                    "--workdir"
                )
        self.close()
        self._next = int(state["next_batch"])
        self._found = {Problem(**problem): None for problem in state.get("problems", ())}

    def close(self) -> None:
        """Stops reading ahead; the iterator can be used again."""
        if self._stop is not None:
            self._stop()
        self._iterator = self._stop = None


def _outlive_sigterm(_worker: int, _count: int) -> None:
    """Run in each worker. A cluster sends SIGTERM to all processes of a run; the main one, which
    finishes its step and saves, may still wait for a batch. It ends its workers itself."""
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE) and None)


def build(
    samples: Sequence[Sample],
    tokenizer: PreTrainedTokenizerBase,
    spec: ImageSpec,
    n_patches: int,
    cfg: DataConfig,
    batch_size: int,
    seed: int,
    train: bool = True,
    process_index: int = 0,
    process_count: int = 1,
    cache_bytes: int = CACHE_BYTES,
) -> Batches:
    """Batches of one micro-step each.

    Args:
      samples: usable rows (`load_samples`).
      tokenizer: from `tokens.load_tokenizer`.
      spec: size and padding of images.
      n_patches: places one image takes.
      cfg: everything but eval_files and labels_per_modality is used.
      batch_size: rows of one micro-batch, over all processes.
      seed: of the order in training, 0 <= seed < 2**32.
      train: True: endless, in the order of `cfg.batching`; False: once, in order, a sample a row,
        the last batch filled with padding.
      process_index: which equal part of each batch is read here.
      process_count: number of parts.
      cache_bytes: decoded images are kept in memory if all of them fit; 0 = never.

    Returns:
      Iterator over Batches (dict of numpy arrays) with B = batch_size // process_count rows, T the
      smallest length of batches that holds the longest row of all processes, and K the largest
      number of images in any row: tokens, image_pos, labels i32[B, T], mask bool[B, T], images
      u8[B, K, H, W, 3], modality i32[B], row i64[B] (number of the sample). Packed rows have
      segments and positions i32[B, T] (`merge.pack_rows`), and modality and row of P samples,
      [B, P], -1 where there are fewer.

    Raises:
      DataError: no samples, a setting that cannot work, or batch_size is no multiple of
        process_count.
    """
    if not samples:
        raise DataError("no samples to make batches of")
    if batch_size < 1 or batch_size % process_count or not 0 <= process_index < process_count:
        raise DataError(
            f"batch_size {batch_size} cannot be divided among {process_count} processes "
            f"(this is number {process_index})"
        )
    lengths = sample_lengths(samples, cfg.template, tokenizer, n_patches)
    lengths[lengths > cfg.max_length] = 0  # reading it tells that it is too long
    order = plan(
        lengths,
        belongs(samples, cfg.files) if cfg.weights else (),
        cfg.weights,
        mode=cfg.batching,
        batch_size=batch_size,
        seed=seed,
        room=cfg.max_length,
        buckets=cfg.buckets,
        most_buckets=cfg.most_buckets,
        train=train,
    )
    different = len({(sample.file, name) for sample in samples for name in sample.images})
    keep = different * spec.crop**2 * 3 * max(1, cfg.workers) <= cache_bytes
    collator = Collator(
        samples,
        tokenizer,
        ImageStore(cfg.image_folder, spec, keep),
        spec.crop,
        n_patches,
        cfg,
        order,
        process_index,
        process_count,
        drop_empty=train and process_count == 1,
    )
    count = ENDLESS if train else order.batches(1)
    return Batches(
        grain.MapDataset.range(count).map(collator),
        order,
        cfg,
        {"seed": seed, "batch_size": batch_size, "batching": order.mode}
        | {"digest": _digest(samples, order)},
        len({(sample.file, sample.row) for sample in samples}),
    )


def _digest(samples: Sequence[Sample], order: Order) -> str:
    """What else the order is made from: samples, lengths, room, and sets with their shares."""
    digest = hashlib.sha256(f"{order.room} {order.shares}\n".encode())
    for sample, length in zip(samples, order.lengths.tolist(), strict=True):
        digest.update(f"{Path(sample.file).name}:{sample.row}:{sample.id}:{length}\n".encode())
    return digest.hexdigest()
