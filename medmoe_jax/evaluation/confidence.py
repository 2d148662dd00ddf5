"""Whether a confidence means what it says: calibration, and what abstaining buys.

An answer is right if it is strictly so: `closed_correct` of a closed question, exact match of an
open one. Its confidence is the probability that the model gave to the whole answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from medmoe_jax import metrics
from medmoe_jax.evaluation.bootstrap import Bootstrap, cells, pair_or_none
from medmoe_jax.evaluation.rows import Item

BINS = 10  # of equal width, for the reliability diagram and ECE
POINTS = 200  # most points of a stored curve
EDGE = 1e-6  # confidences are kept this far from 0 and 1 where their log-odds are taken
TEMPERATURES = (0.01, 100.0)
KINDS = ("all", "closed", "open")
SCORES = ("ece", "brier", "aurc")


def graded(items: Sequence[Item]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What calibration is computed from.

    Returns:
      confidence f64[n] (NaN: none, or an answer type that is neither open nor closed), right
      bool[n], closed bool[n].
    """
    rows = metrics.strict([item.answer for item in items])["per_sample"]
    values = [
        item.confidence if row and item.confidence is not None else np.nan
        for item, row in zip(items, rows, strict=True)
    ]
    right = [row.get("closed_correct", row.get("exact_match", False)) for row in rows]
    closed = ["closed_correct" in row for row in rows]
    return np.array(values, np.float64), np.array(right, bool), np.array(closed, bool)


def report(
    items: Sequence[Item],
    boot: Bootstrap,
    seed: int = 0,
    calibrate_on: Sequence[Item] | None = None,
    abstain_below: float | None = None,
) -> dict[str, Any] | None:
    """Quality of the confidences of all, of closed and of open questions.

    Args:
      items: n rows.
      boot: of the same rows.
      seed: of the halves, see `calibrate_on`.
      calibrate_on: rows that a temperature is fitted on; it is then tried on all of `items`. None:
        fitted on a random half of the images and tried on the other half.
      abstain_below: answers with a smaller confidence are withheld.

    Returns:
      None where no row has a confidence; else n_without, shared_images (of `calibrate_on` and
      `items`: should be 0), and for all, closed and open, as far as there are rows: n,
      accuracy_percent, accuracy_ci95, mean_confidence_percent, ece, brier and aurc (see `scores`),
      ci95 (of these three), aurc_best (with all right answers before the wrong ones), reliability,
      risk_coverage, temperature (see `temperature_report`), abstain.
    """
    confidence, right, closed = graded(items)
    known = np.isfinite(confidence)
    if not known.any():
        return None
    others = None if calibrate_on is None else graded(calibrate_on)
    seen = {item.image for item in calibrate_on or () if item.image}
    found: dict[str, Any] = {
        "n_without": int((~known).sum()),
        "shared_images": len(seen & {item.image for item in items}),
    }
    for kind in KINDS:
        chosen = known & _of(kind, closed)
        if not chosen.any():
            continue
        mine = found[kind] = _kind(confidence[chosen], right[chosen], boot.rows(chosen))
        if others is None:
            fit = halves(boot.image, seed)
            mine["temperature"] = temperature_report(
                (confidence[chosen & fit], right[chosen & fit]),
                (confidence[chosen & ~fit], right[chosen & ~fit]),
                f"a random half of the images (seed {seed}), reported on the other half",
            )
        else:
            own = np.isfinite(others[0]) & _of(kind, others[2])
            mine["temperature"] = temperature_report(
                (others[0][own], others[1][own]),
                (confidence[chosen], right[chosen]),
                "other rows (--calibrate-on)",
            )
        if abstain_below is not None:
            mine["abstain"] = abstain(
                confidence[chosen], right[chosen], boot.rows(chosen), abstain_below
            )
    return found


