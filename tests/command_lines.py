"""Whether a command that the documentation names could be run: the real parsers decide.

`fault` looks at one command. A command line of this project is handed to the program itself, which
is stopped as soon as it has read its options.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from absl import app, flags
from doc_blocks import ROOT

from medmoe_jax import upcycle
from medmoe_jax.config import MoeConfig, RunConfig
from medmoe_jax.data import order, templates
from medmoe_jax.data.medical import flags as view_flags
from medmoe_jax.experiments.config import StudyConfig

FOLDERS = r"(?:medmoe_jax|configs|launch|benchmarks|tests|docs|notebooks)/"
MISSING = r"arguments are required|must have a value other than None"
CHOICES = {
    "upcycle": upcycle.MODES,
    "objective": ("answer", "router"),
    "router_level": ("token", "sample"),
    "remat": ("none", "dots", "experts", "attention", "full"),
    "data.template": templates.TEMPLATES,
    "data.batching": order.MODES,
    "data.image_aspect": ("pad", "square"),
    "data.on_error": ("error", "skip"),
    "optim.schedule": ("cosine", "constant"),
    "cluster.join": ("auto", "yes", "no"),
}


class Parsed(Exception):
    """Raised in place of what a program would do with its options."""

    def __init__(self, options: argparse.Namespace | None = None) -> None:
        self.options = options


def _stopped_argparse(parse: Any) -> Any:
    @functools.wraps(parse)
    def parse_args(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise Parsed(parse(self, *args, **kwargs))

    return parse_args


def _stopped_absl(_: Any, **__: Any) -> None:
    flags.FLAGS(sys.argv)
    raise Parsed


@contextlib.contextmanager
def _alone(argv: Sequence[str]) -> Iterator[None]:
    """`argv` as the command line, in the repository's root; flags defined meanwhile go again."""
    before, here = set(flags.FLAGS), Path.cwd()
    parse = _stopped_argparse(argparse.ArgumentParser.parse_args)
    os.chdir(ROOT)
    try:
        with (
            mock.patch.object(sys, "argv", list(argv)),
            mock.patch.object(sys, "path", [str(ROOT / argv[0]).rpartition("/")[0], *sys.path]),
            mock.patch.object(argparse.ArgumentParser, "parse_args", parse),
            mock.patch.object(app, "run", _stopped_absl),
            warnings.catch_warnings(),
        ):
            # Of runpy, where another module has imported this one, and of ml_collections' loader.
            warnings.simplefilter("ignore")
            yield
    finally:
        os.chdir(here)
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()


def program(name: str, arguments: Sequence[str]) -> str:
    """What is wrong with the options of a program of this project; "" if nothing.

    Args:
      name: a file, or a module to be run by `python -m`.
      arguments: what follows.
    """
    told = io.StringIO()
    try:
        with _alone([name, *arguments]), contextlib.redirect_stderr(told):
            with contextlib.redirect_stdout(told):
                try:
                    if name.endswith(".py"):
                        runpy.run_path(str(ROOT / name), run_name="__main__")
                    else:
                        runpy.run_module(name, run_name="__main__", alter_sys=False)
                except Parsed as parsed:
                    return _options(name, parsed.options)
            return f"{name} ended before it read its options"
    except SystemExit as ended:
        return "" if ended.code in (0, None) else f"{ended.code} {told.getvalue().strip()}"
    except (flags.Error, ValueError, TypeError, AttributeError, KeyError, OSError) as error:
        return f"{type(error).__name__}: {error}"


def _options(name: str, options: argparse.Namespace | None) -> str:
    """What only the program itself would find, behind its parser."""
    if options is not None:
        if hasattr(options, "window"):
            view_flags.view(options)
        return ""
    cfg = flags.FLAGS.config if "config" in flags.FLAGS else None
    if cfg is not None and not dataclasses.is_dataclass(cfg):
        return "the configuration's file cannot be read"
    if isinstance(cfg, RunConfig):
        cfg.model.validate()
        for path, allowed in CHOICES.items():
            value = functools.reduce(getattr, path.split("."), cfg)
            if value not in allowed:
                return f"config.{path} is {value!r}, none of {', '.join(allowed)}"
    if name == "medmoe_jax.plan" and flags.FLAGS.target:
        from medmoe_jax.plan import programs, targets

        targets._parse(flags.FLAGS.target)
        if flags.FLAGS.mesh:
            programs.mesh_config(flags.FLAGS.mesh)
    return ""


def train(arguments: Sequence[str]) -> str:
    """`program` of a training run; what a launcher hands through may lack the two main options."""
    return program("medmoe_jax.train", arguments)


