"""Attributions and deletion curves of functions whose truth is known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from medmoe_jax.analyse import deletion, saliency
from medmoe_jax.analyse.deletion import Curve

WORTH = np.array([0.0, 3.0, -1.0, 2.0, 0.5, 0.0])  # of six patches; the last is padding
THERE = np.array([1, 1, 1, 1, 1, 0], bool)


def probability(hidden: np.ndarray) -> np.ndarray:
    """A logistic function of the patches that are seen."""
    return 1 / (1 + np.exp(1 - (~hidden) @ WORTH))


def test_deletion_curve_of_a_known_function() -> None:
    fractions = (0, 0.2, 0.4, 0.6, 0.8, 1)
    seen: list[np.ndarray] = []

    def watched(hidden: np.ndarray) -> np.ndarray:
        seen.append(hidden)
        return probability(hidden)

    found = deletion.curve(watched, WORTH, THERE, fractions=fractions, draws=200, seed=3)
    assert len(seen) == 1 and not seen[0][:, 5].any(), "padding is never hidden"
    left = [4.5, 1.5, -0.5, -1.0, -1.0, 0.0]  # worth of what is seen, best patches hidden first
    np.testing.assert_allclose(found.top, 1 / (1 + np.exp(1 - np.array(left))))
    assert found.hidden.tolist() == [0, 1, 2, 3, 4, 5]
    np.testing.assert_allclose(found.fractions, fractions)
    assert (found.random[:, [0, -1]] == found.top[[0, -1]]).all()
    # All orders, not only those drawn: the overlay's is among the best of them.
    areas = []
    for order in itertools.permutations(range(5)):
        masks = np.zeros((6, 6), bool)
        for count in range(1, 6):
            masks[count, list(order[:count])] = True
        areas.append(np.trapezoid(probability(masks), fractions))
    assert found.area == pytest.approx(np.trapezoid(found.top, fractions))
    assert found.area <= min(areas) + 1e-9
    assert found.random_areas.mean() == pytest.approx(np.mean(areas), abs=0.02)
    assert found.gap == pytest.approx(np.mean(areas) - min(areas), abs=0.02)
    report = found.report()
    assert report["random_orders"] == 200 and report["random_orders_beaten"] > 0.9
    low, high = np.array(report["random_interval95"])
    mean = np.array(report["random_mean"])
    assert (low - 1e-12 <= mean).all() and (mean <= high + 1e-12).all()
    np.testing.assert_allclose(mean[0], found.top[0])


def test_an_upside_down_overlay_has_a_gap_below_zero() -> None:
    found = deletion.curve(probability, -WORTH, THERE, draws=50)
    assert found.gap < -0.1 and found.report()["random_orders_beaten"] < 0.1


def test_random_overlays_are_neither_better_nor_worse() -> None:
    rng = np.random.default_rng(0)
    curves = [
        deletion.curve(probability, rng.permutation(6.0 * THERE), THERE, draws=8, seed=i)
        for i in range(60)
    ]
    found = deletion.aggregate(curves, [str(i) for i in range(60)])
    low, high = found["gap"]["ci95"]
    assert low < 0 < high and abs(found["gap"]["mean"]) < 0.05
    assert found["random_orders_beaten"]["mean"] == pytest.approx(0.5, abs=0.12)


def test_aggregate_is_the_mean_over_questions() -> None:
    x = np.array([0.0, 0.5, 1.0])
    one = Curve(x, np.array([0, 1, 2]), np.array([1.0, 0, 0]), np.array([[1.0, 1, 0], [1, 0.5, 0]]))
    two = Curve(x, np.array([0, 1, 2]), np.array([1.0, 1, 0]), np.array([[1.0, 1, 0], [1, 0, 0]]))
    found = deletion.aggregate([one, two], ["a", "b"], samples=200)
    assert found["area"]["mean"] == pytest.approx((0.25 + 0.75) / 2)
    assert found["random_area"]["mean"] == pytest.approx((0.625 + 0.5) / 2)
    assert found["gap"]["mean"] == pytest.approx((0.375 - 0.25) / 2)
    assert found["gap"]["ci95"] == pytest.approx([-0.25, 0.375])
    assert found["random_orders_beaten"]["mean"] == 0.5
    assert found["probability"] == [1, 0.5, 0] and found["questions"] == found["images"] == 2
    alone = deletion.aggregate([one, one], ["a", "a"])
    assert alone["gap"]["ci95"] is None and alone["images"] == 1


def test_few_patches_and_bad_settings() -> None:
    found = deletion.curve(probability, WORTH, np.arange(6) == 1, draws=2)
    assert found.hidden.tolist() == [0] + [1] * 7
    for fractions in [(0, 1, 1), (0.1, 1), (0, 0.5), (0,), (0, 0.7, 0.5, 1)]:
        with pytest.raises(ValueError, match="ascend from 0 to 1"):
            deletion.curve(probability, WORTH, THERE, fractions=fractions)
    with pytest.raises(ValueError, match="0 patches"):
        deletion.curve(probability, WORTH, ~THERE & False)
    with pytest.raises(ValueError, match="0 random orders"):
        deletion.curve(probability, WORTH, THERE, draws=0)


def test_integrated_gradients_of_known_functions() -> None:
    """Exact for a quadratic function, and complete for a product; batches do not matter."""
    x, zero = np.array([1.0, -2.0, 3.0]), np.array([0.5, 0.0, 1.0])
    square = saliency.integrated_gradients(lambda p: 2 * p, x, zero, steps=5, at_once=2)
    np.testing.assert_allclose(square, x**2 - zero**2, rtol=1e-6)

    def product(p: np.ndarray) -> np.ndarray:
        return np.stack([p[:, 1] * p[:, 2], p[:, 0] * p[:, 2], p[:, 0] * p[:, 1]], 1)

    found = saliency.integrated_gradients(product, x, zero, steps=200, at_once=7)
    assert found.sum() == pytest.approx(x.prod() - zero.prod(), abs=1e-4)


def test_occlusion_takes_each_patch_away_alone() -> None:
    found = saliency.occlusion(lambda hidden: (~hidden) @ WORTH, THERE)
    np.testing.assert_allclose(found, WORTH)


def test_pixels_to_patches() -> None:
    values = np.zeros((2, 4, 6, 3))
    values[1, 2:4, 4:6] = 1.0
    found = saliency.to_patches(values, 2)
    assert found.shape == (2, 2, 3) and found.sum() == 12 and found[1, 1, 2] == 12
