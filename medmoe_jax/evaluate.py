"""Scores a file of answers: `python -m medmoe_jax.evaluate --gt F --pred F [--out metrics.json]`.

Rows are paired by id (`--pair order`: as the official script does). The official figures and the
strict ones are computed side by side (`metrics.py` says how they differ), with intervals, tables by
group, classification, controls and the quality of the confidences (`evaluation/`). What is found is
shown, and written beside `--out`: metrics.json, metrics.md and metrics.wrong.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medmoe_jax.config import natural
from medmoe_jax.data.problems import DataError
from medmoe_jax.evaluation import plots, text
from medmoe_jax.evaluation.controls import CONTROLS
from medmoe_jax.evaluation.figures import VARIANTS
from medmoe_jax.evaluation.report import SAMPLES, report
from medmoe_jax.evaluation.rows import PAIRINGS, read
from medmoe_jax.metrics import MissingExtra


def evaluate(
    gt: Path,
    pred: Path,
    *,
    metric: str = "both",
    pairing: str = "id",
    controls: dict[str, Path] | None = None,
    calibrate_on: tuple[Path, Path] | None = None,
    abstain_below: float | None = None,
    samples: int = SAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """`evaluation.report.report` of files, with their names (`gt`, `pred`) and the `models` that
    the predictions name.

    Args:
      gt: questions with answers, JSON or JSONL.
      pred: predictions, JSONL or JSON.
      metric: see `report`, like the arguments not named here.
      pairing: see `report`.
      controls: blank, noise or shuffled -> file of predictions.
      calibrate_on: files of questions and of predictions.
      abstain_below: see `report`.
      samples: see `report`.
      seed: see `report`.

    Raises:
      DataError: files that cannot be read or do not fit.
      MissingExtra: a library of the extra `eval` is absent.
    """
    fitted = None if calibrate_on is None else (read(calibrate_on[0]), read(calibrate_on[1]))
    predictions = read(pred)
    models = {str(row["model_id"]) for row in predictions if row.get("model_id")}
    files = {"gt": str(gt), "pred": str(pred), "models": sorted(models)}
    return files | report(
        read(gt),
        predictions,
        metric=metric,
        pairing=pairing,
        control_predictions={name: read(file) for name, file in (controls or {}).items()},
        calibrate_on=fitted,
        abstain_below=abstain_below,
        samples=samples,
        seed=seed,
        names=(str(gt), str(pred)),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Scores a file of answers.")
    parser.add_argument("--gt", type=Path, required=True, help="questions with answers, JSON")
    parser.add_argument("--pred", type=Path, required=True, help="answers, JSONL")
    parser.add_argument("--metric", choices=list(VARIANTS), default="both")
    parser.add_argument("--pair", choices=PAIRINGS, default="id", help="how rows correspond")
    parser.add_argument("--out", type=Path, help="JSON to write; Markdown goes beside it as .md")
    parser.add_argument("--wrong", type=Path, help="wrong answers; default: beside --out")
    parser.add_argument(
        "--control",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help=f"answers without the image; NAME is {', '.join(CONTROLS)}; may be repeated",
    )
    parser.add_argument(
        "--calibrate-on",
        nargs=2,
        type=Path,
        metavar=("GT", "PRED"),
        help="rows for the temperature of the confidences; default: half of the images",
    )
    parser.add_argument(
        "--abstain-below", type=float, metavar="P", help="withhold answers less sure than P, 0..1"
    )
    parser.add_argument("--plots", type=Path, metavar="DIR", help="pictures of the confidences")
    parser.add_argument("--bootstrap", type=natural, default=SAMPLES, help="draws; 0: no intervals")
    parser.add_argument("--seed", type=natural, default=0, help="of the draws")
    return parser


def _controls(given: list[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for choice in given:
        name, _, file = choice.partition("=")
        if name not in CONTROLS or not file or name in found:
            raise DataError(
                f"--control {choice}: give NAME=FILE, each NAME of {', '.join(CONTROLS)} once"
            )
        found[name] = Path(file)
    return found


def _check_names(written: Sequence[Path], read_: Sequence[Path]) -> None:
    """Raises DataError where a file to write is one that is read, or is named twice."""
    places = [path.resolve() for path in written]
    for path, place in zip(written, places, strict=True):
        if place in {other.resolve() for other in read_} or places.count(place) > 1:
            raise DataError(
                f"{path} would be written over questions, answers or another file of the report; "
                "choose another --out or --wrong"
            )


def _write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


def _dump(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def main() -> None:
    """Command line."""
    parser = _parser()
    args = parser.parse_args()
    if args.out and args.out.suffix == ".md":
        parser.error("--out is the JSON file; the Markdown is written beside it")
    beside: Path | None = args.out and args.out.with_suffix(".wrong.json")
    errors: Path | None = args.wrong or beside
    names: list[Path] = [args.out, args.out.with_suffix(".md")] if args.out else []
    names += [errors] if errors else []
    try:
        controls = _controls(args.control)
        _check_names(names, [args.gt, args.pred, *controls.values(), *(args.calibrate_on or ())])
        found = evaluate(
            args.gt,
            args.pred,
            metric=args.metric,
            pairing=args.pair,
            controls=controls,
            calibrate_on=args.calibrate_on and tuple(args.calibrate_on),
            abstain_below=args.abstain_below,
            samples=args.bootstrap,
            seed=args.seed,
        )
        wrong = found.pop("wrong")
        shown = text.markdown(found)
        if args.out:
            _write(args.out, _dump(found))
            _write(args.out.with_suffix(".md"), shown)
        if errors:
            _write(errors, _dump(wrong))
        print(shown)
        drawn = (
            plots.draw(found["confidence"], args.plots)
            if args.plots and found["confidence"]
            else []
        )
    except (DataError, MissingExtra, OSError) as error:
        sys.exit(f"error: {error}")
    if args.plots and not drawn:
        print("No pictures: no answer has a confidence.")
    if names or drawn:
        print(f"Written: {', '.join(map(str, [*names, *drawn]))}")


if __name__ == "__main__":
    main()
