"""Is a data set fit to train on? `python -m medmoe_jax.data.check MANIFEST... [--config FILE]`.

MANIFEST is a JSON or JSONL file, or a folder that `data.prepare` made. Exit status: 0 (warnings
included), 1 where there are errors. docs/check.md describes what is looked at.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medmoe_jax.config import MODALITIES, ConfigError, RunConfig, ViewConfig
from medmoe_jax.data import tokens
from medmoe_jax.data.check import leakage, lengths, pictures, report, rows
from medmoe_jax.data.check.findings import ERROR, WARNING, Finding, kind_of
from medmoe_jax.data.medical import flags
from medmoe_jax.data.problems import DataError
from medmoe_jax.data.sources import UNKNOWN

LINES = 10  # findings printed; the report has more


def examine(
    files: Sequence[Path],
    *,
    image_folder: Path | None = None,
    config: RunConfig | None = None,
    tokenizer: Any = None,
    n_patches: int = 0,
    view: ViewConfig | None = None,
    leak_level: str = ERROR,
    progress: bool = True,
) -> report.Result:
    """Looks at everything.

    Args:
      files: JSON, JSONL or prepared folders.
      image_folder: see `rows.read`.
      config: template, lengths, buckets and batch size; default: those of `RunConfig`.
      tokenizer: lengths are not looked at without one.
      n_patches: places one image takes; default: those of the config's model.
      view: of DICOM and NIfTI files.
      leak_level: level of what several splits share.
      progress: shows a bar.
    """
    config = config or RunConfig()
    table = rows.read(files, image_folder)
    findings = list(table.findings)
    names = dict.fromkeys(row.folder / name for row in table.rows for name in row.sample.images)
    facts = pictures.look_at_all(list(names), view, progress)
    findings += _about_images(table.rows, facts)
    leaks = leakage.find(table.rows, facts, leak_level)
    result = report.Result(
        files=[str(file) for file in files],
        total=table.total,
        usable=0,
        pictures=len(facts),
        findings=findings + leaks.findings,
        balance=rows.balance(table.rows),
        pairs=leaks.pairs,
        shared=leaks.shared,
    )
    if tokenizer is None:
        result.notes.append(
            "Lengths were not checked: they need a tokenizer (--tokenizer, or `init` in --config)."
        )
    else:
        patches = n_patches or config.model.vision.patches
        result.lengths, long = lengths.measure(table.rows, config.data, tokenizer, patches)
        result.findings += long
        size = max(1, config.optim.batch_size // config.optim.accumulate)
        result.padding = lengths.padding(result.lengths, config.data, size)
    bad = {(f.file, f.row) for f in result.of(ERROR) if "two splits" not in f.kind}
    result.usable = sum((row.sample.file, row.sample.row) not in bad for row in table.rows)
    return result


def _about_images(table: Sequence[rows.Row], facts: dict[Path, pictures.Facts]) -> list[Finding]:
    """What is wrong with images, at each row that shows one; remarks at the first row alone."""
    found, said = [], set()
    for row in table:
        sample = row.sample
        place = (sample.file, sample.row, sample.id)
        for name in sample.images:
            path = row.folder / name
            fact = facts[path]
            if fact.fault:
                kind = kind_of(fact.fault, "unreadable image")
                found.append(Finding(ERROR, kind, *place, fact.fault))
            if path not in said:
                found += [Finding(WARNING, kind, *place, text) for kind, text in fact.remarks]
            said.add(path)
            label = "" if sample.modality == UNKNOWN else MODALITIES[sample.modality]
            if label and fact.modality and fact.modality != label:
                text = f"labelled {label}, but image {name!r} says it is {fact.modality}"
                found.append(Finding(WARNING, "modality of another kind", *place, text))
    return found


def read_config(text: str) -> RunConfig:
    """The config of 'FILE' or 'FILE:SIZE', as `train --config` takes it.

    Raises:
      ConfigError: there is no such file, or it has no get_config.
    """
    name, _, size = text.partition(":")
    spec = importlib.util.spec_from_file_location("config_to_check", name)
    if spec is None or spec.loader is None or not Path(name).is_file():
        raise ConfigError(f"--config {text}: there is no Python file {name}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"--config {text}: the file has no get_config")
    return module.get_config(*([size] if size else []))


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("files", nargs="+", type=Path, metavar="MANIFEST")
    add("--image-folder", type=Path, help="default: `images` beside each file, or its folder")
    add("--config", default="", metavar="FILE[:SIZE]", help="lengths, buckets, template of a run")
    add(
        "--tokenizer", type=Path, help="folder of a tokenizer; default: that of the config's `init`"
    )
    add("--patches", type=int, default=0, help="places one image takes; default: the config's")
    add(
        "--leakage",
        choices=(ERROR, WARNING),
        default=ERROR,
        help="what it is that splits share pictures or questions",
    )
    add("--out", type=Path, default=Path("check"), help="folder of the report; default: check")
    flags.add_view(parser)
    return parser


def main(given: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    args = arguments().parse_args(given)
    try:
        config = read_config(args.config) if args.config else RunConfig()
        view = flags.view(args)
        view = config.data.view if view == ViewConfig() else view
        named = config.data.image_folder
        folder_of_images = args.image_folder or (Path(named) if named else None)
        folder = args.tokenizer or (Path(config.init) / "tokenizer" if config.init else None)
        family = config.model.llm.family
        tokenizer = tokens.load_tokenizer(folder, family) if folder else None
        result = examine(
            args.files,
            image_folder=folder_of_images,
            config=config,
            tokenizer=tokenizer,
            n_patches=args.patches,
            view=view,
            leak_level=args.leakage,
        )
        files = report.write(result, args.out, view)
    except (DataError, ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for level in (ERROR, WARNING):
        found = result.of(level)
        for finding in found[:LINES]:
            print(f"{level}: {finding.kind}: {finding}")
        if len(found) > LINES:
            print(f"... and {len(found) - LINES} more {level}s")
    for note in result.notes:
        print(note)
    errors = len(result.of(ERROR))
    print(f"{result.total} rows: {errors} errors, {len(result.of(WARNING))} warnings")
    print(f"Written: {', '.join(map(str, files))}")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
