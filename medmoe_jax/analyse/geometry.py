"""Patches of the square that the tower sees, back on the picture as it is in its file."""

from __future__ import annotations

import numpy as np

from medmoe_jax.data.placement import Placement

LEAST = 0.5  # pixels of the square: a patch that shows less of the picture shows padding


def shows_picture(where: Placement, width: int, height: int, side: int) -> np.ndarray:
    """Which patches show some of the picture, not padding alone: bool[side, side].

    Args:
      where: how the picture became a square.
      width: of the picture, pixels.
      height: of the picture, pixels.
      side: patches along an edge of the square.
    """
    corners = where.to_square(np.array([[0, 0], [width, height]], np.float64))
    patch = where.crop / side
    start = np.arange(side)[:, None] * patch  # [side, 1], both axes alike
    overlap = np.minimum(start + patch, corners[1]) - np.maximum(start, corners[0])
    x, y = (overlap >= LEAST).T
    return y[:, None] & x[None, :]


def on_picture(values: np.ndarray, where: Placement, width: int, height: int) -> np.ndarray:
    """Values of patches at every pixel of the picture.

    Args:
      values: [side, side], row-major from the upper left.
      where: how the picture became a square.
      width: of the picture, pixels.
      height: of the picture, pixels.

    Returns:
      f64[height, width]; NaN where the picture was cut off and no patch saw it.
    """
    side = len(values)
    x = where.to_square(np.stack([np.arange(width) + 0.5, np.zeros(width)], -1))[:, 0]
    y = where.to_square(np.stack([np.zeros(height), np.arange(height) + 0.5], -1))[:, 1]
    column, row = (np.floor(edge * side / where.crop).astype(int) for edge in (x, y))
    seen = ((row >= 0) & (row < side))[:, None] & ((column >= 0) & (column < side))[None, :]
    inside = np.ix_(np.clip(row, 0, side - 1), np.clip(column, 0, side - 1))
    return np.where(seen, np.asarray(values, np.float64)[inside], np.nan)
