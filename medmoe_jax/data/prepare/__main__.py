"""Command line: `python -m medmoe_jax.data.prepare NAME --source PATH --out DIR`.

`... NAME --help` tells what the source of a data set may be. Two names make no prepared folder:
`llava_med_images` fetches images, `tfds` packs a prepared folder.

Exit status: 0; 1 if rows could not be used, or if the numbers of rows differ from the published
ones (everything is written all the same; `--allow-counts` takes them as they are); 2 if the command
line is wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from medmoe_jax.config import ViewConfig
from medmoe_jax.data.medical import flags
from medmoe_jax.data.prepare import (
    custom,
    llava_med,
    llava_med_images,
    med_moe,
    medmnist,
    mix,
    path_vqa,
    slake,
    summary,
    tfds_builder,
    vqa_rad,
    write,
)
from medmoe_jax.data.prepare.types import SPLITS, DataSet
from medmoe_jax.data.problems import DataError

DATA_SETS: tuple[DataSet, ...] = (
    vqa_rad.DATA_SET,
    slake.DATA_SET,
    path_vqa.DATA_SET,
    medmnist.DATA_SET,
    llava_med.DATA_SET,
    med_moe.DATA_SET,
    custom.DATA_SET,
    mix.DATA_SET,
)
TOOLS = {
    "llava_med_images": (llava_med_images, "LLaVA-Med's images, from PubMed Central"),
    "tfds": (tfds_builder, "A prepared folder as a TensorFlow Datasets folder (ArrayRecord)"),
}  # what has options of its own


def main(arguments: list[str] | None = None) -> int:
    """Prepares one data set. Returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(given)
    if "tool" in options:
        return _use(options)
    chosen: DataSet = options.data_set
    try:
        identity: dict[str, Any] = {
            "name": chosen.name,
            "source": [str(path.resolve()) for path in options.source],
        }
        view = flags.view(options)
        if view != ViewConfig():
            identity["view"] = dataclasses.asdict(view)
        for path in options.source:
            if not path.exists():
                raise DataError(f"--source {path} does not exist")
        opened = chosen.read(options.source, options)
        write.begin(options.out, identity)
        result = write.write(
            opened,
            options.out,
            workers=options.workers,
            on_error=options.on_error,
            splits=options.splits,
            progress=True,
            view=view,
        )
    except (DataError, OSError) as error:
        print(f"prepare {chosen.name}: {error}", file=sys.stderr)
        return 1
    command = shlex.join(["python", "-m", "medmoe_jax.data.prepare", *given])
    content = summary.describe(result, opened, identity, command)
    if result.comparison.differs and options.allow_counts:
        content["published"]["explanation"] = "taken as they are (--allow-counts)"
    summary.write_summary(content, options.out / "summary.json")
    print(summary.table(content))
    print(f"written to {options.out}: manifest.jsonl, images/, summary.json, sheet.png, ...")
    if result.comparison.differs and not options.allow_counts:
        print(
            f"prepare {chosen.name}: the numbers of rows differ from the published ones (above). "
            "Is the source complete? Give --allow-counts to take it as it is, or --splits for a "
            "part of it",
            file=sys.stderr,
        )
        return 1
    return 0


def _use(options: argparse.Namespace) -> int:
    try:
        return TOOLS[options.tool][0].run(options)
    except (DataError, OSError) as error:
        print(f"prepare {options.tool}: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m medmoe_jax.data.prepare",
        description="Brings a medical data set into one format: images and a JSONL manifest.",
    )
    commands = parser.add_subparsers(metavar="NAME", required=True)
    for data_set in DATA_SETS:
        command = commands.add_parser(
            data_set.name,
            help=data_set.title,
            description=f"{data_set.title}.\n\nThe source:\n{data_set.layouts}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(data_set=data_set)
        command.add_argument(
            "--source", type=Path, nargs="+", required=True, help="the original files, see above"
        )
        command.add_argument(
            "--out", type=Path, required=True, help="folder to write; goes on where it was"
        )
        command.add_argument(
            "--workers",
            type=int,
            default=os.cpu_count() or 1,
            help="threads that read and check images",
        )
        command.add_argument(
            "--on-error",
            choices=("error", "skip"),
            default="error",
            help="rows that cannot be used: stop with a list, or leave them out (problems.jsonl)",
        )
        command.add_argument(
            "--splits",
            type=_splits,
            default=SPLITS,
            help="train, val, test or several of them, with commas; the others are left out",
        )
        command.add_argument(
            "--allow-counts",
            action="store_true",
            help="numbers of rows that differ from the published ones are no error",
        )
        data_set.add_arguments(command)
        flags.add_view(command)
    for name, (tool, title) in TOOLS.items():
        command = commands.add_parser(
            name,
            help=title,
            description=tool.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(tool=name)
        tool.add_arguments(command)
    return parser


def _splits(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if not set(names) <= set(SPLITS):
        raise argparse.ArgumentTypeError(f"{text!r}: give some of {','.join(SPLITS)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
