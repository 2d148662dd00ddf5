"""What all tests share: where the golden files lie, and strict JAX settings."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

# Most of the tests' time is compilation; the older code emitters take a third of it. A jaxlib that
# does not know the flag would end the process, hence the version.
if jax.__version__.startswith("0.10."):
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_fusion_emitters=false".strip()
jax.config.update("jax_numpy_rank_promotion", "raise")

# Files of many minutes come first, so that no worker is left alone with one at the end.
LONGEST_FIRST = (
    *("test_notebooks", "test_train", "test_distributed", "test_packing", "test_step"),
    *("test_sharding", "test_check", "test_model", "test_beam"),
)

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The order of files in which workers take them."""
    rank = {name: i for i, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))
