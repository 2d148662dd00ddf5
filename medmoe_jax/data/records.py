"""Rows with their encoded images in TensorFlow Datasets folders: one big file, or a few, instead of
many small ones, with random access (ArrayRecord).

`python -m medmoe_jax.data.prepare tfds` writes such folders (`prepare/tfds_builder.py`),
`tfds.data_source` and Grain read them, and so does `Records`. A record has two features:

* `row`: the row of manifest.jsonl, as UTF-8 JSON.
* `images`: the files of its images, byte for byte, in the order of the row's `image`.

TensorFlow is needed neither for writing nor for reading.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex, overload

import numpy as np

from medmoe_jax.data.problems import DataError

if TYPE_CHECKING:
    from tensorflow_datasets.core.features import FeaturesDict

INFO, FEATURES = "dataset_info.json", "features.json"  # what TensorFlow Datasets writes
DEFAULT_SPLIT = "train"
_TFDS_FEATURES = "tensorflow_datasets.core.features."


class Record(NamedTuple):
    """One row and what its images are."""

    row: dict[str, Any]  # of manifest.jsonl
    images: tuple[bytes, ...]  # encoded (PNG, JPEG, ...), in the order of row['image']


class Records(Sequence[Record]):
    """The records of one split, by number. Can be pickled; worker processes open files anew.

    Rows come in the order of the manifest. Only what is asked for is read.
    """

    def __init__(self, path: str | Path):
        """Opens a split.

        Args:
          path: a folder that holds dataset_info.json (its split 'train'), or FOLDER/SPLIT.

        Raises:
          DataError: no such folder or split, or its records are not those described above.
        """
        self.folder, self.split = _folder_and_split(path)
        _check_features(self.folder / FEATURES)
        import tensorflow_datasets as tfds

        try:
            sources: Any = tfds.builder_from_directory(self.folder).as_data_source()
            if self.split not in sources:
                has = ", ".join(sources)
                raise DataError(f"{self.folder} has no split {self.split!r}; it has: {has}")
            self._source = sources[self.split]
            self._length = len(self._source)
        except DataError:
            raise
        except Exception as error:  # ArrayRecord and protobuf raise errors of many kinds
            raise DataError(f"{self.folder} cannot be read: {error}") from error

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: SupportsIndex) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: SupportsIndex | slice) -> Record | list[Record]:
        """One record, or a list of them for a slice. Negative numbers count from the end.

        Raises:
          DataError: the record cannot be read (its file was cut short, or changed).
        """
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = operator.index(index)
        place += len(self) if place < 0 else 0
        if not 0 <= place < len(self):
            raise IndexError(f"record {index} of {len(self)} in {self.folder}, {self.split!r}")
        try:
            raw = self._source[place]
            return Record(json.loads(raw["row"]), tuple(bytes(image) for image in raw["images"]))
        except Exception as error:
            raise DataError(
                f"record {place} of {self.folder}, split {self.split!r}, cannot be read: {error}"
            ) from error

    def __iter__(self) -> Iterator[Record]:
        return (self[i] for i in range(len(self)))


def is_records(path: str | Path) -> bool:
    """Whether `path` is FOLDER or FOLDER/SPLIT of a TensorFlow Datasets folder."""
    return any((folder / INFO).is_file() for folder in (Path(path), Path(path).parent))


def features() -> FeaturesDict:
    """The features of a record; see the top of this file."""
    import tensorflow_datasets as tfds

    images = tfds.features.Sequence(tfds.features.Scalar(np.object_))  # numpy's type for bytes
    return tfds.features.FeaturesDict({"row": tfds.features.Text(), "images": images})


def _folder_and_split(path: str | Path) -> tuple[Path, str]:
    path = Path(path)
    if (path / INFO).is_file():
        return path, DEFAULT_SPLIT
    if (path.parent / INFO).is_file():
        return path.parent, path.name
    raise DataError(
        f"{path} is no TensorFlow Datasets folder (no {INFO} in it); name NAME/VERSION below the "
        "--out of `python -m medmoe_jax.data.prepare tfds`, or one of its splits as FOLDER/SPLIT"
    )


def _check_features(file: Path) -> None:
    """TensorFlow Datasets imports the classes that this file names, so only its own may be there.

    Raises:
      DataError: the file cannot be read, names other classes, or describes other features.
    """
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
        found = set(described["featuresDict"]["features"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} cannot be read: {error!r}") from error
    foreign = [name for name in _classes(described) if not name.startswith(_TFDS_FEATURES)]
    if foreign or found != {"row", "images"}:
        raise DataError(
            f"{file} describes features {sorted(found)} {foreign or ''}, not 'row' and 'images'; "
            "make the folder with `python -m medmoe_jax.data.prepare tfds`"
        )


def _classes(described: Any) -> Iterator[str]:
    if isinstance(described, dict):
        for key, value in described.items():
            if key == "pythonClassName":
                yield str(value)
            else:
                yield from _classes(value)
