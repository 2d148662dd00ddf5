"""Voxels that are not square -> pixels that are, so that anatomy keeps its proportions."""

from __future__ import annotations

import math

from PIL import Image

from medmoe_jax.data.size import check_pixels

LIKE = 0.02  # a difference of the two edges that is left as it is
ABSURD = 20.0  # a ratio that is no property of a scanner


def square_pixels(image: Image.Image, spacing: tuple[float, float], name: str) -> Image.Image:
    """Stretches the picture along the coarser edge.

    Args:
      image: mode L or RGB.
      spacing: height and width of a pixel, in one unit; what is no positive number, or an absurd
        ratio, counts as square.
      name: of the file, for messages.

    Raises:
      DataError: the result would be too large.
    """
    height, width = spacing
    if not (math.isfinite(height) and math.isfinite(width) and height > 0 and width > 0):
        return image
    ratio = height / width
    if abs(ratio - 1) <= LIKE or not 1 / ABSURD <= ratio <= ABSURD:
        return image
    across = image.width if ratio > 1 else max(1, round(image.width / ratio))
    down = image.height if ratio < 1 else max(1, round(image.height * ratio))
    check_pixels(across, down, name)
    return image.resize((across, down), Image.Resampling.BICUBIC)
