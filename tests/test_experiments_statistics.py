"""Means, deviations and paired intervals over seeds, against direct computation."""

from __future__ import annotations

import numpy as np
import pytest

from medmoe_jax.experiments import statistics
from medmoe_jax.experiments.statistics import ALL, Scores

NAN = float("nan")


def scores(values: list[list[float]], images: list[str] | None = None) -> Scores:
    named = images or [f"i{n}" for n in range(len(values))]
    return Scores(("open", "closed"), np.array(values, np.float64), named)


def test_levels_are_means_of_questions_then_of_seeds():
    first = scores([[1, NAN], [0, NAN], [0.5, NAN], [NAN, 1], [NAN, 0]])
    second = scores([[1, NAN], [1, NAN], [0.7, NAN], [NAN, 1], [NAN, 1]])
    found = statistics.levels([first, second])
    assert found["open"].seeds == pytest.approx((50.0, 90.0))
    assert found["open"].mean == pytest.approx(70.0)
    assert found["open"].std == pytest.approx(np.std([50, 90], ddof=1))
    assert found["closed"].seeds == pytest.approx((50.0, 100.0))
    assert found[ALL].seeds == pytest.approx((50.0, 95.0))
    assert statistics.levels([first])["open"].std is None
    assert found["open"].text() == "70.0 ± 28.3"


def test_interval_of_one_seed_is_that_of_drawn_images():
    """Against a bootstrap written out: images are drawn with all their rows."""
    rng = np.random.default_rng(0)
    images = [f"i{n // 3}" for n in range(90)]
    a, b = rng.random((90, 2)), rng.random((90, 2))
    a[::2, 0] = b[::2, 0] = NAN
    found = statistics.differences([scores(a, images)], [scores(b, images)], samples=4000)
    drawn = []
    for _ in range(4000):
        picked = rng.integers(30, size=30)
        rows = np.concatenate([np.arange(3 * i, 3 * i + 3) for i in picked])
        drawn.append(100 * np.nanmean(a[rows] - b[rows], 0))
    low, high = np.percentile(drawn, (2.5, 97.5), axis=0)
    for place, name in enumerate(("open", "closed")):
        assert found[name].mean == pytest.approx(100 * np.nanmean(a[:, place] - b[:, place]))
        spread = high[place] - low[place]
        assert abs(found[name].low - low[place]) < 0.1 * spread
        assert abs(found[name].high - high[place]) < 0.1 * spread
    assert found[ALL].mean == pytest.approx((found["open"].mean + found["closed"].mean) / 2)


def test_seeds_are_drawn_too():
    """Seeds that disagree widen the interval beyond what the questions alone give."""
    same = [scores([[0.5, 0.5]] * 50)] * 3
    apart = [scores([[0.5 + gain, 0.5 + gain]] * 50) for gain in (0.0, 0.1, 0.2)]
    found = statistics.differences(apart, same, samples=3000)["open"]
    assert found.mean == pytest.approx(10.0)
    # The mean of 3 out of (0, 10, 20) drawn with replacement: each end has probability 1 / 27.
    assert found.low == pytest.approx(0.0) and found.high == pytest.approx(20.0)
    assert found.verdict == 0


def test_verdicts_come_from_the_interval():
    low = [scores([[0.2, 0.2]] * 20)] * 2
    high = [scores([[0.4, 0.4]] * 20)] * 2
    assert statistics.differences(high, low, 200)["open"].verdict == 1
    assert statistics.differences(low, high, 200)["open"].verdict == -1
    assert statistics.differences(low, low, 200)["open"].verdict == 0


def test_other_questions_cannot_be_compared():
    with pytest.raises(ValueError, match="same questions"):
        statistics.differences([scores([[1, 1]], ["a"])], [scores([[1, 1]], ["b"])], 10)


def test_without_draws_there_is_no_interval():
    found = statistics.differences([scores([[1, 1]])], [scores([[0, 1]])], 0)["open"]
    assert found.mean == 100 and found.verdict == 0 and found.text() == "+100.0 (no interval)"
    assert statistics.as_json(found) == {"mean": 100, "low": None, "high": None, "verdict": 0}
