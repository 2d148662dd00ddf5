"""Images of samples, from files or from records: decoded, and kept in memory where they fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from medmoe_jax.data.images import ImageSpec, find_image, load_encoded, load_image
from medmoe_jax.data.records import Records, is_records
from medmoe_jax.data.sources import Sample, image_folder_of


class ImageStore:
    """Reads the images of samples. A worker process that gets a copy keeps its own."""

    def __init__(self, image_folder: str | Path, spec: ImageSpec, keep: bool):
        """
        Args:
          image_folder: see `sources.image_folder_of`.
          spec: what an image becomes.
          keep: whether images stay in memory.
        """
        self._image_folder, self._spec, self._keep = image_folder, spec, keep
        self._places: dict[str, Path | Records] = {}  # data file -> where its images are
        self._kept: dict[tuple[str, str], np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_places": {}, "_kept": {}}

    def read(self, sample: Sample) -> list[np.ndarray]:
        """The images of a sample, each uint8[crop, crop, 3].

        Raises:
          DataError: as `find_image` and `load_image`, or a record cannot be read.
        """
        place = self._place(sample.file)
        key = str(place) if isinstance(place, Path) else sample.file
        keys = [(key, name) for name in sample.images]
        found = [self._kept[one] for one in keys if one in self._kept]
        if len(found) < len(keys):
            found = self._read(place, sample)
            if self._keep:
                self._kept |= zip(keys, found, strict=True)
        return found

    def _read(self, place: Path | Records, sample: Sample) -> list[np.ndarray]:
        if isinstance(place, Path):
            return [load_image(find_image(place, name), self._spec) for name in sample.images]
        record = place[sample.row]
        pairs = zip(record.images, sample.images, strict=True)
        return [load_encoded(content, name, self._spec) for content, name in pairs]

    def _place(self, file: str) -> Path | Records:
        if file not in self._places:
            here = Records(file) if is_records(file) else image_folder_of(file, self._image_folder)
            self._places[file] = here
        return self._places[file]
