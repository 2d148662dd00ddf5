"""Compiled programs kept on disk between runs, by JAX's persistent compilation cache."""

from __future__ import annotations

import argparse
from pathlib import Path

import jax

from medmoe_jax.config import ConfigError

SHORTEST = 0.2  # seconds; what compiles faster is not worth a file


def add_flag(parser: argparse.ArgumentParser) -> None:
    """Adds --compilation-cache, the folder that `keep` is given."""
    cache = "folder that keeps compiled programs between runs"
    parser.add_argument("--compilation-cache", default="", metavar="DIR", help=cache)


def keep(folder: str) -> None:
    """Reads and writes compiled programs in `folder` from now on; to be called before the first
    one is compiled.

    Args:
      folder: is made if it is absent; several runs and processes may share it. "" = JAX's own
        setting, which the variable JAX_COMPILATION_CACHE_DIR fills.

    Raises:
      ConfigError: the folder cannot be made.
    """
    if not folder:
        return
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"compilation cache {folder!r} cannot be made ({error.strerror}); give another folder"
        ) from error
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", SHORTEST)
