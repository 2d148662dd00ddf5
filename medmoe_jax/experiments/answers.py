"""Answers of a model to the test files, and what each is worth."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from medmoe_jax import model as loaded
from medmoe_jax import predict
from medmoe_jax.data import questions, sources
from medmoe_jax.data.problems import DataError
from medmoe_jax.evaluation import figures
from medmoe_jax.evaluation.rows import pair, read
from medmoe_jax.experiments.config import AnswersConfig
from medmoe_jax.experiments.statistics import Scores
from medmoe_jax.sampling import Sampling

SCORES = "scores.json"
# Figures of a question -> (variant, figure) of `evaluation.figures`.
FIGURES = {
    "closed": ("official", "yes/no accuracy"),
    "open": ("official", "Recall"),
    "EMS": ("official", "Exact Match Score"),
    "BLEU": ("official", "BLEU Score (Weight 1)"),
    "closed, strict": ("strict", "Closed Accuracy"),
    "open, strict": ("strict", "Open Recall"),
}


def answer(
    folder: Path,
    tests: dict[str, Path],
    image_folder: str,
    control: str,
    how: AnswersConfig,
    out: Path,
) -> None:
    """Writes `out/NAME.jsonl` with the answers to each test and `out/scores.json`.

    Args:
      folder: of the model.
      tests: name -> file of questions.
      image_folder: "" = `images` beside each file.
      control: what is shown: shown, blank, noise or shuffled.
      how: rows, batch size, length.
      out: folder to write.
    """
    model = loaded.load(folder)
    sampling = Sampling(max_new_tokens=how.max_new_tokens)
    scores, started = {}, time.perf_counter()
    for name, file in tests.items():
        asked = questions.read_questions(file)
        if control == "shuffled":
            asked = questions.exchanged(asked, 0)
        asked = asked[: how.rows] if how.rows else asked
        stream = predict.replies(
            model,
            asked,
            Path(sources.image_folder_of(str(file), image_folder)),
            sampling,
            batch_size=how.batch_size,
            control=control,
        )
        found = {q.row: predict.row(q, reply, folder.parent.name, control) for q, reply in stream}
        said = [found[q.row] for q in asked]
        faults = [row["metadata"]["error"] for row in said if "error" in row["metadata"]]
        if faults:
            what = f"{len(faults)} of {len(said)} questions of {name} have no answer and count as"
            print(f"warning: {what} wrong: {faults[0]}", file=sys.stderr, flush=True)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in said]
        (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        scores[name] = score(read(file)[: len(asked)], said)
    scores = {"tests": scores, "seconds": time.perf_counter() - started}
    (out / SCORES).write_text(json.dumps(scores) + "\n")


def score(rows: list[dict[str, Any]], said: list[dict[str, Any]]) -> dict[str, Any]:
    """What each answer is worth.

    Args:
      rows: questions with answers, as in the file.
      said: the predictions, in the same order.

    Returns:
      images: of each row; task: classification task of each row, "" = none; figures: name -> a
      value (0..1) a row, None where the row does not count.
    """
    items = pair(rows, said, "order")
    columns = {
        variant: figures.columns(variant, figures.score(items, variant))
        for variant in ("official", "strict")
    }
    values = {name: columns[variant][figure] for name, (variant, figure) in FIGURES.items()}
    return {
        "images": [item.cluster for item in items],
        "task": [item.task for item in items],
        "figures": {
            name: [None if np.isnan(value) else float(value) for value in column]
            for name, column in values.items()
        },
    }


def read_scores(folder: Path, figures: tuple[str, ...] = ("open", "closed")) -> Scores:
    """The columns "TEST FIGURE" of an answers cell, tests in their order; those without any row are
    left out."""
    found = json.loads((folder / SCORES).read_text())["tests"]
    return stacked(found, {f"{test} {f}": (test, f, None) for test in found for f in figures})


def read_tasks(folder: Path) -> Scores:
    """The strict accuracy of each classification task of an answers cell."""
    found = json.loads((folder / SCORES).read_text())["tests"]
    tasks = {task: test for test, part in found.items() for task in dict.fromkeys(part["task"])}
    figure = "closed, strict"
    return stacked(found, {task: (test, figure, task) for task, test in tasks.items() if task})


def stacked(found: dict[str, Any], wanted: dict[str, tuple[str, str, str | None]]) -> Scores:
    """Rows of all tests below one another.

    Args:
      found: test -> what `score` returns.
      wanted: column -> (test, figure, task or None for all).

    Raises:
      DataError: no row counts for any column.
    """
    images = [image for part in found.values() for image in part["images"]]
    columns, names = [], []
    for name, (test, figure, task) in wanted.items():
        parts = []
        for other, part in found.items():
            values = np.array(part["figures"][figure], np.float64)  # None becomes NaN
            counts = np.array([other == test and task in (None, t) for t in part["task"]], bool)
            parts.append(np.where(counts, values, np.nan))
        column = np.concatenate(parts)
        if np.isfinite(column).any():
            columns.append(column)
            names.append(name)
    if not names:
        raise DataError(
            f"no row of the tests {', '.join(found)} counts for any of the columns "
            f"{', '.join(wanted) or '(none)'}: open and closed questions need 'answer_type', "
            "classification needs 'task' as well"
        )
    return Scores(tuple(names), np.stack(columns, 1), images)
