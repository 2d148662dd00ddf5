"""Parameters on disk, read and written piece by piece.

A `Stored` stands in a parameter tree where an array would. Selecting a layer, an expert or the part
that a device holds reads nothing; `numpy.asarray` reads what was selected, and only that. So a
process never holds more of a model on the host than the piece on its way to a device.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

CHUNK_BYTES = 16 * 2**20  # largest piece of a leaf in one file: the least that can be read of it
PIECE_BYTES = 64 * 2**20  # what is read or written at once


class CheckpointError(ValueError):
    """A model folder that cannot be read or written; the message names the file and the remedy."""


class Stored:
    """A leaf on disk, or a part of it.

    Indexed like a numpy array by numbers, slices that go forward and arrays of numbers. Attributes
    `shape`, `dtype`, `ndim`, `size`, `nbytes` are as there.
    """

    def __init__(self, path: Path, store: tensorstore.TensorStore, factor: Any = None) -> None:
        """Use `open_leaf`.

        Args:
          path: folder of the leaf, for messages.
          store: what was selected of it.
          factor: what its numbers are multiplied by; None: nothing.
        """
        self._path, self._store, self._factor = path, store, factor
        self.shape = tuple(store.shape)
        self.dtype = np.dtype(store.dtype.numpy_dtype)
        self.ndim, self.size = len(self.shape), prod(self.shape)
        self.nbytes = self.size * self.dtype.itemsize

    def __getitem__(self, index: Any) -> Stored:
        view = self._store[index]
        # TensorStore keeps the coordinates of the whole.
        return Stored(self._path, view[tensorstore.d[:].translate_to[0]], self._factor)

    def __len__(self) -> int:
        return self.shape[0]

    def __mul__(self, factor: Any) -> Stored:
        """The same numbers times another one, in their own dtype."""
        return Stored(self._path, self._store, self._times(factor))

    def repeated(self, times: int) -> Stored:
        """[N, ...] -> [N, times, ...]; read once where one of them is read."""
        return self[:, tensorstore.newaxis][:, np.zeros(times, np.int64)]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Reads it.

        Raises:
          CheckpointError: a file is missing or damaged.
        """
        found = self._read()
        if self._factor is not None:
            found *= np.asarray(self._factor, self.dtype)
        return found if dtype is None else found.astype(dtype, copy=False)

    def _read(self) -> np.ndarray:
        """The numbers as they are on disk, an array of their own."""
        found = np.empty(self.shape, self.dtype)
        try:
            for piece in pieces(self.shape, self.dtype.itemsize, self._chunk(), PIECE_BYTES):
                found[piece] = self._store[piece].read().result()
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self._path} cannot be read ({error}); copy the whole model folder again"
            ) from error
        return found

    def _times(self, factor: Any) -> Any:
        """What the numbers are multiplied by when that has another factor."""
        return factor if self._factor is None else self._factor * factor

    def _chunk(self) -> tuple[int, ...]:
        """Numbers along each axis that one file holds."""
        return tuple(size or 1 for size in self._store.chunk_layout.read_chunk.shape or ())


def open_leaf(path: Path) -> Stored:
    """The leaf of an Orbax checkpoint in the folder `path`; nothing is read of its numbers.

    Raises:
      OSError, ValueError: there is none.
    """
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": str(path)},
        "fill_missing_data_reads": False,  # a chunk that was lost is an error, not zeros
    }
    return Stored(path, tensorstore.open(spec, open=True, read=True).result())


def in_order(leaf: Any) -> Iterator[np.ndarray]:
    """The numbers of an array or a leaf on disk in C order, in parts of PIECE_BYTES at most."""
    for piece in pieces(leaf.shape, leaf.dtype.itemsize, [1] * leaf.ndim, PIECE_BYTES):
        yield np.ascontiguousarray(leaf[piece]).reshape(-1)


def pieces(
    shape: Sequence[int], itemsize: int, chunk: Sequence[int], most: int
) -> Iterator[tuple[slice, ...]]:
    """Cuts an array into parts of at most `most` bytes, or of one chunk where that is more.

    Args:
      shape: of the array.
      itemsize: bytes of a number.
      chunk: numbers along each axis that must stay together.
      most: bytes.

    Yields:
      The indices of each part. Along all axes before the one that is cut it is one chunk thick.
    """
    # Bytes of the least part where an axis is cut and those behind it are not.
    sizes = [itemsize * prod(chunk[: i + 1]) * prod(shape[i + 1 :]) for i in range(len(shape))]
    cut = next((axis for axis, size in enumerate(sizes) if size <= most), len(shape) - 1)
    steps = list(chunk[: cut + 1])
    if steps:
        steps[cut] *= max(1, most // max(sizes[cut], 1))
    starts = (range(0, size, step) for size, step in zip(shape, steps, strict=False))
    for corner in itertools.product(*starts):
        yield tuple(slice(a, min(a + b, n)) for a, b, n in zip(corner, steps, shape, strict=False))


def chunk_shape(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Numbers along each axis of one file of a leaf that is written from the host."""
    first = next(pieces(shape, itemsize, [1] * len(shape), CHUNK_BYTES), ())
    return tuple(part.stop for part in first) + tuple(shape[len(first) :])


class Handler(ocp.type_handlers.NumpyHandler):
    """Writes host arrays and `Stored` leaves; of several processes each its share of the pieces.

    Orbax's own handler copies all host arrays first, and writes from one process.
    """

    async def serialize(self, values: Any, infos: Any, args: Any = None) -> Sequence[Any]:
        """Writes leaves, all of them before it returns."""
        turns = itertools.cycle(range(jax.process_count()))
        for value, info in zip(values, infos, strict=True):
            chunk = chunk_shape(value.shape, value.dtype.itemsize)
            spec = {
                "driver": "zarr",
                "kvstore": {"driver": "file", "path": str(info.path)},
                "store_data_equal_to_fill_value": True,  # a missing file is one that was lost
            }
            store = await tensorstore.open(
                spec,
                create=True,
                open=True,
                dtype=tensorstore.dtype(value.dtype),
                shape=value.shape,
                chunk_layout=tensorstore.ChunkLayout(chunk_shape=chunk),
                codec=tensorstore.CodecSpec({"driver": "zarr", "compressor": None}),
            )
            for piece in pieces(value.shape, value.dtype.itemsize, chunk, PIECE_BYTES):
                if next(turns) == jax.process_index():
                    await store[piece].write(np.asarray(value[piece]))
        return []
