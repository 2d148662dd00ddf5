"""Writes PyTorch weight files from numpy arrays; one tensor at a time is in memory.

Source: the format's description, https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medmoe_jax.convert.torch_files import import_torch, numpy_dtype

_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # in the files


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written: key, dtype by name, shape, and what makes the array in its turn."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * numpy_dtype(self.dtype).itemsize


def write_safetensors(path: Path, tensors: Sequence[NewTensor]) -> None:
    """Writes a `.safetensors` file; one tensor at a time is in memory."""
    # wide dtypes first, so that every tensor is aligned to its own item size
    order = sorted(tensors, key=lambda t: -numpy_dtype(t.dtype).itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for tensor in order:
        end = begin + tensor.nbytes
        header[tensor.key] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in order:
            array = np.asarray(tensor.make(), order="C")
            assert array.shape == tensor.shape and array.nbytes == tensor.nbytes, tensor.key
            file.write(array.reshape(-1).view(np.uint8).data)
    partial.replace(path)


def write_sharded(folder: Path, tensors: Sequence[NewTensor], shard_bytes: int) -> list[str]:
    """Writes `model.safetensors`, or numbered files and an index beyond `shard_bytes`.

    Returns:
      The names of the weight files.
    """
    shards: list[list[NewTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return ["model.safetensors"]
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(folder / name, shard)
    index = {
        "metadata": {"total_size": sum(t.nbytes for t in tensors)},
        "weight_map": {t.key: n for n, s in zip(names, shards, strict=True) for t in s},
    }
    text = json.dumps(index, indent=2) + "\n"
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return names


def write_pickle(path: Path, tensors: Sequence[NewTensor]) -> None:
    """Writes a dict of tensors with `torch.save`. Raises ConversionError where torch is missing."""
    torch = import_torch(f"write {path}")
    state = {}
    for tensor in tensors:
        array = np.array(tensor.make(), order="C")
        if tensor.dtype == "bfloat16":
            state[tensor.key] = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        else:
            state[tensor.key] = torch.from_numpy(array)
    torch.save(state, path)
