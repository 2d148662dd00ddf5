"""Whether an overlay tells the truth: the answer's probability as its patches are hidden.

If the patches at the top of the overlay are what the answer depends on, hiding them must cost more
than hiding as many at random. The deletion curve is the probability against the share of hidden
patches; the area below it is small for a faithful overlay, and `gap`, the area of random orders
less its own, is above zero.

Source: the deletion metric of Petsiuk, Das and Saenko, "RISE: Randomized Input Sampling for
Explanation of Black-box Models", BMVC 2018, section 4.2, here beside random orders.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medmoe_jax.evaluation import bootstrap

FRACTIONS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)  # of the patches, hidden
INTERVAL = (2.5, 97.5)  # percentiles

Probability = Callable[[np.ndarray], np.ndarray]  # bool[N, P], hidden patches -> f64[N]


@dataclass(frozen=True)
class Curve:
    """Probability of one answer while patches are hidden.

    Attributes:
      fractions: f64[F], share of the candidates that is hidden, from 0 to 1.
      hidden: i64[F], their number.
      top: f64[F], hidden in the order of the overlay.
      random: f64[R, F], hidden in R random orders.
    """

    fractions: np.ndarray
    hidden: np.ndarray
    top: np.ndarray
    random: np.ndarray

    @property
    def area(self) -> float:
        """Below the overlay's curve, 0 to 1."""
        return float(area(self.fractions, self.top))

    @property
    def random_areas(self) -> np.ndarray:
        """Below the curve of each random order, f64[R]."""
        return area(self.fractions, self.random)

    @property
    def gap(self) -> float:
        """Mean area of the random orders less the overlay's: above zero where it is faithful."""
        return float(self.random_areas.mean()) - self.area

    def report(self) -> dict[str, Any]:
        """The figures for JSON."""
        low, high = np.percentile(self.random, INTERVAL, axis=0)
        areas = self.random_areas
        return {
            "fractions": self.fractions.tolist(),
            "patches_hidden": self.hidden.tolist(),
            "probability": self.top.tolist(),
            "random_mean": self.random.mean(0).tolist(),
            "random_interval95": [low.tolist(), high.tolist()],
            "random_orders": len(self.random),
            "area": self.area,
            "random_area": float(areas.mean()),
            "random_area_interval95": np.percentile(areas, INTERVAL).tolist(),
            "gap": self.gap,
            "random_orders_beaten": float((areas > self.area).mean()),
        }


def area(fractions: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Area below curves by the trapezoidal rule: f64[F], f64[..., F] -> f64[...]."""
    return ((values[..., 1:] + values[..., :-1]) / 2 * np.diff(fractions)).sum(-1)


def curve(
    probability: Probability,
    attribution: np.ndarray,
    candidates: np.ndarray,
    *,
    fractions: Sequence[float] = FRACTIONS,
    draws: int = 16,
    seed: int = 0,
) -> Curve:
    """Hides more and more patches, in the order of the overlay and in random orders.

    Args:
      probability: of the answer; called once with all masks.
      attribution: f64[P]; the largest are hidden first, ties in the order of the patches.
      candidates: bool[P], patches that are there to be hidden. Those that show padding only are
        not: hiding them changes nothing, which would flatter the overlay.
      fractions: ascending, from 0 to 1; at least one patch is hidden from the second one on.
      draws: R, random orders.
      seed: of the orders.

    Raises:
      ValueError: no candidates, no draws, or fractions that do not go from 0 up to 1.
    """
    wanted, places = np.asarray(fractions, np.float64), np.flatnonzero(candidates)
    if len(wanted) < 2 or wanted[0] != 0 or wanted[-1] != 1 or (np.diff(wanted) <= 0).any():
        raise ValueError(f"fractions {list(fractions)} must ascend from 0 to 1")
    if not len(places) or draws < 1:
        raise ValueError(f"{len(places)} patches and {draws} random orders; give one at least")
    counts = np.rint(wanted * len(places)).astype(np.int64)
    counts[1:] = np.maximum(counts[1:], 1)
    rng = np.random.default_rng(seed)
    best = places[np.argsort(-attribution[places], kind="stable")]
    orders = [best, *(rng.permutation(places) for _ in range(draws))]
    # Nothing and everything hidden are the same for all orders.
    masks = np.zeros((2 + len(orders) * (len(counts) - 2), len(candidates)), bool)
    masks[1, places] = True
    for number, order in enumerate(orders):
        for place, count in enumerate(counts[1:-1]):
            masks[2 + number * (len(counts) - 2) + place, order[:count]] = True
    found = np.asarray(probability(masks), np.float64)
    middle = found[2:].reshape(len(orders), -1)
    ends = np.broadcast_to(found[:2], (len(orders), 2))
    curves = np.concatenate([ends[:, :1], middle, ends[:, 1:]], axis=1)
    return Curve(counts / len(places), counts, curves[0], curves[1:])


def aggregate(
    curves: Sequence[Curve], clusters: Sequence[str], samples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """The figures of many questions, for JSON.

    Args:
      curves: of like fractions; their own fractions may differ a little, as patches are whole.
      clusters: of each question, equal where the image is: drawn together in the bootstrap.
      samples: of the bootstrap.
      seed: of the bootstrap.

    Returns:
      questions, images; the mean curves with the mean share hidden; and mean, ci95 of area,
      random_area, their paired difference gap, and random_orders_beaten (the share of random orders
      whose area is larger; one half for an overlay that says nothing).
    """
    areas = np.array([one.area for one in curves])
    random = np.array([one.random_areas.mean() for one in curves])
    beaten = np.array([(one.random_areas > one.area).mean() for one in curves])
    boot = bootstrap.Bootstrap.draw(clusters, samples, seed)
    columns = {"area": areas, "random_area": random, "gap": random - areas}
    columns |= {"random_orders_beaten": beaten}
    intervals = boot.intervals(bootstrap.means(np.stack(list(columns.values()), 1)))
    return {
        "questions": len(curves),
        "images": len(set(clusters)),
        "fractions": np.mean([one.fractions for one in curves], 0).tolist(),
        "probability": np.mean([one.top for one in curves], 0).tolist(),
        "random_mean": np.mean([one.random.mean(0) for one in curves], 0).tolist(),
    } | {
        name: {"mean": float(column.mean()), "ci95": bootstrap.pair_or_none(interval)}
        for (name, column), interval in zip(columns.items(), intervals, strict=True)
    }
