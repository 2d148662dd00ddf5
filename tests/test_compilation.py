"""Compiled programs on disk: written, found again, and a folder that cannot be made."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from medmoe_jax import compilation
from medmoe_jax.config import ConfigError

SETTINGS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture
def restored() -> Iterator[None]:
    """Puts JAX's settings back."""
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_programs_are_written_and_found(
    tmp_path: Path, restored: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilation, "SHORTEST", 0.0)
    compilation_cache.reset_cache()
    folder = tmp_path / "a" / "cache"
    compilation.keep(str(folder))

    def double(x: jax.Array) -> jax.Array:
        return 2 * x + 1

    assert float(jax.jit(double)(jnp.float32(3.0))) == 7.0
    written = {f.name for f in folder.iterdir() if f.name.startswith("jit_double")}
    assert written
    jax.clear_caches()
    hits: list[str] = []
    jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
    assert float(jax.jit(double)(jnp.float32(4.0))) == 9.0
    jax.monitoring.clear_event_listeners()
    assert "/jax/compilation_cache/cache_hits" in hits
    programs = {f.name for f in folder.iterdir() if f.name.endswith("-cache")}
    assert len([name for name in programs if name.startswith("jit_double")]) == 1


def test_no_folder_changes_nothing(restored: None) -> None:
    before = [getattr(jax.config, name) for name in SETTINGS]
    compilation.keep("")
    assert [getattr(jax.config, name) for name in SETTINGS] == before


def test_a_folder_that_cannot_be_made(tmp_path: Path, restored: None) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="another folder"):
        compilation.keep(str(tmp_path / "file" / "cache"))
