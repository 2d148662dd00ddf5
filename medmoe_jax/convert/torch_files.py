"""PyTorch weight files as numpy arrays, one tensor at a time.

Reads `.safetensors` and pickled `.bin`/`.pth` files, sharded or not. Memory stays at about one
tensor: safetensors are read with plain file operations (a memory map would count every page it has
touched), and the memory map of a pickled file is opened afresh now and then. Nothing but tensors is
ever unpickled.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import ml_dtypes
import numpy as np

from medmoe_jax.convert.report import ConversionError, raise_all

FLOATS = ("float32", "float16", "bfloat16")  # dtypes that parameters may have
REOPEN_BYTES = 128 * 2**20  # read through a memory map before it is opened afresh
HEADER_LIMIT = 100 * 2**20  # bytes; the limit of the safetensors library too

# safetensors' names; the sizes of dtypes that are never read are needed to check offsets
_DTYPES = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F64": "float64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


def numpy_dtype(name: str) -> np.dtype:
    """The numpy dtype called `name`, bfloat16 included."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


@dataclass(frozen=True)
class TensorInfo:
    """One tensor in a file: where it is, its dtype by name ("float32", ...) and its shape."""

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    offset: int = 0  # byte in the file where the data begin (safetensors only)


class SafetensorsFile:
    """A `.safetensors` file.

    Source: the format's description, https://github.com/huggingface/safetensors#format
    """

    def __init__(self, path: Path):
        """Reads the header. Raises ConversionError on a file that is not whole."""
        self.path = path
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(HEADER_LIMIT, size - 8):
                raise ConversionError(
                    f"{path}: is truncated or not a safetensors file ({size} bytes, header of "
                    f"{length}); copy or download it again"
                )
            try:
                header = dict(json.loads(file.read(length)))
                header.pop("__metadata__", None)
                self.infos = {key: self._info(key, e, 8 + length) for key, e in header.items()}
                end = max((e["data_offsets"][1] for e in header.values()), default=0)
            except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
                raise ConversionError(
                    f"{path}: the header is not that of a safetensors file ({error}); copy or "
                    "download it again"
                ) from error
        if size != 8 + length + end:
            raise ConversionError(
                f"{path}: has {size} bytes where its header describes {8 + length + end}: "
                "truncated or damaged; copy or download it again"
            )

    def _info(self, key: str, entry: dict[str, Any], base: int) -> TensorInfo:
        begin, end = entry["data_offsets"]
        shape = tuple(int(n) for n in entry["shape"])
        dtype = _DTYPES.get(entry["dtype"], str(entry["dtype"]))
        if dtype in _DTYPES.values():
            expected = math.prod(shape) * numpy_dtype(dtype).itemsize
            if end - begin != expected or begin < 0:
                raise ValueError(
                    f"key {key!r}: {end - begin} bytes for shape {list(shape)} of {dtype}, "
                    f"expected {expected}"
                )
        return TensorInfo(self.path, key, dtype, shape, base + begin)

    def read(self, key: str) -> np.ndarray:
        """The tensor, as a new array."""
        info = self.infos[key]
        dtype = numpy_dtype(info.dtype)
        count = math.prod(info.shape)
        with info.file.open("rb") as file:
            file.seek(info.offset)
            data = np.fromfile(file, np.uint8, count * dtype.itemsize)
        return data.view(dtype).reshape(info.shape)


