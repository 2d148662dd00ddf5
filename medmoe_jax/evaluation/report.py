"""From questions and predictions to one report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from medmoe_jax.data.problems import DataError
from medmoe_jax.evaluation import classification, confidence, controls, figures
from medmoe_jax.evaluation.bootstrap import Bootstrap, cells
from medmoe_jax.evaluation.rows import Item, pair

SAMPLES = 1000  # bootstrap draws
CALIBRATION = ("the calibration questions", "the calibration predictions")

Json = dict[str, Any]


def report(
    rows: Sequence[Json],
    predictions: Sequence[Json],
    *,
    metric: str = "both",
    pairing: str = "id",
    control_predictions: Mapping[str, Sequence[Json]] | None = None,
    calibrate_on: tuple[Sequence[Json], Sequence[Json]] | None = None,
    abstain_below: float | None = None,
    samples: int = SAMPLES,
    seed: int = 0,
    names: tuple[str, str] = ("the questions", "the predictions"),
) -> Json:
    """Everything that answers tell about a model, as JSON.

    Args:
      rows: questions with answers, as in the data files.
      predictions: as in a prediction file.
      metric: 'official', 'strict' or 'both' text figures.
      pairing: 'id' or 'order', see `rows.pair`.
      control_predictions: blank, noise or shuffled -> predictions for the same rows, made with
        such images.
      calibrate_on: rows and predictions that the temperature is fitted on; None: half of the
        images.
      abstain_below: confidence, 0..1; answers below it count as withheld in `confidence`.
      samples: bootstrap draws; 0 = no intervals.
      seed: of the draws and of the half.
      names: of rows and predictions, for messages.

    Returns:
      n, n_images, metric, pairing, images (what was shown), bootstrap, errors (id -> why there is
        no answer);
      summary (figure -> percent), summary_n, summary_ci95;
      official, strict: the reports of `metrics`, with n, ci95_percent and the id of each row in
        per_sample; official also wrong_answers as the official script lists them;
      tables: see `figures.tables`; classification, confidence, controls: see these modules;
      wrong: see `wrong`.

    Raises:
      DataError: rows that do not fit or lack something.
      metrics.MissingExtra: nltk, sacrebleu or scikit-learn is absent.
    """
    if metric not in figures.VARIANTS:
        raise DataError(f"the metric is one of {', '.join(figures.VARIANTS)}, not {metric!r}")
    if abstain_below is not None and not 0 <= abstain_below <= 1:
        raise DataError(f"the confidence to abstain below is 0 to 1, not {abstain_below}")
    items = pair(rows, predictions, pairing, names)
    boot = Bootstrap.draw([item.cluster for item in items], samples, seed)
    variants, found = _scored(items, metric)
    for variant, scored in variants.items():
        figures.add_intervals(scored, items, found[variant], boot)
    short = figures.summary(found)
    shown = cells(short, boot)
    fitted = None if calibrate_on is None else pair(*calibrate_on, "id", CALIBRATION)
    # Figures of the controls: those of the summary, and the accuracy of each classification.
    compared = short | classification.columns(items)
    against = {}
    for name, answers in (control_predictions or {}).items():
        file = f"the control {name}"
        others = pair(rows, answers, pairing, (names[0], file))
        controls.check(name, others, file)
        without = figures.summary(_scored(others, metric)[1]) | classification.columns(others)
        against[name] = controls.compare(items, others, compared, without, boot)
    return {
        "n": len(items),
        "n_images": len({item.image for item in items if item.image}),
        "metric": metric,
        "pairing": pairing,
        "images": sorted({item.shown for item in items if item.shown}),
        "bootstrap": {"samples": samples, "seed": seed, "drawn": "images, with all their rows"},
        "errors": {str(item.id): item.error for item in items if item.error},
        "summary": {name: cell["percent"] for name, cell in shown.items()},
        "summary_n": {name: cell["n"] for name, cell in shown.items()},
        "summary_ci95": {name: cell["ci95"] for name, cell in shown.items()},
        **variants,
        "tables": figures.tables(items, short, boot),
        "classification": classification.report(items, boot),
        "confidence": confidence.report(items, boot, seed, fitted, abstain_below),
        "controls": against,
        "wrong": wrong(items, variants),
    }


def wrong(items: Sequence[Item], variants: Mapping[str, Json]) -> list[Json]:
    """What was not answered rightly.

    Args:
      items: n rows.
      variants: official and strict reports, or one of them.

    Returns:
      With the official figures alone: their closed errors, as the official script lists them.
      Else one dict a row that is strictly wrong (a closed answer that is not correct, an open one
      without an exact match): the official keys prompt, correct_answer and predicted_answer, here
      as they were spelled, and what is known of the row.
    """
    if "strict" not in variants:
        return variants["official"]["wrong_answers"]
    found = []
    for item, row in zip(items, variants["strict"]["per_sample"], strict=True):
        if not row.get("closed_correct", row.get("exact_match", True)):
            figure = {k: row[k] for k in ("recall", "precision", "f1") if k in row}
            known = {
                "id": item.id,
                "image": item.image,
                "prompt": item.prompt,
                "correct_answer": item.reference,
                "predicted_answer": item.prediction,
                "answer_type": item.answer_type,
                "modality": item.modality,
                "question_type": item.question_type,
                "confidence": item.confidence,
                "error": item.error,
            }
            found.append({k: v for k, v in known.items() if v not in ("", None)} | figure)
    return found


def _scored(
    items: Sequence[Item], metric: str
) -> tuple[dict[str, Json], dict[str, figures.Columns]]:
    variants = {name: figures.score(items, name) for name in figures.VARIANTS[metric]}
    return variants, {name: figures.columns(name, scored) for name, scored in variants.items()}
