"""Intervals: draws of images with all their rows."""

from __future__ import annotations

import numpy as np
import pytest

from medmoe_jax.evaluation import bootstrap


def test_intervals_draw_images_not_rows() -> None:
    # 20 images with 10 equal rows each: as uncertain as 20 rows, not as 200.
    right = np.repeat(np.arange(20) % 2, 10).astype(float)
    by_image = [str(i // 10) for i in range(200)]
    widths = []
    for clusters in (by_image, [str(i) for i in range(200)]):
        boot = bootstrap.Bootstrap.draw(clusters, 2000, 3)
        cell = bootstrap.cells({"x": right}, boot)["x"]
        assert cell["percent"] == 50 and cell["n"] == 200
        low, high = cell["ci95"]
        widths.append(high - low)
    # Binomial: 2 * 1.96 * sqrt(.25 / n) = 43.8 points for 20, 13.9 for 200.
    assert widths[0] == pytest.approx(43.8, rel=0.12)
    assert widths[1] == pytest.approx(13.9, rel=0.12)


def test_intervals_are_the_percentiles_of_explicit_resamples() -> None:
    rng = np.random.default_rng(5)
    clusters = [str(i) for i in rng.integers(0, 12, 40)]
    value = np.where(rng.random(40) < 0.2, np.nan, rng.random(40))
    boot = bootstrap.Bootstrap.draw(clusters, 250, 7)
    drawn = []
    for times in boot.times:
        again = [value[boot.image == i] for i, k in enumerate(times) for _ in range(k)]
        drawn.append(np.nanmean(np.concatenate(again)))
    want = 100 * np.percentile(drawn, [2.5, 97.5])
    assert bootstrap.cells({"x": value}, boot)["x"]["ci95"] == pytest.approx(want.tolist())
    assert (boot.times.sum(1) == len(set(clusters))).all()


def test_intervals_where_there_are_none() -> None:
    one = bootstrap.Bootstrap.draw(["a", "a"], 20, 0)
    column = {"x": np.array([0.0, 1.0])}
    assert bootstrap.cells(column, one)["x"] == {"percent": 50, "n": 2, "ci95": None}
    none = bootstrap.Bootstrap.draw(["a", "b"], 0, 0)
    assert bootstrap.cells(column, none)["x"]["ci95"] is None
    empty = {"x": np.array([np.nan, np.nan])}
    two = bootstrap.Bootstrap.draw(["a", "b"], 20, 0)
    assert bootstrap.cells(empty, two)["x"] == {"percent": None, "n": 0, "ci95": None}
    assert bootstrap.cells({}, two) == {}
