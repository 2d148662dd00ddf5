"""Classification (as in MedMNIST): rows with `options` and `label`, each task by itself.

Two ways to a class: the option with the highest probability, where the options were scored, and the
option that a free answer names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from medmoe_jax.evaluation.bootstrap import Bootstrap, Statistic, cells, pair_or_none
from medmoe_jax.evaluation.rows import Item
from medmoe_jax.metrics import NUMBER_WORDS, MissingExtra, contains

UNNAMED = "classification"  # the task of rows that name none
UNPARSED = -1


def named_option(text: str, options: Sequence[str]) -> int:
    """The class that a free answer names.

    Args:
      text: the answer.
      options: names of the classes.

    Returns:
      Index of the only option that occurs in it as whole words, in any case; where one option
      contains another ("left lung", "lung") the longer one is looked for first, and its words count
      for it alone. UNPARSED where none or several occur. "not a nevus" names the nevus.
    """
    same = [i for i, o in enumerate(options) if o.strip().casefold() == text.strip().casefold()]
    if len(same) == 1:
        return same[0]
    words = _words(text)
    split = [_words(option) for option in options]
    found = []
    for place in sorted(range(len(options)), key=lambda i: -len(split[i])):
        if contains(words, split[place]):
            found.append(place)
            words = _without(words, split[place])
    return found[0] if len(found) == 1 else UNPARSED


def report(items: Sequence[Item], boot: Bootstrap) -> dict[str, Any]:
    """Accuracy and AUC of each task.

    Args:
      items: n rows; those without options count for no task.
      boot: of the same rows.

    Returns:
      task -> n, classes, and (None where no row has it)
        likelihood: n, accuracy_percent, accuracy_ci95, auc (0..1; two classes: of class 1, several:
          mean of each class against the rest, as in MedMNIST), auc_ci95, auc_absent (why there is
          none), per_class (name -> n, accuracy_percent);
        text: n, accuracy_percent (an answer that names no class is wrong), accuracy_ci95,
          unparsable_percent, parsed_accuracy_percent, per_class.

    Raises:
      MissingExtra: scikit-learn is absent, which AUC needs.
    """
    found = {}
    for task, places in _tasks(items):
        rows, draws = [items[i] for i in places], boot.rows(places)
        classes = list(rows[0].options)
        for row in rows:
            classes += [option for option in row.options if option not in classes]
        scored = np.array([row.scores is not None for row in rows])
        some = [row for row in rows if row.scores is not None]
        found[task] = {
            "n": len(rows),
            "classes": classes,
            "likelihood": _likelihood(some, classes, draws.rows(scored)) if some else None,
            "text": _text(rows, draws),
        }
    return found


def columns(items: Sequence[Item]) -> dict[str, np.ndarray]:
    """Right (1) or wrong (0) of each row, by task and way; f64[n], NaN where a row has no part."""
    found = {}
    for task, places in _tasks(items):
        likelihood, text = np.full((2, len(items)), np.nan)
        for i in places:
            text[i] = _chosen_by_text(items[i]) == items[i].label
            if items[i].scores is not None:
                likelihood[i] = _chosen_by_score(items[i]) == items[i].label
        if np.isfinite(likelihood).any():
            found[f"{task} accuracy, likelihood"] = likelihood
        found[f"{task} accuracy, text"] = text
    return found


def weighted_auc(truth: np.ndarray, score: np.ndarray) -> Statistic:
    """Area under the ROC curve as a function of how often each row counts.

    Args:
      truth: bool[n].
      score: f64[n]; rows with equal scores count one half.
    """
    order = np.argsort(score, kind="stable")
    truth = truth[order]
    starts = np.flatnonzero(np.diff(score[order], prepend=np.nan) != 0)  # of equal scores

    def statistic(weights: np.ndarray) -> np.ndarray:
        weights = weights[:, order]
        above = np.add.reduceat(weights * truth, starts, axis=1)
        below = np.add.reduceat(weights * ~truth, starts, axis=1)
        wins = (above * (np.cumsum(below, 1) - below / 2)).sum(1)
        pairs = above.sum(1) * below.sum(1)
        return np.divide(wins, pairs, out=np.full(len(wins), np.nan), where=pairs > 0)[:, None]

    return statistic


def _likelihood(rows: Sequence[Item], classes: list[str], boot: Bootstrap) -> dict[str, Any]:
    right = np.array([float(_chosen_by_score(row) == row.label) for row in rows])
    accuracy = cells({"": right}, boot)[""]
    report: dict[str, Any] = {
        "n": len(rows),
        "accuracy_percent": accuracy["percent"],
        "accuracy_ci95": accuracy["ci95"],
        "auc": None,
        "auc_ci95": None,
        "auc_absent": "",
        "per_class": _per_class(rows, classes, right),
    }
    truth = np.array([classes.index(row.options[row.label]) for row in rows])
    # A class that no row has, or every row, has no curve.
    curves = [i for i in range(len(classes)) if 0 < (truth == i).sum() < len(rows)]
    curves = curves[-1:] if len(classes) == 2 else curves
    if any(set(row.options) != set(classes) for row in rows):
        report["auc_absent"] = "the rows of this task have different options"
    elif not curves:
        report["auc_absent"] = "all rows are of one class"
    else:
        scores = np.array([[(row.scores or {})[name] for name in classes] for row in rows])
        report["auc"] = float(np.mean([_auc(truth == i, scores[:, i]) for i in curves]))
        each = [weighted_auc(truth == i, scores[:, i]) for i in curves]
        # A draw without one of the classes has no mean over the same curves and is left out.
        interval = boot.intervals(lambda w: np.mean([auc(w) for auc in each], 0))
        report["auc_ci95"] = pair_or_none(interval[0])
        if len(classes) > 2 and len(curves) < len(classes):
            lacking = [name for i, name in enumerate(classes) if i not in curves]
            report["auc_absent"] = f"of the classes {lacking}, which no row has"
    return report


def _text(rows: Sequence[Item], boot: Bootstrap) -> dict[str, Any]:
    chosen = np.array([_chosen_by_text(row) for row in rows])
    right = (chosen == np.array([row.label for row in rows])).astype(float)
    parsed = chosen != UNPARSED
    accuracy = cells({"": right}, boot)[""]
    classes = list(dict.fromkeys(option for row in rows for option in row.options))
    return {
        "n": len(rows),
        "accuracy_percent": accuracy["percent"],
        "accuracy_ci95": accuracy["ci95"],
        "unparsable_percent": 100 * float((~parsed).mean()),
        "parsed_accuracy_percent": 100 * float(right[parsed].mean()) if parsed.any() else None,
        "per_class": _per_class(rows, classes, right),
    }


def _per_class(
    rows: Sequence[Item], classes: Sequence[str], right: np.ndarray
) -> dict[str, dict[str, Any]]:
    names = np.array([row.options[row.label] for row in rows], object)
    found = {}
    for name in classes:
        mine = right[names == name]
        found[name] = {
            "n": len(mine),
            "accuracy_percent": 100 * float(mine.mean()) if len(mine) else None,
        }
    return found


def _auc(truth: np.ndarray, score: np.ndarray) -> float:
    try:
        from sklearn.metrics import roc_auc_score
    except ImportError as error:
        raise MissingExtra("AUC needs scikit-learn: pip install 'medmoe_jax[eval]'") from error
    return float(roc_auc_score(truth, score))


def _chosen_by_score(item: Item) -> int:
    scores = item.scores or {}
    return int(np.argmax([scores[name] for name in item.options]))


def _chosen_by_text(item: Item) -> int:
    return named_option(item.prediction, item.options)


def _tasks(items: Sequence[Item]) -> Iterator[tuple[str, np.ndarray]]:
    tasks: dict[str, list[int]] = {}
    for place, item in enumerate(items):
        if item.options:
            tasks.setdefault(item.task or UNNAMED, []).append(place)
    yield from ((task, np.array(places)) for task, places in sorted(tasks.items()))


def _words(text: str) -> list[str]:
    """As the strict figures have them, but with articles: "A" may be an option."""
    words: list[str] = re.findall(r"\d+\.\d+|[^\W_]+", text.lower())
    return [NUMBER_WORDS.get(word, word) for word in words]


def _without(words: list[str], part: list[str]) -> list[str]:
    """`words` with every occurrence of `part` made into a word that nothing else has."""
    words = list(words)
    for start in range(len(words) - len(part) + 1):
        if words[start : start + len(part)] == part:
            words[start : start + len(part)] = [""] * len(part)
    return words
