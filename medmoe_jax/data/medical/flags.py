"""--window, --slice and --axis: one way to say on every command line what a medical file shows."""

from __future__ import annotations

import argparse

from medmoe_jax.config import ViewConfig
from medmoe_jax.data.medical import windows


def add_view(parser: argparse.ArgumentParser) -> None:
    """Adds the three options."""
    group = parser.add_argument_group("DICOM and NIfTI files")
    group.add_argument(
        "--window",
        default=ViewConfig.window,
        help=f"of grey values: {', '.join([windows.RGB, *windows.NAMED])} (Hounsfield units), "
        "LOW:HIGH, or file:N; default: the file's own",
    )
    group.add_argument(
        "--slice",
        type=int,
        default=ViewConfig.slice,
        help="slice of a volume or frame of a DICOM file, from 0; default: the middle one",
    )
    group.add_argument(
        "--axis",
        choices=windows.AXES,
        default=ViewConfig.axis,
        help="how a NIfTI volume is cut; default: %(default)s",
    )


def view(args: argparse.Namespace) -> ViewConfig:
    """What the options say.

    Raises:
      DataError: there is no such window or slice.
    """
    chosen = ViewConfig(args.window, args.slice, args.axis)
    windows.check_view(chosen)
    return chosen
