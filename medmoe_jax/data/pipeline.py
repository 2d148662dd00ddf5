"""Samples -> batches: a pure function of (seed, batch number), read ahead by Grain.

A batch depends on its number alone, so the state to save is that number, and a run that is resumed
sees the same batches whatever the number of workers or processes. In training the samples are
shuffled anew in every epoch and batches run across the border between epochs: in every epoch each
sample is seen exactly once and none is left out. In evaluation the samples come once, in order, and
the last batch is filled with rows of padding.

A row of padding has row -1, modality -1, mask False, labels -100 and black images. In 'skip' mode a
row whose image turns out to be broken becomes such a row too, so that the stream does not shift.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grain
import numpy as np
from absl import flags

from medmoe_jax.config import DataConfig
from medmoe_jax.data import merge, templates, tokens
from medmoe_jax.data.check import sample_fault
from medmoe_jax.data.images import ImageSpec, find_image, load_image
from medmoe_jax.data.problems import DataError, Problem, settle
from medmoe_jax.data.sources import UNKNOWN, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CACHE_BYTES = 2 << 30  # decoded images kept in memory, if all of them fit
ENDLESS = 10**9  # epochs; Grain's own infinity overflows in batches of one row
_NO_ROW = -1
_NOTHING = merge.expand([], None, 1)


@dataclass
class _BatchMaker:
    """Batch number and sample numbers -> (batch number, batch or {}, problems)."""

    samples: Sequence[Sample]
    tokenizer: PreTrainedTokenizerBase
    spec: ImageSpec
    n_patches: int
    cfg: DataConfig
    batch_size: int  # rows of all processes
    process_index: int
    process_count: int
    drop_empty: bool  # {} in place of a batch that has no usable row
    keep_images: bool
    cache: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.images_a_row = max(1, *(len(s.images) for s in self.samples))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"cache": {}}  # a worker process fills its own

    def __call__(
        self, number: int, chosen: np.ndarray
    ) -> tuple[int, dict[str, np.ndarray], list[Problem]]:
        """The part of a global batch that belongs to this process.

        All processes tokenise all rows, as all must choose the same length; each decodes only its
        own images.
        """
        rows = [self._merged(self.samples[i]) for i in chosen]
        rows += [_NOTHING] * (self.batch_size - len(rows))
        length = self._bucket(max(len(row.tokens) for row in rows))
        local = self.batch_size // self.process_count
        first = self.process_index * local
        rows, chosen = rows[first : first + local], chosen[first : first + local]
        images = np.zeros((local, self.images_a_row, self.spec.crop, self.spec.crop, 3), np.uint8)
        source = np.full(local, _NO_ROW, np.int64)
        modality = np.full(local, UNKNOWN, np.int32)
        problems = []
        for place, i in enumerate(chosen):
            sample = self.samples[i]
            try:
                if len(rows[place].tokens) == 0:
                    fault = sample_fault(sample, self.cfg, self.tokenizer, self.n_patches)
                    raise DataError(fault or "no token to learn in its answers")
                for k, name in enumerate(sample.images):
                    images[place, k] = self._image(name)
            except DataError as error:
                problems.append(Problem(sample.file, sample.row, sample.id, str(error)))
                rows[place], images[place] = _NOTHING, 0
                continue
            source[place], modality[place] = i, sample.modality
        if self.drop_empty and (source == _NO_ROW).all():
            return number, {}, problems
        batch = merge.pad_rows(rows, length)
        return number, batch | {"images": images, "modality": modality, "row": source}, problems

    def _merged(self, sample: Sample) -> merge.Merged:
        """The row, empty where it cannot be used (`sample_fault` tells why)."""
        try:
            spans = templates.render(self.cfg.template, sample.turns)
        except DataError:
            return _NOTHING
        ids, labels = tokens.encode(spans, self.tokenizer)
        row = merge.expand(ids, labels, self.n_patches)
        learns = (row.labels != tokens.IGNORE).any()
        return row if learns and len(row.tokens) <= self.cfg.max_length else _NOTHING

    def _bucket(self, longest: int) -> int:
        lengths = [length for length in self.cfg.buckets if length < self.cfg.max_length]
        return min(length for length in [*lengths, self.cfg.max_length] if length >= longest)

    def _image(self, name: str) -> np.ndarray:
        if name in self.cache:
            return self.cache[name]
        pixels = load_image(find_image(self.cfg.image_folder, name), self.spec)
        if self.keep_images:
            self.cache[name] = pixels
        return pixels


class Batches:
    """Iterator over batches with a state that can be saved; made by `build`."""

    def __init__(self, dataset: grain.MapDataset, cfg: DataConfig, identity: dict[str, int | str]):
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
        """The next batch (the Batch of this process; `row` is the number of the sample).

        Raises:
          DataError: an image cannot be read (on_error='error'); names file, row, id and image.
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
        return iter(dataset.mp_prefetch(options))

    def get_state(self) -> dict[str, Any]:
        """JSON-able state: number of the next batch, problems so far, and what the stream is of."""
        found = [asdict(problem) for problem in self._found]
        return {"next_batch": self._next, "problems": found} | self._identity

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken.

        Raises:
          DataError: the state belongs to other data, or another seed or batch size.
        """
        for key, value in self._identity.items():
            if state.get(key) != value:
                raise DataError(
                    f"the saved data position has {key} {state.get(key)!r}, this run {value!r}; "
                    "resume with the data files, seed and batch size of the first run, or start "
                    "in a new --workdir"
                )
        self.close()
        self._next = int(state["next_batch"])
        self._found = {Problem(**problem): None for problem in state.get("problems", ())}

    def close(self) -> None:
        """Stops reading ahead; the iterator can be used again."""
        if self._stop is not None:
            self._stop()
        self._iterator = self._stop = None


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
      cfg: template, image folder, lengths, workers and on_error are used.
      batch_size: rows of one micro-batch, over all processes.
      seed: of the order in training, 0 <= seed < 2**32.
      train: True: endless, shuffled; False: once, in order, the last batch filled with padding.
      process_index: which equal part of each batch is read here.
      process_count: number of parts.
      cache_bytes: decoded images are kept in memory if all of them fit; 0 = never.

    Returns:
      Iterator over Batches (dict of numpy arrays) with B = batch_size // process_count rows, T the
      smallest of `cfg.buckets` (or max_length) that holds the longest row of all processes, and K
      the largest number of images in any sample.

    Raises:
      DataError: no samples, a seed out of range, or batch_size is no multiple of process_count.
    """
    if not samples:
        raise DataError("no samples to make batches of")
    if not 0 <= seed < 2**32:
        raise DataError(f"seed {seed} is not in 0..2**32-1")
    if batch_size < 1 or batch_size % process_count or not 0 <= process_index < process_count:
        raise DataError(
            f"batch_size {batch_size} cannot be divided among {process_count} processes "
            f"(this is number {process_index})"
        )
    different = len({name for sample in samples for name in sample.images})
    maker = _BatchMaker(
        samples,
        tokenizer,
        spec,
        n_patches,
        cfg,
        batch_size,
        process_index,
        process_count,
        drop_empty=train and process_count == 1,
        keep_images=different * spec.crop**2 * 3 * max(1, cfg.workers) <= cache_bytes,
    )
    numbers = grain.MapDataset.range(len(samples))
    if train:
        numbers = numbers.seed(seed).shuffle().repeat(ENDLESS)
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(f"{Path(sample.file).name}:{sample.row}:{sample.id}\n".encode())
    return Batches(
        numbers.batch(batch_size).map_with_index(maker),
        cfg,
        {"seed": seed, "batch_size": batch_size, "digest": digest.hexdigest()},
    )
