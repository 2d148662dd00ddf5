"""Images of samples, decoded, and kept in memory where they fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from medmoe_jax.data.images import ImageSpec, find_image, load_image
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
        self._kept: dict[tuple[Path, str], np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": {}}

    def read(self, sample: Sample) -> list[np.ndarray]:
        """The images of a sample, each uint8[crop, crop, 3].

        Raises:
          DataError: as `find_image` and `load_image`.
        """
        folder = image_folder_of(sample.file, self._image_folder)
        return [self._read(folder, name) for name in sample.images]

    def _read(self, folder: Path, name: str) -> np.ndarray:
        if (folder, name) in self._kept:
            return self._kept[folder, name]
        pixels = load_image(find_image(folder, name), self._spec)
        if self._keep:
            self._kept[folder, name] = pixels
        return pixels
