"""Generation over several devices says what it says on one."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mesh_generation
import numpy as np
import pytest
import tiny_runs
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from mesh_generation import QUICK, REST, Case

import medmoe_jax
from medmoe_jax import sharding
from medmoe_jax.config import ConfigError
from medmoe_jax.model import mesh_sizes

pytestmark = pytest.mark.usefixtures("quick_compile")


@functools.cache
def table(cases: str) -> dict[str, dict[str, Any]]:
    """The rows of QUICK or of REST, by their case; made once."""
    command = [sys.executable, mesh_generation.__file__, cases]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {row["case"]: row for row in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize(
    ("case", "where"),
    [
        *(pytest.param(case, "QUICK", id=str(case)) for case in QUICK),
        *(pytest.param(case, "REST", id=str(case), marks=pytest.mark.slow) for case in REST),
    ],
)
def test_answers_are_those_of_one_device(case: Case, where: str) -> None:
    """The same ids; probabilities, scores of options and the router's posterior to 1e-5. Each
    device holds its share of the experts, and no token moves a matrix."""
    row = table(where)[str(case)]
    assert all(row["same"].values()), row["same"]
    assert max(row["differences"].values()) < 1e-5, row["differences"]
    _, fsdp, expert = case.mesh
    divides = case.experts % expert == 0
    assert row["trees"] == (case.experts // expert if divides else case.experts)
    assert row["share"] == pytest.approx(1 / (fsdp * expert), abs=0.01)
    assert row["moved"] == []


@pytest.mark.parametrize(
    ("path", "shape", "ways", "want"),
    [
        ("llm/blocks/0/moe/experts/0/fc1/kernel", (2, 16, 24), 2, P("expert", None, "fsdp")),
        ("llm/blocks/0/moe/experts/0/fc1/bias", (2, 24), 2, P("expert", "fsdp")),
        ("llm/blocks/0/moe/experts/1/down/kernel", (2, 24, 16), 2, P("expert", "fsdp", None)),
        ("llm/blocks/0/moe/experts/1/fc2/bias", (2, 16), 2, P("expert", None)),
        ("llm/blocks/0/moe/experts/2/up/kernel", (16, 24), 1, P(None, ("expert", "fsdp"))),
        ("llm/blocks/0/moe/meta/fc2/kernel", (24, 16), 2, P(("expert", "fsdp"), None)),
        ("llm/blocks/0/moe/router/fc1/kernel", (16, 4), 2, P()),
        ("llm/blocks/1/layers/attn/k/kernel", (16, 6), 2, P(None, "expert")),
        ("llm/blocks/1/layers/ln1/scale", (16,), 2, P(None)),
        ("llm/lm_head/kernel", (16, 40), 2, P(None, ("expert", "fsdp"))),
    ],
)
def test_parameters(path: str, shape: tuple[int, ...], ways: int, want: P) -> None:
    """Heads and hidden layers are split, so that a token moves few numbers."""
    mesh = AbstractMesh((1, 2, 2), sharding.AXES, axis_types=(AxisType.Auto,) * 3)
    have = sharding.generation_spec(path, shape, mesh, ways)
    assert tuple(have) + (None,) * (len(shape) - len(have)) == tuple(want) + (None,) * (
        len(shape) - len(want)
    )


def test_a_mesh_of_one_device(tmp_path: Path) -> None:
    start = tiny_runs.save_start(tmp_path)
    how = medmoe_jax.Sampling(max_new_tokens=1)
    want = medmoe_jax.load(start).generate("Is it?", None, how)
    have = medmoe_jax.load(start, mesh=(-1, 1, 1)).generate("Is it?", None, how)
    assert have.ids == want.ids
    np.testing.assert_allclose(have.log_probs, want.log_probs, atol=1e-6)


def test_a_mesh_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"does not divide 1 device\(s\)"):
        medmoe_jax.load(tmp_path, mesh=(1, 1, 3))
    assert mesh_sizes("1,-1,4") == medmoe_jax.config.MeshConfig(1, -1, 4)
    with pytest.raises(ValueError, match="unpack"):
        mesh_sizes("1,2")