@functools.cache
def extras() -> frozenset[str]:
    """What pyproject.toml has as optional dependencies."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return frozenset(project["optional-dependencies"])


def _pip(arguments: Sequence[str]) -> str:
    for word in arguments:
        named = re.fullmatch(r"(?:\.|medmoe_jax)\[([\w,-]+)\].*", word)
        if named and (unknown := set(named.group(1).split(",")) - extras()):
            return f"there is no extra {', '.join(sorted(unknown))}"
    if "-c" in arguments:
        return _files([arguments[arguments.index("-c") + 1]])
    return ""


def _make(arguments: Sequence[str]) -> str:
    text = (ROOT / "Makefile").read_text()
    for word in arguments:
        name, assigned, _ = word.partition("=")
        form = rf"^{re.escape(name)} \?=" if assigned else rf"^{re.escape(name)}:"
        if not re.search(form, text, re.MULTILINE):
            return f"the Makefile has no {name}"
    return ""


def _files(words: Sequence[str]) -> str:
    gone = [word for word in words if not (ROOT / word).exists()]
    return f"there is no {', '.join(gone)}" if gone else ""


def _script(name: str, arguments: list[str]) -> str:
    """A script of launch/: it is run itself, without doing anything."""
    if absent := _files([name]):
        return absent
    if name.endswith(("slurm.sh", "phases.sh")):
        rest = [word for word in arguments if word != "--dry-run"]
    else:
        rest = arguments[arguments.index("--") + 1 :] if "--" in arguments else []
    if name.endswith("phases.sh"):
        return "" if len(arguments) == 5 else "phases.sh takes five arguments"
    first = [] if "--dry-run" in arguments else ["--dry-run"]
    done = subprocess.run(
        ["bash", ROOT / name, *first, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        return done.stderr
    return train(rest) if rest else ""


def _docker(arguments: Sequence[str]) -> str:
    if arguments[0] == "build":
        file = arguments[arguments.index("-f") + 1]
        stage = arguments[arguments.index("--target") + 1]
        if absent := _files([file]):
            return absent
        return "" if f" AS {stage}\n" in (ROOT / file).read_text() else f"no stage {stage}"
    given = [i for i, word in enumerate(arguments) if word.startswith("--config")]
    return train(arguments[given[0] :]) if given else ""


def fault(words: list[str]) -> str:
    """What is wrong with one command, its program first; "" if nothing is.

    Args:
      words: as `doc_blocks.commands` gives them. Where one is `...`, options may be missing.
    """
    found = _fault(words[0], [word for word in words[1:] if word != "..."])
    return "" if "..." in words and re.search(MISSING, found) else found


def _fault(name: str, arguments: list[str]) -> str:
    if name in ("sbatch", "srun", "bash", "sh"):
        at = next((i for i, word in enumerate(arguments) if word.startswith("launch/")), None)
        return "" if at is None else _script(arguments[at], arguments[at + 1 :])
    if name.startswith("launch/"):
        return _script(name, arguments)
    if name == "sky":
        taken = [word.removeprefix("TRAIN=") for word in arguments if word.startswith("TRAIN=")]
        faults = [train(shlex.split(text.replace("...", ""))) for text in taken if text != "..."]
        return _files([w for w in arguments if w.startswith("launch/")]) or "".join(faults)
    if name == "docker":
        return _docker(arguments)
    if name == "pip":
        return _pip(arguments)
    if name == "make":
        return _make(arguments)
    if name not in ("python", "python3"):
        return _files([word for word in arguments if re.match(FOLDERS, word)])
    if not arguments:
        return ""
    if arguments[0] != "-m":
        return _files(arguments[:1]) or program(arguments[0], arguments[1:])
    if arguments[1] in ("venv", "pip", "pytest", "ruff"):
        return _pip(arguments[2:]) if arguments[1] == "pip" else ""
    if not arguments[1].startswith("medmoe_jax") or not importlib.util.find_spec(arguments[1]):
        return f"there is no module {arguments[1]}"
    return program(arguments[1], arguments[2:])


def setting(path: str) -> bool:
    """Whether a run or a study has a field of this path, as in optim.lr or model.moe.top_k."""
    run = RunConfig()
    run.model.moe = MoeConfig()
    return any(_has(config, path.split(".")) for config in (run, StudyConfig()))


def _has(config: Any, names: list[str]) -> bool:
    for name in names:
        if not dataclasses.is_dataclass(config) or not hasattr(config, name):
            return False
        config = getattr(config, name)
    return True
