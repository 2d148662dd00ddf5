"""Means and deviations over seeds, and differences of two variants with paired intervals.

Two variants answer the same questions in each seed, so differences are taken question by question.
An interval comes from drawing seeds, and within each drawn seed images with all their questions,
with replacement: it holds both sources of chance. With few seeds it is rough; with one it says
nothing about seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medmoe_jax.evaluation.bootstrap import AT_ONCE, PERCENTILES, Bootstrap, means

ALL = "mean"  # the column that averages the others


@dataclass(frozen=True)
class Scores:
    """What the answers of one model are worth.

    Attributes:
      names: of the columns.
      values: f64[n, F], 0..1; NaN = the row does not count in the column.
      images: of each row; rows with equal ones are drawn together.
    """

    names: tuple[str, ...]
    values: np.ndarray
    images: list[str]

    def means(self) -> np.ndarray:
        """f64[F + 1], percent: of each column, and the mean of these."""
        each = 100 * np.nanmean(self.values, 0)
        return np.append(each, each.mean())


@dataclass(frozen=True)
class Level:
    """Mean and sample standard deviation over seeds; the latter None with one seed. Percent."""

    mean: float
    std: float | None
    seeds: tuple[float, ...]

    def text(self) -> str:
        """As in a table."""
        return f"{self.mean:.1f}" + (f" ± {self.std:.1f}" if self.std is not None else "")


@dataclass(frozen=True)
class Difference:
    """Of two variants, first minus second, points: mean over seeds and 95 % interval, whose ends
    are NaN where none was drawn."""

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> int:
        """1 or -1 where the interval is above or below zero, 0 where it holds zero or is none."""
        return int(self.low > 0) - int(self.high < 0)

    def text(self) -> str:
        """As in a table."""
        drawn = f"[{self.low:+.1f}, {self.high:+.1f}]" if self.low <= self.high else "(no interval)"
        return f"{self.mean:+.1f} {drawn}"


def level(values: Sequence[float]) -> Level:
    """Of one number a seed."""
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Level(float(np.mean(values)), std, tuple(float(v) for v in values))


def levels(seeds: Sequence[Scores]) -> dict[str, Level]:
    """Of each column and of their mean, from one `Scores` a seed."""
    found = np.stack([scores.means() for scores in seeds])
    names = (*seeds[0].names, ALL)
    return {name: level(found[:, place].tolist()) for place, name in enumerate(names)}


def differences(
    first: Sequence[Scores], second: Sequence[Scores], samples: int, seed: int = 0
) -> dict[str, Difference]:
    """First minus second, column by column and in the mean of the columns.

    Args:
      first: one `Scores` a seed.
      second: likewise, of the same questions in the same order.
      samples: bootstrap draws; 0 = no intervals.
      seed: of the draws.

    Raises:
      ValueError: the questions differ.
    """
    for a, b in zip(first, second, strict=True):
        if a.names != b.names or a.images != b.images:
            raise ValueError("differences are taken between answers to the same questions")
    apart = [
        Scores(a.names, a.values - b.values, a.images) for a, b in zip(first, second, strict=True)
    ]
    found = np.stack([scores.means() for scores in apart]).mean(0)
    low, high = np.full((2, len(found)), np.nan)
    if samples:
        low, high = np.nanpercentile(resampled(apart, samples, seed), PERCENTILES, axis=0)
    names = (*first[0].names, ALL)
    return {
        name: Difference(float(found[i]), float(low[i]), float(high[i]))
        for i, name in enumerate(names)
    }


def resampled(seeds: Sequence[Scores], samples: int, seed: int) -> np.ndarray:
    """f64[samples, F + 1], percent: the mean over drawn seeds of the means over drawn images."""
    n = len(seeds)
    rng = np.random.default_rng(seed)
    chosen = rng.integers(n, size=(samples, n))
    total = np.zeros((samples, len(seeds[0].names) + 1))
    for slot in range(n):
        # A seed that is drawn twice draws its images twice.
        each = [_means_of_draws(s, samples, int(rng.integers(2**31))) for s in seeds]
        total += np.stack(each)[chosen[:, slot], np.arange(samples)]
    return total / n


def _means_of_draws(scores: Scores, samples: int, seed: int) -> np.ndarray:
    boot = Bootstrap.draw(scores.images, samples, seed)
    statistic = means(scores.values)
    parts = [
        statistic(boot.times[start : start + AT_ONCE, boot.image].astype(np.float64))
        for start in range(0, samples, AT_ONCE)
    ]
    found = 100 * np.concatenate(parts)
    return np.concatenate([found, found.mean(1, keepdims=True)], 1)


def as_json(value: Any) -> Any:
    """A Level or a Difference for a file."""
    if isinstance(value, Level):
        return {"mean": value.mean, "std": value.std, "seeds": list(value.seeds)}
    ends = {
        name: None if np.isnan(end) else end
        for name, end in (("low", value.low), ("high", value.high))
    }
    return {"mean": value.mean, **ends, "verdict": value.verdict}
