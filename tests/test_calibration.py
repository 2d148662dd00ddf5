"""Confidence quality against hand-worked numbers, scikit-learn and slower ways to compute it."""

from __future__ import annotations

import json
from itertools import permutations
from typing import Any

import numpy as np
import pytest

from medmoe_jax.data.problems import DataError
from medmoe_jax.evaluation import confidence, text
from medmoe_jax.evaluation.bootstrap import Bootstrap
from medmoe_jax.evaluation.report import report

Json = dict[str, Any]


def rows_of(
    values: list[float | None], right: list[bool], kind: str = "CLOSED", image: str = ""
) -> tuple[list[Json], list[Json]]:
    turns = [{"value": "Is it?"}, {"value": "no"}]
    rows = [
        {"id": i, "image": image or f"{i}.png", "answer_type": kind, "conversations": turns}
        for i in range(len(values))
    ]
    answers = [
        {"question_id": i, "text": "no" if ok else "yes", "metadata": {"confidence": p}}
        for i, (p, ok) in enumerate(zip(values, right, strict=True))
    ]
    return rows, answers


def drawn(n: int, seed: int, temperature: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Confidences whose log-odds are `temperature` times too large, and what was right."""
    rng = np.random.default_rng(seed)
    odds = rng.normal(0.7, 1.5, n)
    return 1 / (1 + np.exp(-odds * temperature)), rng.random(n) < 1 / (1 + np.exp(-odds))


def test_by_hand() -> None:
    values = np.array([0.95, 0.91, 0.5, 0.45, 0.05, 1.0])
    right = np.array([True, False, True, False, False, True])
    found = confidence.scores(values, right)
    # Bins: (.9, 1] has .95 + .91 + 1 against 2 right; (.4, .5] .5 + .45 against 1; (0, .1] .05.
    assert found["ece"] == pytest.approx((0.86 + 0.05 + 0.05) / 6)
    squares = 0.05**2 + 0.91**2 + 0.5**2 + 0.45**2 + 0.05**2
    assert found["brier"] == pytest.approx(squares / 6)
    # Sorted: right, right, wrong, right, wrong, wrong.
    assert found["aurc"] == pytest.approx((0 + 0 + 1 / 3 + 1 / 4 + 2 / 5 + 3 / 6) / 6)
    bars = confidence.reliability(values, right)
    assert [bar["n"] for bar in bars] == [1, 0, 0, 0, 2, 0, 0, 0, 0, 3]
    assert bars[9] == {
        "low": 0.9,
        "high": 1.0,
        "n": 3,
        "confidence": pytest.approx(2.86 / 3),
        "accuracy": pytest.approx(2 / 3),
    }
    assert bars[1]["accuracy"] is None
    curve = confidence.risk_coverage(values, right)
    assert curve["coverage"] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])
    assert curve["risk"] == pytest.approx([0, 0, 1 / 3, 1 / 4, 2 / 5, 1 / 2])
    assert curve["threshold"] == pytest.approx([1, 0.95, 0.91, 0.5, 0.45, 0.05])


def test_edges_of_the_bins() -> None:
    bars = confidence.reliability(np.array([0.0, 0.1, 0.2, 1.0]), np.ones(4, bool))
    assert [bar["n"] for bar in bars] == [2, 1, 0, 0, 0, 0, 0, 0, 0, 1]


def test_brier_and_loss_are_those_of_sklearn() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    values, right = drawn(300, 1, 2.0)
    assert confidence.scores(values, right)["brier"] == pytest.approx(
        sklearn.brier_score_loss(right, values)
    )
    found = confidence.temperature_report((values, right), (values, right), "itself")
    assert found is not None
    for side, temperature in (("before", 1.0), ("after", found["temperature"])):
        softened = confidence.with_temperature(values, temperature)
        want = sklearn.log_loss(right, softened)
        assert found[side]["nll"] == pytest.approx(want, abs=1e-6), side
        assert found[side]["brier"] == pytest.approx(sklearn.brier_score_loss(right, softened))


def test_equal_confidences_count_as_in_random_order() -> None:
    values = np.array([0.9, 0.5, 0.5, 0.5, 0.2])
    right = np.array([True, False, True, True, False])
    orders = []
    for order in permutations(range(1, 4)):
        wrong = ~right[[0, *order, 4]]
        orders.append((np.cumsum(wrong) / np.arange(1, 6)).mean())
    assert confidence.scores(values, right)["aurc"] == pytest.approx(np.mean(orders))
    curve = confidence.risk_coverage(values, right)
    assert curve["coverage"] == pytest.approx([0.2, 0.8, 1.0])
    assert curve["risk"] == pytest.approx([0, 1 / 4, 2 / 5])


def test_constant_confidence() -> None:
    values, right = [0.7] * 20, [i % 4 > 0 for i in range(20)]
    found = report(*rows_of(values, right), samples=50)["confidence"]["all"]
    assert found["ece"] == pytest.approx(0.05) and found["aurc"] == pytest.approx(0.25)
    assert found["risk_coverage"] == {"coverage": [1], "risk": [0.25], "threshold": [0.7]}
    wrong = np.arange(1, 6) / np.arange(16, 21)  # the best order keeps the errors for the end
    assert found["aurc_best"] == pytest.approx(wrong.sum() / 20)


def test_curves_are_thinned() -> None:
    values, right = drawn(2000, 3)
    curve = confidence.risk_coverage(values, right)
    assert len(curve["risk"]) == confidence.POINTS
    assert (curve["coverage"][0], curve["coverage"][-1]) == (1 / 2000, 1)
    assert curve["risk"][-1] == pytest.approx(1 - right.mean())


@pytest.mark.parametrize("true", [0.5, 1.0, 3.0])
def test_temperature_is_found_again(true: float) -> None:
    values, right = drawn(20000, 4, true)
    found = confidence.fit_temperature(values, right)
    assert found == pytest.approx(true, rel=0.04)
    grid = np.exp(np.linspace(np.log(true / 2), np.log(true * 2), 400))

    def loss(t: float) -> float:
        p = confidence.with_temperature(values, t)
        return -np.log(np.where(right, p, 1 - p)).mean()

    assert found == pytest.approx(grid[np.argmin([loss(t) for t in grid])], rel=0.01)


def test_temperature_helps_on_other_rows() -> None:
    fit, test = drawn(3000, 5, 4.0), drawn(3000, 6, 4.0)
    found = confidence.temperature_report(fit, test, "others")
    assert found is not None and not found["at_bound"] and found["temperature"] > 3
    for name in ("ece", "brier", "nll"):
        assert found["after"][name] < found["before"][name]
    order = np.argsort(test[0])
    assert (np.diff(confidence.with_temperature(test[0], 4.0)[order]) >= 0).all()


def test_temperature_without_an_optimum() -> None:
    sure = np.array([0.9, 0.8])
    all_right = confidence.temperature_report(
        (sure, np.ones(2, bool)), (sure, np.ones(2, bool)), ""
    )
    assert all_right is not None and all_right["at_bound"] and all_right["temperature"] < 0.011
    wrong = confidence.temperature_report((sure, np.zeros(2, bool)), (sure, np.ones(2, bool)), "")
    assert wrong is not None and wrong["at_bound"] and wrong["temperature"] > 99
    none = np.empty(0)
    assert confidence.temperature_report((none, none.astype(bool)), (sure, sure > 0), "") is None
    ends = confidence.with_temperature(np.array([0.0, 1.0]), 0.01)
    assert np.isfinite(ends).all() and ends == pytest.approx([0, 1])


def test_halves_keep_images_whole() -> None:
    image = np.random.default_rng(0).integers(5, 50, 300) * 7
    first = confidence.halves(image, 1)
    assert not set(image[first]) & set(image[~first])
    assert abs(len(set(image[first])) - len(set(image[~first]))) <= 1
    assert (first == confidence.halves(image, 1)).all()
    assert (first != confidence.halves(image, 2)).any()


def test_a_temperature_from_other_rows() -> None:
    values, right = drawn(400, 8, 3.0)
    others = drawn(400, 9, 3.0)
    mine = rows_of(values.tolist(), right.tolist())
    theirs = rows_of(others[0].tolist(), others[1].tolist(), image="elsewhere.png")
    found = report(*mine, calibrate_on=theirs, metric="official", samples=0)["confidence"]
    fitted = found["all"]["temperature"]
    assert fitted["temperature"] == pytest.approx(confidence.fit_temperature(*others))
    assert (fitted["n_fit"], fitted["n"], found["shared_images"]) == (400, 400, 0)
    assert fitted["before"]["brier"] == pytest.approx(found["all"]["brier"])
    half = report(*mine, metric="official", samples=0)["confidence"]["all"]["temperature"]
    assert half["n_fit"] == half["n"] == 200 and "half of the images (seed 0)" in half["fitted_on"]
    with pytest.raises(DataError, match="the calibration predictions"):
        report(*mine, calibrate_on=(theirs[0], theirs[1][1:]))


def test_what_is_right_and_which_rows_count() -> None:
    rows, answers = rows_of([0.9, None, 0.8, 0.7, 0.6], [True, True, False, True, False])
    rows[2]["answer_type"] = "open"
    rows[3]["answer_type"] = "other"
    rows[4]["answer_type"] = "appearance"
    answers[2]["text"] = "no, no"  # full recall, no exact match
    found = report(rows, answers, samples=30)["confidence"]
    assert found["n_without"] == 2  # one null, one that is neither open nor closed
    assert {kind: found[kind]["n"] for kind in ("all", "closed", "open")} == {
        "all": 3,
        "closed": 1,
        "open": 2,
    }
    assert found["open"]["accuracy_percent"] == 50
    assert found["open"]["brier"] == pytest.approx((0.8**2 + 0.3**2) / 2)
    assert found["closed"]["ci95"] == {"ece": None, "brier": None, "aurc": None}
    assert "2 rows without a confidence are left out." in text.markdown(report(rows, answers))


@pytest.mark.parametrize("kind", ["CLOSED", "open"])
def test_one_kind(kind: str) -> None:
    found = report(*rows_of([0.9, 0.4], [True, False], kind), samples=20, abstain_below=0.5)
    mine = found["confidence"]
    assert ("open" in mine, "closed" in mine) == (kind == "open", kind == "CLOSED")
    json.dumps(found, allow_nan=False)
    assert "## Confidence" in text.markdown(found)


def test_no_confidences() -> None:
    found = report(*rows_of([None, None], [True, False]), abstain_below=0.5)
    assert found["confidence"] is None and "Confidence" not in text.markdown(found)


def test_abstaining() -> None:
    values, right = [0.9, 0.8, 0.5, 0.3], [True, True, False, True]
    found = report(*rows_of(values, right), abstain_below=0.8, samples=100)
    mine = found["confidence"]["closed"]["abstain"]
    assert (mine["below"], mine["n"], mine["n_answered"]) == (0.8, 4, 2)
    assert (mine["coverage_percent"], mine["accuracy_percent"]) == (50, 100)
    assert mine["withheld_accuracy_percent"] == 50 and mine["accuracy_ci95"] == [100, 100]
    assert "withheld below a confidence of 0.8" in text.markdown(found)
    boot = Bootstrap.draw(list("abcd"), 10, 0)
    values_, right_ = np.array(values), np.array(right)
    everything = confidence.abstain(values_, right_, boot, 0.0)
    assert everything["coverage_percent"] == 100
    assert everything["withheld_accuracy_percent"] is None
    nothing = confidence.abstain(values_, right_, boot, 0.95)
    assert (nothing["n_answered"], nothing["accuracy_percent"]) == (0, None)
    assert nothing["accuracy_ci95"] is None


def test_intervals_resample_images() -> None:
    values, right = drawn(60, 11, 2.0)
    rows, answers = rows_of(values.tolist(), right.tolist())
    for i, row in enumerate(rows):
        row["image"] = f"{i // 3}.png"
    found = report(rows, answers, samples=200, seed=4)["confidence"]["all"]
    boot = Bootstrap.draw([f"image {row['image']}" for row in rows], 200, 4)
    again = []
    for times in boot.times:
        take = np.concatenate(
            [np.flatnonzero(boot.image == i) for i, k in enumerate(times) for _ in range(k)]
        )
        again.append(list(confidence.scores(values[take], right[take]).values()))
    want = np.percentile(again, [2.5, 97.5], axis=0).T
    for name, ends in zip(("ece", "brier", "aurc"), want, strict=True):
        assert found["ci95"][name] == pytest.approx(ends.tolist())
        assert ends[0] < ends[1]
