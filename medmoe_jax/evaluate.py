"""Scores a file of answers: `python -m medmoe_jax.evaluate --gt F --pred F [--out metrics.json]`.

Rows are paired by id. The official figures and the strict ones are computed side by side
(`metrics.py` says how they differ).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from medmoe_jax import metrics
from medmoe_jax.data.problems import DataError

# figure -> (variant, its name there)
SUMMARY = {
    "closed accuracy": ("official", "yes/no accuracy"),
    "open recall": ("official", "Recall"),
    "closed accuracy, strict": ("strict", "Closed Accuracy"),
    "open recall, strict": ("strict", "Open Recall"),
}


def _read(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSON list or of a JSONL file."""
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text) if text.lstrip().startswith("[") else None
        return (
            data if data is not None else [json.loads(line) for line in text.splitlines() if line]
        )
    except (OSError, json.JSONDecodeError) as error:
        raise DataError(f"{path} is no JSON list and no JSONL file: {error}") from error


def _by_id(rows: list[dict[str, Any]], key: str, path: Path) -> dict[str, dict[str, Any]]:
    ids = [str(row.get(key)) for row in rows]
    doubled = [i for i, n in Counter(ids).items() if n > 1]
    if doubled:
        raise DataError(f"{path}: {len(doubled)} ids occur more than once: {doubled[:5]}")
    return dict(zip(ids, rows, strict=True))


def pair(gt: Path, pred: Path) -> list[metrics.Answer]:
    """Questions with their predictions, paired by id.

    Args:
      gt: JSON with id, answer_type and conversations (or conversatons).
      pred: JSONL with question_id and text.

    Raises:
      DataError: ids that are missing, extra or doubled, or a file that cannot be read.
    """
    truth, said = _by_id(_read(gt), "id", gt), _by_id(_read(pred), "question_id", pred)
    missing, extra = sorted(truth.keys() - said.keys()), sorted(said.keys() - truth.keys())
    if missing or extra:
        raise DataError(
            f"{pred} and {gt} do not fit: {len(missing)} ids without a prediction {missing[:5]}, "
            f"{len(extra)} predictions without a question {extra[:5]}"
        )
    pairs = []
    for key, row in truth.items():
        turns = row.get("conversations") or row.get("conversatons")
        if not turns or len(turns) < 2:
            raise DataError(f"{gt}: row {key!r} has no question with an answer")
        question, answer = str(turns[0]["value"]), str(turns[1]["value"])
        kind = str(row.get("answer_type", ""))
        pairs.append(metrics.Answer(answer, str(said[key]["text"]), kind, question))
    return pairs


def evaluate(gt: Path, pred: Path) -> dict[str, Any]:
    """All figures: `official`, `strict` (see `metrics`) and a short `summary`, percent."""
    pairs = pair(gt, pred)
    report = {"official": metrics.official(pairs), "strict": metrics.strict(pairs)}
    summary = {
        name: report[variant]["aggregate_percent"][figure]
        for name, (variant, figure) in SUMMARY.items()
    }
    return {"n": len(pairs), "summary": summary} | report


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Scores a file of answers.")
    parser.add_argument("--gt", type=Path, required=True, help="questions with answers, JSON")
    parser.add_argument("--pred", type=Path, required=True, help="answers, JSONL")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    try:
        report = evaluate(args.gt, args.pred)
    except DataError as error:
        sys.exit(f"error: {error}")
    for name, value in report["summary"].items():
        print(f"{name:<26}{'-' if value is None else f'{value:6.1f} %'}")
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
