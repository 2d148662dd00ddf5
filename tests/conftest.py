"""What all tests share: where the golden files lie, and strict JAX settings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

FIXTURES = Path(__file__).resolve().parents[2] / "shared" / "fixtures"


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """Folder of golden files made with the official PyTorch code; skips where it is absent."""
    if not FIXTURES.is_dir():
        pytest.skip(f"golden files are not here: {FIXTURES.name} is expected beside the repository")
    return FIXTURES


@pytest.fixture(scope="module")
def quick_compile() -> Iterator[None]:
    """Halves the time to compile, for modules that run many tiny models a few times each."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
