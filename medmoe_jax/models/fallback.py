"""What the log says where a kernel cannot be used and something slower takes its place."""

from __future__ import annotations

import logging
from functools import cache

import jax


@cache
def say(platform: str, text: str) -> None:
    """Says once, not for every layer and compilation, what is slow on a platform ("tpu" or "gpu")
    and why: aloud only where it matters, which is on that platform."""
    here = logging.WARNING if jax.default_backend() == platform else logging.INFO
    logging.getLogger(__name__).log(here, "On a %s %s", platform.upper(), text)
