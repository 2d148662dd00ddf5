"""Writes the model card of a model folder: `python -m medmoe_jax.card CHECKPOINT [--metrics
metrics.json ...] [--out README.md]`.

What stands on it: `card/text.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from medmoe_jax.card.text import Json, card
from medmoe_jax.checkpoint import CheckpointError, read_meta
from medmoe_jax.data.problems import DataError


def model_folder(path: str | Path) -> Path:
    """The model folder that a path names: itself, or `model` of a run.

    Raises:
      CheckpointError: neither.
    """
    path = Path(path)
    for folder in (path, path / "model"):
        if (folder / "config.json").is_file():
            return folder
    hint = "; its run has not ended" if (path / "run.json").is_file() else ""
    raise CheckpointError(
        f"{path} is no model folder and holds none in `model`{hint}; give a folder that training "
        "or `convert to-jax` wrote"
    )


def read_metrics(path: str | Path) -> Json:
    """A report of `evaluate --out`.

    Raises:
      DataError: the file cannot be read, or is something else.
    """
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
        for name, percent in report["summary"].items():
            _ = (report["summary_n"][name], report["summary_ci95"][name], percent)
        _ = (report["n"], report["n_images"], report["controls"], report["confidence"])
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is no report of `python -m medmoe_jax.evaluate --out` ({error!r} is missing)"
        ) from error
    return report


def _write(path: Path, text: str, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise DataError(f"{path} exists already; take another --out, or --overwrite it")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Writes the model card of a model folder.")
    add = parser.add_argument
    add("checkpoint", type=Path, help="model folder, or the folder of a finished run")
    add("--metrics", type=Path, nargs="+", default=[], help="reports of `evaluate --out`")
    add("--out", type=Path, help="file to write, usually README.md; default: print it")
    add("--overwrite", action="store_true", help="replace a file at --out")
    add("--name", default="", help="of the model; default: the folder's, or that of its run")
    add("--licence", default="", help="of the weights, such as apache-2.0; default: unknown")
    args = parser.parse_args(arguments)
    try:
        folder = model_folder(args.checkpoint)
        whole = folder.resolve()
        name = args.name or (whole.parent.name if whole.name == "model" else whole.name)
        reports = {str(file): read_metrics(file) for file in args.metrics}
        try:
            text = card(read_meta(folder), reports, name=name, licence=args.licence)
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"{folder / 'config.json'}: what its phases recorded is not whole ({error!r}); "
                "restore the file"
            ) from error
        if args.out is None:
            print(text, end="")
            return
        _write(args.out, text, args.overwrite)
    except (CheckpointError, DataError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"Written: {args.out}")


if __name__ == "__main__":
    main()
