"""Adapters and the weights they belong to: `python -m medmoe_jax.lora {merge,base} ADAPTERS OUT`.

`merge` writes the model that the adapters make as a plain model folder, `base` the one that they
were trained beside, with experts where it has them.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from medmoe_jax import checkpoint
from medmoe_jax.config import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, or 1 with a message on stderr."""
    args = _parser().parse_args(argv)
    try:
        write(args.command, args.adapters, args.out, args.base)
    except (checkpoint.CheckpointError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def write(command: str, adapters: str, out: str, base: str | None) -> None:
    """Writes a plain model folder.

    Args:
      command: merge | base.
      adapters: folder of a run with config.lora.rank.
      out: folder to write; must not exist.
      base: folder of the model that the adapters belong to, where it is elsewhere now.

    Raises:
      CheckpointError: `adapters` holds none, the model they belong to is not there, or `out` is.
    """
    meta = checkpoint.read_meta(adapters)
    if meta.delta is None:
        raise checkpoint.CheckpointError(f"{adapters} holds no adapters; it is a whole model")
    if Path(out).exists():
        raise checkpoint.CheckpointError(f"{out} exists already; name another folder")
    if command == "merge":
        params, _ = checkpoint.open_model(adapters, base)
        line = f"merged from {adapters}"
    else:
        params = checkpoint.open_base(adapters, base)
        line = f"the model that the adapters {adapters} were trained beside"
    history = [*meta.history, line]
    whole = dataclasses.replace(meta, history=history, delta=None)
    checkpoint.save_model(out, params, whole, assets_from=adapters)
    print(f"model written to {out}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m medmoe_jax.lora", description=__doc__)
    parser.add_argument("command", choices=("merge", "base"), help="which model to write")
    parser.add_argument("adapters", help="model folder of a run with config.lora.rank")
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--base", help="the model they belong to, where it is elsewhere now")
    return parser


if __name__ == "__main__":
    sys.exit(main())