def scores(confidence: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """Figures of calibration and ranking; lower is better.

    Args:
      confidence: f64[n], 0..1, n >= 1.
      right: bool[n].

    Returns:
      ece: expected calibration error over BINS bins of equal width. Few rows make it too large on
        average, and resampled ones a little more, so that its interval lies somewhat high.
      brier: mean squared distance of the confidence from 0 (wrong) or 1 (right).
      aurc: area under the risk-coverage curve: mean over k = 1..n of the share of wrong answers
        among the k most confident ones. Equal confidences count as in random order.

    Source: Guo et al. 2017 (ECE), Brier 1950, Geifman and El-Yaniv 2017 (AURC).
    """
    gap = np.bincount(_bin(confidence), confidence - right, BINS)
    return {
        "ece": float(np.abs(gap).sum() / len(confidence)),
        "brier": float(np.mean((confidence - right) ** 2)),
        "aurc": float(_risks(confidence, right)[0].mean()),
    }


def reliability(confidence: np.ndarray, right: np.ndarray) -> list[dict[str, Any]]:
    """The bars of the reliability diagram.

    Returns:
      BINS dicts: low, high (of the bin; low itself belongs to the one before), n, confidence and
      accuracy (means, 0..1; None where empty).
    """
    place = _bin(confidence)
    bars = []
    for i in range(BINS):
        mine = place == i
        filled = mine.any()
        bars.append(
            {
                "low": i / BINS,
                "high": (i + 1) / BINS,
                "n": int(mine.sum()),
                "confidence": float(confidence[mine].mean()) if filled else None,
                "accuracy": float(right[mine].mean()) if filled else None,
            }
        )
    return bars


def risk_coverage(confidence: np.ndarray, right: np.ndarray) -> dict[str, list[float]]:
    """Share of wrong answers (risk) among the answered ones, from sure to unsure.

    Returns:
      coverage, risk and threshold (smallest confidence answered), 0..1, one point a distinct
      confidence, thinned to POINTS.
    """
    risk, last, values = _risks(confidence, right)
    places = np.unique(np.linspace(0, len(last) - 1, min(POINTS, len(last))).round().astype(int))
    ends = last[places]
    return {
        "coverage": ((ends + 1) / len(confidence)).tolist(),
        "risk": risk[ends].tolist(),
        "threshold": values[places].tolist(),
    }


def fit_temperature(confidence: np.ndarray, right: np.ndarray) -> float:
    """The T that makes sigmoid(log-odds(confidence) / T) most likely, given what was right.

    Args:
      confidence: f64[n], 0..1, n >= 1.
      right: bool[n].

    Returns:
      T in TEMPERATURES; > 1 where the model is too sure. No T turns a confidence below one half
      into one above it. All right (or all wrong) on the same side of one half gives an end.

    Source: Guo et al. 2017, for one probability instead of logits.
    """
    from scipy.optimize import minimize_scalar

    bounds = np.log(TEMPERATURES)
    found = minimize_scalar(
        lambda t: _likelihood_loss(confidence, right, float(np.exp(t))),
        bounds=tuple(bounds),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return float(np.exp(found.x))  # pyright: ignore[reportAttributeAccessIssue]


def with_temperature(confidence: np.ndarray, temperature: float) -> np.ndarray:
    """Confidences f64[n] after dividing their log-odds by a temperature."""
    half = _log_odds(confidence) / temperature / 2
    return (1 + np.tanh(half)) / 2  # the sigmoid, without overflow


def temperature_report(
    fit: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray], on: str
) -> dict[str, Any] | None:
    """A temperature fitted on some rows and its effect on others.

    Args:
      fit: confidence f64[m] and right bool[m].
      test: confidence f64[n] and right bool[n].
      on: what `fit` is, in words.

    Returns:
      fitted_on, n_fit, n, temperature, at_bound (no finite optimum), before and after (each ece,
      brier, nll on `test`); None where either side has no rows.
    """
    if not len(fit[0]) or not len(test[0]):
        return None
    found = fit_temperature(*fit)
    report: dict[str, Any] = {
        "fitted_on": on,
        "n_fit": len(fit[0]),
        "n": len(test[0]),
        "temperature": found,
        "at_bound": not TEMPERATURES[0] * 1.01 < found < TEMPERATURES[1] / 1.01,
    }
    for name, value in (("before", 1.0), ("after", found)):
        confidence = test[0] if name == "before" else with_temperature(test[0], value)
        report[name] = scores(confidence, test[1])
        del report[name]["aurc"]  # ranks do not change
        report[name]["nll"] = _likelihood_loss(test[0], test[1], value)
    return report


def abstain(
    confidence: np.ndarray, right: np.ndarray, boot: Bootstrap, below: float
) -> dict[str, Any]:
    """What is answered, and how well, when answers with a confidence below `below` are withheld.

    Returns:
      below, n, n_answered, coverage_percent, accuracy_percent with accuracy_ci95 (of what is
      answered), withheld_accuracy_percent; None where there are no such answers.
    """
    kept = confidence >= below
    found = cells({"kept": np.where(kept, right, np.nan)}, boot)["kept"]
    return {
        "below": below,
        "n": len(kept),
        "n_answered": int(kept.sum()),
        "coverage_percent": 100 * float(kept.mean()),
        "accuracy_percent": found["percent"],
        "accuracy_ci95": found["ci95"],
        "withheld_accuracy_percent": 100 * float(right[~kept].mean()) if (~kept).any() else None,
    }


def halves(image: np.ndarray, seed: int) -> np.ndarray:
    """bool[n]: rows of a random half of the images; all rows of an image are on one side."""
    _, image = np.unique(image, return_inverse=True)
    n = int(image.max()) + 1
    first = np.zeros(n, bool)
    first[np.random.default_rng(seed).permutation(n)[: n // 2]] = True
    return first[image]


def _kind(confidence: np.ndarray, right: np.ndarray, boot: Bootstrap) -> dict[str, Any]:
    def statistic(times: np.ndarray) -> np.ndarray:
        drawn = np.full((len(times), len(SCORES)), np.nan)
        for place, row in enumerate(times.astype(int)):
            if row.any():
                again = scores(np.repeat(confidence, row), np.repeat(right, row))
                drawn[place] = [again[name] for name in SCORES]
        return drawn

    accuracy = cells({"": right.astype(np.float64)}, boot)[""]
    ends = [pair_or_none(interval) for interval in boot.intervals(statistic)]
    return {
        "n": len(confidence),
        "accuracy_percent": accuracy["percent"],
        "accuracy_ci95": accuracy["ci95"],
        "mean_confidence_percent": 100 * float(confidence.mean()),
        **scores(confidence, right),
        "ci95": dict(zip(SCORES, ends, strict=True)),
        "aurc_best": scores(right.astype(np.float64), right)["aurc"],
        "reliability": reliability(confidence, right),
        "risk_coverage": risk_coverage(confidence, right),
    }


def _of(kind: str, closed: np.ndarray) -> np.ndarray:
    return {"all": np.ones(len(closed), bool), "closed": closed, "open": ~closed}[kind]


def _bin(confidence: np.ndarray) -> np.ndarray:
    return np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)


def _risks(confidence: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Risk of the k surest answers, f64[n]; last k - 1 of each distinct confidence; its value."""
    values, place, size = np.unique(-confidence, return_inverse=True, return_counts=True)
    wrong = np.bincount(place, ~right) / size
    risk = np.cumsum(np.repeat(wrong, size)) / np.arange(1, len(right) + 1)
    return risk, np.cumsum(size) - 1, -values


def _log_odds(confidence: np.ndarray) -> np.ndarray:
    kept = np.clip(confidence, EDGE, 1 - EDGE)
    return np.log(kept) - np.log1p(-kept)


def _likelihood_loss(confidence: np.ndarray, right: np.ndarray, temperature: float) -> float:
    """Mean negative log-likelihood, in nats."""
    signed = np.where(right, 1.0, -1.0) * _log_odds(confidence) / temperature
    return float(np.logaddexp(0.0, -signed).mean())
