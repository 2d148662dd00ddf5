"""Programs whose settings are a config: `--config FILE:SIZE --config.a.b=c`. Slips in it end with
one message."""

from __future__ import annotations

import dataclasses
import sys
import typing
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

from absl import app, flags

from medmoe_jax.config import RunConfig

CONFIG_ERROR = "medmoe_jax.config.ConfigError: "


def run(main: Callable[[list[str]], int | None], kind: type = RunConfig) -> None:
    """`absl.app.run`, where the flag `config` holds a dataclass of this kind."""

    def parse(argv: list[str]) -> list[str]:
        try:
            rest = flags.FLAGS(argv)
            getattr(flags.FLAGS.config, "phase", None)  # a file that is not there is told here
            return rest
        except KeyError as error:
            absent = (field_fault(word, kind) for word in argv)
            message = next((text for text in absent if text), "")
            if not message:
                raise
            raise SystemExit(f"error: {message}") from error
        except OSError as error:
            given: Any = flags.FLAGS["config"]
            name, last = given.config_filename, str(error).rpartition("\n")[2]
            raise SystemExit(
                f"error: --config {name} cannot be read ({last.strip()}); give a file of configs/, "
                "as in configs/stage3.py:phi2"
            ) from error
        except flags.Error as error:
            last = str(error).strip().rpartition("\n")[2].strip()
            if last.startswith(CONFIG_ERROR):  # from the config's file, with a traceback
                raise SystemExit(f"error: {last.removeprefix(CONFIG_ERROR)}") from error
            raise SystemExit(f"error: {error}\n{sys.argv[0]} --help lists the flags") from error

    app.run(main, flags_parser=parse)


def field_fault(word: str, kind: type) -> str:
    """What is wrong with the name in `--config.a.b=c`, where a dataclass of this kind has no such
    field; '' where it has, or the word is something else."""
    name = word.lstrip("-").partition("=")[0]
    first, *path = name.split(".")
    if first != "config" or not path:
        return ""
    for depth, part in enumerate(path, 1):
        if not dataclasses.is_dataclass(kind):
            return ""
        fields = {field.name: field.type for field in dataclasses.fields(kind)}
        if part not in fields:
            near = get_close_matches(part, fields, 1)
            guess = f" (did you mean {near[0]!r}?)" if near else ""
            where = ".".join(["config", *path[: depth - 1]])
            return f"--{name}: {where} has no field {part!r}{guess}; it has {', '.join(fields)}"
        options = [fields[part], *typing.get_args(fields[part])]  # X | None
        found = [one for one in options if isinstance(one, type) and dataclasses.is_dataclass(one)]
        kind = found[0] if found else object
    return ""
