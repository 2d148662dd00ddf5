"""The drawing surface: coordinate grids, soft-edged shapes and smooth noise, all vectorised over
the image.

Coordinates are in half longer image sides from the image centre, x rightwards and y downwards, so
the longer side runs from -1 to 1. A mask is float32[h, w] in 0..1 with an edge about 1.5 pixels
wide.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

Layers = list[tuple[str, np.ndarray]]  # (tissue, mask), painted in this order


@dataclass(frozen=True)
class Canvas:
    """Pixel coordinates. `x`, `y`: float32[h, w]; `soft`: width of an edge in the same unit."""

    x: np.ndarray
    y: np.ndarray
    soft: float

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.x.shape[0], self.x.shape[1]

    def moved(
        self, dx: float, dy: float, scale: float, angle: float, warp: tuple[np.ndarray, np.ndarray]
    ) -> Canvas:
        """The same pixels in the coordinates of an anatomy that is shifted, scaled, turned
        (radians) and bent.

        `warp` is added last: two float32[h, w] maps, or numbers that broadcast.
        """
        c, s = np.float32(np.cos(angle) / scale), np.float32(np.sin(angle) / scale)
        x, y = self.x - np.float32(dx), self.y - np.float32(dy)
        return Canvas(c * x + s * y + warp[0], c * y - s * x + warp[1], self.soft / scale)

    def ellipse(
        self, cx: float, cy: float, rx: float, ry: float, angle: float = 0.0, power: float = 2.0
    ) -> np.ndarray:
        """Mask of an ellipse turned by `angle` radians; `power` > 2 makes it more of a rounded
        box."""
        return self.inside(self.radius(cx, cy, rx, ry, angle, power), min(rx, ry))

    def radius(
        self, cx: float, cy: float, rx: float, ry: float, angle: float = 0.0, power: float = 2.0
    ) -> np.ndarray:
        """float32[h, w]: 0 in the centre of an ellipse, 1 on its edge."""
        x, y = self.x - np.float32(cx), self.y - np.float32(cy)
        if angle:
            c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
            x, y = c * x + s * y, c * y - s * x
        x *= np.float32(1 / rx)
        y *= np.float32(1 / ry)
        if power == 2.0:
            return np.sqrt(x * x + y * y)
        if power == 4.0:
            return np.sqrt(np.sqrt(np.square(x * x) + np.square(y * y)))
        return (np.abs(x) ** power + np.abs(y) ** power) ** np.float32(1 / power)

    def inside(self, field: np.ndarray, unit: float, level: float = 1.0) -> np.ndarray:
        """Mask of `field` < `level`, where `field` grows by one over a distance of about `unit`."""
        return np.clip((level - field) * np.float32(unit / self.soft) + 0.5, 0, 1)

    def below(self, edge: np.ndarray | float) -> np.ndarray:
        """Mask of the pixels under the line y = `edge`."""
        return np.clip((self.y - edge) * np.float32(1 / self.soft) + 0.5, 0, 1)


def make_canvas(height: int, width: int) -> Canvas:
    """Canvas of `height` x `width` pixels."""
    half = np.float32(max(height, width) / 2)
    x = (np.arange(width, dtype=np.float32) - np.float32((width - 1) / 2)) / half
    y = (np.arange(height, dtype=np.float32) - np.float32((height - 1) / 2)) / half
    grid_y, grid_x = np.meshgrid(y, x, indexing="ij")
    return Canvas(grid_x, grid_y, 1.5 / float(half))


def smooth(rng: np.random.Generator, shape: tuple[int, int], cells: float) -> np.ndarray:
    """float32[h, w] of about unit variance that varies over 1 / `cells` of the longer side."""
    longer = max(shape)
    rows, columns = (max(2, round(cells * side / longer) + 1) for side in shape)
    grid = rng.standard_normal((rows, columns), dtype=np.float32)
    return np.asarray(
        Image.fromarray(grid).resize((shape[1], shape[0]), Image.Resampling.BICUBIC)
    ) * np.float32(1.3)


def white(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """float32[h, w] of independent standard normal values."""
    return rng.standard_normal(shape, dtype=np.float32)


def mix(image: np.ndarray, mask: np.ndarray, value: np.ndarray | float) -> None:
    """Draws `value` over `image` (in place) where `mask` is 1."""
    image += mask * (value - image)


@dataclass(frozen=True)
class Cells:
    """Nearest point of a jittered lattice, a pixel: `offset_x`, `offset_y` to it and `nearest`,
    `second` distance, all in lattice spacings, float32[h, w]; `index`: int64[h, w] number of the
    nearest point, below `count`."""

    offset_x: np.ndarray
    offset_y: np.ndarray
    nearest: np.ndarray
    second: np.ndarray
    index: np.ndarray
    count: int


def make_cells(
    rng: np.random.Generator, x: np.ndarray, y: np.ndarray, spacing: float, jitter: float
) -> Cells:
    """Cells of a lattice with `spacing` whose points are moved by up to `jitter` / 2 spacings (0 to
    1).

    `x`, `y`: float32[h, w] coordinates (any smooth map of the pixels).
    """
    u, v = x / np.float32(spacing), y / np.float32(spacing)
    u -= u.min() - 1.5
    v -= v.min() - 1.5
    columns, rows = int(u.max()) + 3, int(v.max()) + 3
    shift_x, shift_y = (
        (rng.random(rows * columns, dtype=np.float32) - 0.5) * np.float32(jitter) + 0.5
        for _ in range(2)
    )
    # The nearest points are among the four whose lattice squares meet next to the pixel.
    base_x, base_y = np.floor(u - 0.5), np.floor(v - 0.5)
    base = (base_y * columns + base_x).astype(np.int64)
    u -= base_x
    v -= base_y
    best = np.full(u.shape, np.inf, np.float32)
    second = best.copy()
    index = np.zeros(u.shape, np.int64)
    offset_x, offset_y = np.zeros_like(u), np.zeros_like(u)
    for step_y in (0, 1):
        for step_x in (0, 1):
            here = base + (step_y * columns + step_x)
            dx = u - (shift_x[here] + step_x)
            dy = v - (shift_y[here] + step_y)
            distance = dx * dx + dy * dy
            closer = distance < best
            second = np.where(closer, best, np.minimum(second, distance))
            best = np.where(closer, distance, best)
            index = np.where(closer, here, index)
            offset_x = np.where(closer, dx, offset_x)
            offset_y = np.where(closer, dy, offset_y)
    return Cells(offset_x, offset_y, np.sqrt(best), np.sqrt(second), index, rows * columns)
