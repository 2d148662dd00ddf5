"""Compilers for hardware that is not there."""

from __future__ import annotations

import importlib.util
import os

import pytest


def need(target: str) -> None:
    """Skips a test where the compiler of its target (`plan.targets`) is not installed."""
    names = ("libtpu",) if target.startswith("v") else ("jax_cuda13_plugin", "jax_cuda12_plugin")
    if not any(importlib.util.find_spec(name) for name in names):
        pytest.skip(f"{' or '.join(names)} is not installed (extras plan and plan-cuda)")


def environment() -> dict[str, str]:
    """Of a process that loads libtpu, which ends where it meets a flag for CPUs (conftest.py)."""
    return {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
