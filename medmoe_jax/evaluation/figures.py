"""Text figures with intervals, as a whole and by answer type, modality and question type."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from medmoe_jax import metrics
from medmoe_jax.evaluation import bleu
from medmoe_jax.evaluation.bootstrap import Bootstrap, cells, pair_or_none
from medmoe_jax.evaluation.rows import Item

# The figures of the short table and of the tables by group -> (variant, figure there).
SUMMARY = {
    "closed accuracy": ("official", "yes/no accuracy"),
    "open recall": ("official", "Recall"),
    "closed accuracy, strict": ("strict", "Closed Accuracy"),
    "open recall, strict": ("strict", "Open Recall"),
    "open F1, strict": ("strict", "Open F1"),
    "open exact match, strict": ("strict", "Open Exact Match"),
}
VARIANTS = {"official": ("official",), "strict": ("strict",), "both": ("official", "strict")}
GROUPINGS = ("answer_type", "modality", "question_type")
SPELLINGS = {"close": "closed"}
UNKNOWN = "(unknown)"

Columns = dict[str, np.ndarray]  # figure -> f64[n], 0..1, NaN = the row does not count


def score(items: Sequence[Item], variant: str) -> dict[str, Any]:
    """One variant's report: that of `metrics.official` or `metrics.strict`, the latter with BLEU.

    Raises:
      MissingExtra: nltk or sacrebleu is absent.
    """
    answers = [item.answer for item in items]
    if variant == "official":
        found = metrics.official(answers)
        found["wrong_answers"] = metrics.wrong_answers(
            item.answer._replace(question=item.prompt) for item in items
        )
    else:
        found = metrics.strict(answers)
        counted = bleu.counts((item.reference, item.prediction) for item in items)
        opened = [place for place, row in enumerate(found["per_sample"]) if "recall" in row]
        for place in opened:
            found["per_sample"][place]["bleu"] = bleu.score(counted[place])
        aggregate = found["aggregate_percent"]
        own = [found["per_sample"][place]["bleu"] for place in opened]
        aggregate[bleu.SENTENCES] = 100 * float(np.mean(own)) if own else None
        aggregate[bleu.CORPUS] = 100 * bleu.score(counted[opened].sum(0)) if own else None
    for item, row in zip(items, found["per_sample"], strict=True):
        row["id"] = item.id
    return found


def columns(variant: str, report: dict[str, Any]) -> Columns:
    """All figures of a variant that are means over rows.

    Args:
      variant: official or strict.
      report: made by `score`.
    """
    rows = report["per_sample"]
    found = {
        name: np.array([np.nan if value is None else value for value in column], np.float64)
        for name, column in metrics.values(variant, rows).items()
    }
    if variant == "strict":
        found[bleu.SENTENCES] = np.array([row.get("bleu", np.nan) for row in rows], np.float64)
    return found


def summary(by_variant: dict[str, Columns]) -> Columns:
    """The columns of `SUMMARY` that the variants at hand have."""
    return {
        name: by_variant[variant][figure]
        for name, (variant, figure) in SUMMARY.items()
        if variant in by_variant
    }


def add_intervals(
    report: dict[str, Any], items: Sequence[Item], found: Columns, boot: Bootstrap
) -> None:
    """Puts `n` and `ci95_percent` (figure -> [low, high] or None) into a variant's report."""
    shown = cells(found, boot)
    report["n"] = {name: cell["n"] for name, cell in shown.items()}
    report["ci95_percent"] = {name: cell["ci95"] for name, cell in shown.items()}
    if bleu.SENTENCES not in found:
        return
    opened = np.flatnonzero(np.isfinite(found[bleu.SENTENCES])).tolist()
    report["n"][bleu.CORPUS], report["ci95_percent"][bleu.CORPUS] = len(opened), None
    if len(opened):
        counted = bleu.counts((items[i].reference, items[i].prediction) for i in opened)
        intervals = boot.rows(np.array(opened)).intervals(
            lambda times: np.array(
                [[bleu.score(row @ counted) if row.any() else np.nan] for row in times]
            )
        )
        report["ci95_percent"][bleu.CORPUS] = pair_or_none(intervals[0], 100.0)


def tables(items: Sequence[Item], found: Columns, boot: Bootstrap) -> dict[str, Any]:
    """The figures of each group of rows.

    Args:
      items: n rows.
      found: the columns to be shown.
      boot: of the same rows.

    Returns:
      grouping -> group -> n, images and figures (see `bootstrap.cells`; those without any row are
      left out). A grouping that no row has is left out; rows without it come last, as (unknown).
    """
    report: dict[str, Any] = {}
    for grouping in GROUPINGS:
        names = np.array([_group(item, grouping) for item in items], object)
        groups = sorted(set(names) - {UNKNOWN}) + [UNKNOWN] * (UNKNOWN in names)
        if groups == [UNKNOWN]:
            continue
        split = {
            (group, figure): np.where(names == group, column, np.nan)
            for group in groups
            for figure, column in found.items()
        }
        shown = cells(split, boot)
        report[grouping] = {
            group: {
                "n": int((names == group).sum()),
                "images": boot.images(names == group),
                "figures": {
                    figure: shown[group, figure] for figure in found if shown[group, figure]["n"]
                },
            }
            for group in groups
        }
    return report


def _group(item: Item, grouping: str) -> str:
    if grouping != "answer_type":
        return getattr(item, grouping) or UNKNOWN
    kind = item.answer_type.strip().lower()
    return SPELLINGS.get(kind, kind) or UNKNOWN