class PickleFile:
    """A file of tensors written by `torch.save`: `.bin`, `.pth`, `.pt`."""

    def __init__(self, path: Path):
        """Reads names and shapes. Raises ConversionError on anything but a dict of tensors."""
        self.path = path
        self._mapped = zipfile.is_zipfile(path)  # files written before torch 1.6 cannot be mapped
        self._bytes_read = 0
        self._tensors = self._open()
        wrong = {k: type(v).__name__ for k, v in self._tensors.items() if not hasattr(v, "dtype")}
        if wrong:
            raise ConversionError(
                f"{path}: holds more than tensors: {wrong}; save a state dict alone"
            )
        self.infos = {
            key: TensorInfo(path, key, str(t.dtype).removeprefix("torch."), tuple(t.shape))
            for key, t in self._tensors.items()
        }

    def _open(self) -> dict[str, Any]:
        torch = import_torch(f"read {self.path}")
        try:
            tensors = torch.load(
                self.path, map_location="cpu", weights_only=True, mmap=self._mapped
            )
        except Exception as error:  # damaged files fail in the unpickler in a dozen ways
            raise ConversionError(
                # not torch's own words: they advise to switch off the check
                f"{self.path}: cannot be read as PyTorch weights ({type(error).__name__}): it is "
                "truncated, or holds more than tensors, which is never unpickled; get it again"
            ) from error
        if not isinstance(tensors, dict) or not all(isinstance(key, str) for key in tensors):
            raise ConversionError(f"{self.path}: holds no dict of named tensors; save a state dict")
        return tensors

    def read(self, key: str) -> np.ndarray:
        """The tensor, as a new array."""
        tensor = self._tensors[key].detach().contiguous()
        torch = import_torch(f"read {self.path}")
        if tensor.dtype == torch.bfloat16:
            array = tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16).copy()
        else:
            array = tensor.numpy().copy()
        self._bytes_read += array.nbytes
        if self._mapped and self._bytes_read > REOPEN_BYTES:
            del tensor
            self._bytes_read = 0
            self._tensors = self._open()
        return array


class Weights:
    """All tensors of one checkpoint, whatever the number and kind of its files."""

    def __init__(self, paths: Sequence[Path]):
        """Opens the files. Raises ConversionError, with every problem found."""
        self.files: dict[Path, SafetensorsFile | PickleFile] = {}
        self.infos: dict[str, TensorInfo] = {}
        problems = []
        for path in paths:
            try:
                pickled = path.suffix != ".safetensors"
                self.files[path] = PickleFile(path) if pickled else SafetensorsFile(path)
            except (ConversionError, OSError) as error:
                problems.append(str(error))
                continue
            for key, info in self.files[path].infos.items():
                if key in self.infos:
                    problems.append(f"{path}: key {key!r} is also in {self.infos[key].file.name}")
                self.infos[key] = info
        raise_all("the weight files cannot be read", problems)

    def read(self, key: str) -> np.ndarray:
        """The tensor `key`, as a new array."""
        return self.files[self.infos[key].file].read(key)


def open_weights(folder: Path) -> Weights | None:
    """Opens the weights of a folder: safetensors before `.bin`, sharded before whole.

    Returns:
      None where the folder has none of the usual files.

    Raises:
      ConversionError: files that are named but missing, damaged, outside of the folder, or that
        lack a key.
    """
    for stem in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{stem}.index.json"
        if index.is_file():
            return _open_shards(index)
        if (folder / stem).is_file():
            return Weights([folder / stem])
    return None


def _open_shards(index: Path) -> Weights:
    """Opens the files that an index names, and checks that it tells the truth."""
    try:
        weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError) as error:
        raise ConversionError(f"{index}: is not a weight index ({error}); get it again") from error
    problems = []
    for name in names:
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or "\\" in name:
            problems.append(
                f"{index}: file {name!r} lies outside of the folder; that is not followed"
            )
        elif not (index.parent / name).is_file():
            problems.append(f"{index}: file {name!r} is missing; copy or download it")
    raise_all("the weight files cannot be read", problems)
    weights = Weights([index.parent / name for name in names])
    for key, name in weight_map.items():
        if key not in weights.infos:
            problems.append(
                f"{index.parent / name}: key {key!r} is in the index but not in the file"
            )
    raise_all("the weight files cannot be read", problems)
    return weights


def import_torch(purpose: str) -> Any:
    """The torch module. Raises ConversionError where it is not installed."""
    try:
        import torch
    except ImportError:
        raise ConversionError(
            f"torch is needed to {purpose}: pip install 'medmoe_jax[torch]'"
        ) from None
    return torch
