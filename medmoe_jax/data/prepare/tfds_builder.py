"""A prepared folder -> a TensorFlow Datasets folder (ArrayRecord), without TensorFlow.

`tfds.data_source(NAME, data_dir=OUT, split='train')` reads it, and so does Grain. A record has
`row`, the JSON text of a row of the manifest, and `images`, its image files byte for byte (see
`medmoe_jax.data.records`).
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from medmoe_jax.data import records
from medmoe_jax.data.images import find_image
from medmoe_jax.data.prepare import folders
from medmoe_jax.data.problems import DataError
from medmoe_jax.data.sources import image_names

VERSION = "1.0.0"  # of the layout of a record
_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")  # what TensorFlow Datasets accepts


class PreparedFolder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Builder of one prepared folder. Keys are the numbers of the rows, so the order is kept."""

    VERSION = tfds.core.Version(VERSION)

    def __init__(
        self,
        name: str,
        splits: Mapping[str, Sequence[dict[str, Any]]],
        image_folder: Path,
        out: Path,
        licence: str = "",
    ):
        """Nothing is read or written yet.

        Args:
          name: of the data set, lower case with underscores.
          splits: the rows of each split, none of them empty.
          image_folder: the rows' `image` is relative to it.
          out: the data set is written to out/name/VERSION.
          licence: text, stored in the folder as LICENSE.
        """
        self.name = name  # pyright: ignore[reportAttributeAccessIssue]  # a class per set, else
        self._rows = splits
        self._image_folder = image_folder
        self._licence = licence
        super().__init__(data_dir=out, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            features=records.features(),
            description=f"Rows and images of {self.name}, prepared by medmoe_jax.",
            license=self._licence or None,
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {split: self._generate_examples(rows) for split, rows in self._rows.items()}

    def _generate_examples(
        self, rows: Sequence[dict[str, Any]]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, row in enumerate(rows):
            names = image_names(row.get("image"))
            images = [find_image(self._image_folder, name).read_bytes() for name in names]
            yield number, {"row": json.dumps(row, ensure_ascii=False), "images": images}


def write(
    name: str,
    splits: Mapping[str, Sequence[dict[str, Any]]],
    image_folder: Path,
    out: Path,
    licence: str = "",
    shards: int = 0,
) -> Path:
    """Writes the splits that have rows.

    Args:
      name: of the data set; letters are lowered, what TensorFlow Datasets forbids becomes '_'.
      splits: split -> rows.
      image_folder: the rows' `image` is relative to it.
      out: folder of data sets; made if absent.
      licence: text to store beside the records.
      shards: files a split; 0 = as TensorFlow Datasets chooses, files of 64 MB to 1 GB.

    Returns:
      The folder written, out/name/VERSION.

    Raises:
      DataError: there is such a folder already, there are no rows or fewer than shards in a split,
        an image is missing or lies outside the folder, or the name starts with no letter.
    """
    name = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    if not _NAME.fullmatch(name):
        raise DataError(f"{name!r} is no name for a data set: start with a letter (--name)")
    splits = {split: rows for split, rows in splits.items() if rows}
    if not splits:
        raise DataError("there are no rows to write")
    for split, rows in splits.items():
        if not 0 <= shards <= len(rows):
            raise DataError(
                f"--shards {shards}, but {split!r} has {len(rows)} rows; without --shards large "
                "splits become files of 64 MB to 1 GB"
            )
        for row in rows:
            for image in image_names(row.get("image")):
                find_image(image_folder, image)
    builder = PreparedFolder(name, splits, image_folder, out, licence)
    folder = Path(builder.data_dir)
    if folder.exists():
        raise DataError(f"{folder} is there already; remove it, or choose another --out or --name")
    config = tfds.download.DownloadConfig(num_shards=shards or None)
    with tempfile.TemporaryDirectory() as unused:  # where downloads would go
        builder.download_and_prepare(download_dir=unused, download_config=config)
    return folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    add = parser.add_argument
    add("--source", type=Path, required=True, help="prepared folder")
    add("--out", type=Path, required=True, help="folder of data sets, written to OUT/NAME/VERSION")
    add("--name", help="of the data set; default: that of the folder")
    add("--shards", type=int, default=0, help="files a split; default: files of 64 MB to 1 GB")


def run(options: argparse.Namespace) -> int:
    """Writes a prepared folder as TensorFlow Datasets has it. Returns 0."""
    splits: dict[str, list[dict[str, Any]]] = {}
    for _, row in folders.rows(options.source):
        splits.setdefault(row["split"], []).append(row)
    licences = folders.licences(options.source)
    text = "\n".join(f"{x.name}, {x.link}. {x.note}" for x in licences)
    name = options.name or options.source.resolve().name
    images = options.source / folders.IMAGES
    folder = write(name, splits, images, options.out, text, options.shards)
    for split, rows in splits.items():
        print(f"{len(rows):8d}  {folder / split}")
    print(f"licence: {text}")
    return 0
