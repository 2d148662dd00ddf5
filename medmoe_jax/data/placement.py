"""Where the pixels of a picture lie in the square that the vision tower sees, and back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Placement:
    """The steps from a picture to a square, in pixels; pairs are (width, height).

    Attributes:
      padded: size after padding; the picture's own where nothing is padded.
      offset: of the picture's upper left corner in it.
      resized: size after resizing.
      margin: black pixels left of and above the resized picture, where it is smaller than the crop.
      cut: pixels cut off left and above.
      crop: edge of the square.
    """

    padded: tuple[int, int]
    offset: tuple[int, int]
    resized: tuple[int, int]
    margin: tuple[int, int]
    cut: tuple[int, int]
    crop: int

    def to_square(self, points: np.ndarray) -> np.ndarray:
        """Points of the picture, f64[..., 2] (x, y) with (0, 0) its upper left corner, as points of
        the square; some may lie outside of it."""
        scale = np.asarray(self.resized) / np.asarray(self.padded)
        shift = np.asarray(self.margin) - np.asarray(self.cut)
        return (np.asarray(points, np.float64) + np.asarray(self.offset)) * scale + shift

    def to_picture(self, points: np.ndarray) -> np.ndarray:
        """The inverse of `to_square`."""
        scale = np.asarray(self.resized) / np.asarray(self.padded)
        shift = np.asarray(self.margin) - np.asarray(self.cut)
        return (np.asarray(points, np.float64) - shift) / scale - np.asarray(self.offset)


def place(width: int, height: int, resize: int, crop: int, pad: bool) -> Placement:
    """How a picture becomes a square.

    Args:
      width: of the picture, pixels.
      height: of the picture, pixels.
      resize: of the shortest edge, pixels.
      crop: edge of the square that is cut from the centre, pixels.
      pad: to a square before resizing.

    Source: `expand2square` of Med-MoE and `CLIPImageProcessor` of transformers.
    """
    padded, offset = (width, height), (0, 0)
    if pad:
        side = max(width, height)
        padded, offset = (side, side), ((side - width) // 2, (side - height) // 2)
    long = int(resize * max(padded) / min(padded))
    resized = (resize, long) if padded[0] <= padded[1] else (long, resize)
    missing = tuple(max(0, crop - edge) for edge in resized)
    margin = ((missing[0] + 1) // 2, (missing[1] + 1) // 2)
    cut = tuple((edge + more - crop) // 2 for edge, more in zip(resized, missing, strict=True))
    return Placement(padded, offset, resized, margin, (cut[0], cut[1]), crop)
