"""95 % intervals by resampling whole images.

Questions about one image share what the model saw, so their errors go together; drawing single
rows would make the intervals too narrow. What is drawn is therefore images, each with all its rows
(a row without an image by itself). All figures use the same draws, so that differences are paired.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

PERCENTILES = (2.5, 97.5)
AT_ONCE = 100  # draws handled together: bounds the memory

# How often each row was drawn, f64[b, n] -> the figures of each draw, f64[b, F], NaN = undefined.
Statistic = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Bootstrap:
    """The draws, and which image each row belongs to.

    Attributes:
      times: u16[samples, images], how often each image was drawn.
      image: i64[n], index of each row's image.
    """

    times: np.ndarray
    image: np.ndarray

    @classmethod
    def draw(cls, clusters: Sequence[str], samples: int, seed: int) -> Bootstrap:
        """Draws as many images as there are, `samples` times.

        Args:
          clusters: rows with equal names are drawn together.
          samples: 0 = no intervals.
          seed: same seed, same draws.
        """
        _, image = np.unique(np.asarray(clusters, object).astype(str), return_inverse=True)
        n = int(image.max()) + 1 if len(image) else 1
        times = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=samples)
        return cls(times.astype(np.uint16), image)

    def rows(self, chosen: np.ndarray) -> Bootstrap:
        """The same draws, seen by some rows: `chosen` is bool[n] or indices."""
        return Bootstrap(self.times, self.image[chosen])

    def images(self, mask: np.ndarray) -> int:
        """Number of images that the rows in bool[n] have."""
        return len(np.unique(self.image[mask]))

    def intervals(self, statistic: Statistic) -> np.ndarray:
        """Percentile intervals.

        Args:
          statistic: see `Statistic`.

        Returns:
          f64[F, 2], low and high; NaN where no draw defines the figure, or fewer than two images
          are there to draw from. A figure that is the same in every draw (all rows right, say) has
          an interval of width zero, which says little where n is small.
        """
        starts = range(0, len(self.times), AT_ONCE)
        weights = (self.times[start : start + AT_ONCE, self.image] for start in starts)
        parts = [statistic(part.astype(np.float64)) for part in weights]
        width = statistic(np.ones((1, len(self.image)))).shape[1]
        found = np.full((width, 2), np.nan)
        draws = np.concatenate([np.empty((0, width)), *parts])
        defined = np.isfinite(draws).any(0)
        if len(np.unique(self.image)) > 1 and defined.any():
            found[defined] = np.nanpercentile(draws[:, defined], PERCENTILES, axis=0).T
        return found


def means(columns: np.ndarray) -> Statistic:
    """Weighted means of f64[n, F]; NaN = the row does not count."""
    counts = np.isfinite(columns)
    filled = np.where(counts, columns, 0.0)
    parts = counts.astype(np.float64)

    def statistic(weights: np.ndarray) -> np.ndarray:
        total = weights @ parts
        return np.divide(weights @ filled, total, out=np.full(total.shape, np.nan), where=total > 0)

    return statistic


def pair_or_none(interval: np.ndarray, scale: float = 1.0) -> list[float] | None:
    """[low, high] for a report, None where it is not defined."""
    return [float(end) * scale for end in interval] if np.isfinite(interval).all() else None


def cells(columns: Mapping[Any, np.ndarray], boot: Bootstrap) -> dict[Any, dict[str, Any]]:
    """Means of columns as a report has them.

    Args:
      columns: name -> f64[n], 0..1, NaN = the row does not count.
      boot: of the same rows.

    Returns:
      name -> percent (None without rows), n (rows that count), ci95 ([low, high] percent, None
      with fewer than two images).
    """
    if not columns:
        return {}
    stacked = np.stack(list(columns.values()), 1)
    intervals = boot.intervals(means(stacked))
    found = {}
    for place, name in enumerate(columns):
        counts = np.isfinite(stacked[:, place])
        n = int(counts.sum())
        several = boot.images(counts) > 1
        found[name] = {
            "percent": 100 * float(stacked[counts, place].mean()) if n else None,
            "n": n,
            "ci95": pair_or_none(intervals[place], 100.0) if several else None,
        }
    return found
