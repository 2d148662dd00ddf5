"""Meshes, where parameters lie on them, and that a step is the same on each of them."""

from __future__ import annotations

import functools
import json
import logging
import math
import re
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import mesh_table
import numpy as np
import pytest
import small_models
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from mesh_table import QUICK, REST, ROUTINGS, Case

from medmoe_jax import sharding
from medmoe_jax.config import ConfigError, MeshConfig
from medmoe_jax.models import experts, layers


def abstract(*sizes: int) -> AbstractMesh:
    """A mesh of devices that need not exist."""
    return AbstractMesh(sizes, sharding.AXES, axis_types=(AxisType.Auto,) * len(sizes))


@functools.cache
def run(cases: str) -> subprocess.CompletedProcess[str]:
    """Makes the table of QUICK or of REST, once."""
    command = [sys.executable, mesh_table.__file__, cases]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def table(cases: str) -> dict[str, dict[str, Any]]:
    """Its rows, and what else the program says, by their case."""
    done = run(cases)
    assert done.returncode == 0, done.stderr
    return {row["case"]: row for row in map(json.loads, done.stdout.splitlines())}


CASES = [
    *(pytest.param(case, "QUICK", id=str(case)) for case in QUICK),
    *(pytest.param(case, "REST", id=str(case), marks=pytest.mark.slow) for case in REST),
]


@pytest.mark.parametrize(("case", "where"), CASES)
def test_a_step_is_that_of_one_device(case: Case, where: str) -> None:
    """Loss, gradients, their norm and the weights after it."""
    bound = 1e-5 if case.model.dtype == "float32" else 5e-2
    for routing in ROUTINGS:
        found = table(where)[str(case)]["differences"][routing]
        assert set(found) == {"loss", "norm", "gradient", "weights"}
        assert all(value < bound for value in found.values()), (routing, found)


@pytest.mark.parametrize(("case", "where"), CASES)
def test_experts_are_split(case: Case, where: str) -> None:
    """Each device holds its own experts, and tokens are exchanged for that."""
    row = table(where)[str(case)]
    _, fsdp, devices = case.mesh
    assert row["shards"]
    for path, shape in row["shards"].items():
        whole = row["whole"][path]
        assert shape[1] * devices == whole[1] == case.model.experts, path
        if path.endswith("kernel") and whole[2] % fsdp == 0:
            assert shape[2] * fsdp == whole[2], path
    kinds = {"all_gather", "reduce_scatter"} if devices > 1 else set()
    assert set(row["groups"]) == kinds
    assert all(size == devices for sizes in row["groups"].values() for size in sizes)


@pytest.mark.parametrize(("case", "where"), CASES)
def test_a_step_moves_what_it_must(case: Case, where: str) -> None:
    """The state is changed in its place, images stay where they are (also in micro-batches), and
    nothing goes through the host."""
    program = table(where)[str(case)]["program"]
    assert program["reused"] == program["leaves"] > 20
    assert program["images"] == program["host"] == program["whole"] == []


@pytest.mark.parametrize(("case", "where"), CASES)
def test_a_device_holds_its_share(case: Case, where: str) -> None:
    """Weights that train are float32 and have moments, frozen ones what was asked for (but for the
    router) and have none; all matrices are split."""
    memory = table(where)[str(case)]["memory"]
    train, frozen = memory["train"], memory["frozen"]
    assert train and frozen and not train.keys() & frozen.keys()
    assert memory["mu"] == memory["nu"] == train
    assert set(memory["others"]) == {1}  # counters
    assert {dtype for dtype, *_ in train.values()} == {"float32"}
    model = case.model
    for path, (dtype, *_) in frozen.items():
        if path.endswith("kernel/values"):
            assert model.frozen == "int8" == dtype or model.frozen == "int4", path
        elif "/router/" in path or path.endswith("kernel/scale"):
            assert dtype == "float32", path
        else:
            assert dtype == (model.frozen if model.frozen == "bfloat16" else model.dtype), path
    _, *axes = case.mesh
    for path, (_, whole, held) in (train | frozen).items():
        path = path.removesuffix("/values")
        if not path.endswith("kernel") or re.search("/(router|experts)/|embedding", path):
            continue
        if model.frozen == "int4":  # tiny matrices are one group, which is not split
            continue
        split = whole[-1] if "lm_head" in path else whole[-2]
        ways = [1, *axes, axes[0] * axes[1]]
        assert math.prod(whole) == math.prod(held) * max(n for n in ways if split % n == 0), path


def test_a_model_is_read_once_whatever_the_mesh() -> None:
    """A part that several devices hold too; frozen weights arrive in bfloat16."""
    row = table("QUICK")["loaded"]
    assert row["equal"]
    assert row["bytes"] <= row["read"] < 1.3 * row["bytes"]


def test_experts_run_on_the_tokens_that_chose_them() -> None:
    assert table("QUICK")["idle expert"]["difference"] < 1e-5


@pytest.mark.parametrize(
    ("sizes", "rows", "as_tuple", "message"),
    [
        ((1, 1, 1), 2, False, ""),
        ((2, 1, 2), 8, False, ""),
        ((2, 1, 2), 6, False, "4 devices do not divide 6 rows"),
        ((2, 1, 3), 6, False, "3 devices of the axis 'expert' do not divide 4 experts"),
        ((2, 1, 2), 4, True, ""),
        ((2, 2, 3), 5, True, ""),
    ],
)
def test_form(sizes: tuple[int, ...], rows: int, as_tuple: bool, message: str, caplog: Any) -> None:
    """Which form is traced, and what the log says, however often."""
    p = small_models.fill(layers.mlp_leaves("phi", 8, 12, (4,)))
    if as_tuple:
        p = tuple(experts.expert(p, e) for e in range(4))
    x, choice = jnp.ones((rows, 5, 8)), jnp.zeros((rows, 5, 1), jnp.int32)
    experts._warn.cache_clear()
    with jax.sharding.use_abstract_mesh(abstract(*sizes)), caplog.at_level(logging.WARNING):
        for _ in range(2):
            form = jax.make_jaxpr(lambda *a: experts.mixture(*a, 4))(p, x, choice, x[..., :1])
    assert ("shard_map" in str(form)) == (np.prod(sizes) > 1 and not message)
    assert [record.message for record in caplog.records] == (
        [f"Every expert is run on every token: {message}"] if message else []
    )


def test_axes() -> None:
    """The names that the models and the config use are those of the mesh."""
    assert experts.AXIS in sharding.AXES
    assert tuple(vars(MeshConfig())) == sharding.AXES


def test_mesh() -> None:
    here = jax.devices()[:1]
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=-1, expert=1), here)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "expert": 1}
    for wrong in (MeshConfig(-1, -1, 1), MeshConfig(-1, 1, 2), MeshConfig(-1, 0, 1)):
        with pytest.raises(ConfigError, match=r"does not divide 1 device\(s\)"):
            sharding.make_mesh(wrong, here)
    with pytest.raises(ConfigError, match=r"does not divide 4 device\(s\)"):
        sharding.make_mesh(MeshConfig(-2, -2, 1), here * 4)


def machines(*gpus: int) -> list[SimpleNamespace]:
    """Stand-ins for so many GPUs of each machine."""
    owners = [owner for owner, n in enumerate(gpus) for _ in range(n)]
    return [
        SimpleNamespace(id=i, slice_index=owner, platform="gpu", device_kind="GPU")
        for i, owner in enumerate(owners)
    ]


@pytest.mark.parametrize(
    ("gpus", "sizes", "want"),
    [
        ((4,), (1, 2, 2), [[[0, 0], [0, 0]]]),
        ((4, 4), (2, 2, 2), [[[0, 0], [0, 0]], [[1, 1], [1, 1]]]),
        ((4, 4), (1, 4, 2), [[[0, 0], [0, 0], [1, 1], [1, 1]]]),
        ((2, 2, 2, 2), (2, 1, 4), [[[0, 0, 1, 1]], [[2, 2, 3, 3]]]),
        ((3, 3), (3, 2, 1), [[[0], [1]]] * 3),
    ],
)
def test_the_first_axes_cross_machines(gpus: Any, sizes: Any, want: Any) -> None:
    """The slow network is between machines, or slices of TPUs; `jax.make_mesh` refuses several."""
    found = sharding.arranged(sizes, machines(*gpus))
    assert [[[d.slice_index for d in row] for row in part] for part in found] == want
    assert sorted(device.id for device in found.flat) == list(range(sum(gpus)))


def test_machines_are_equally_large() -> None:
    with pytest.raises(ConfigError, match=r"have \[2, 4\] devices"):
        sharding.arranged((3, 2, 1), machines(4, 2))


@pytest.mark.parametrize(
    ("path", "shape", "want"),
    [
        ("llm/moe/experts/fc1/kernel", (2, 4, 16, 20), P(None, "expert", "fsdp", None)),
        ("llm/moe/experts/fc1/kernel", (2, 3, 15, 20), P(None, None, None, None)),
        ("llm/moe/experts/fc1/bias", (2, 6, 20), P(None, "expert", None)),
        ("llm/moe/meta/fc1/kernel", (2, 16, 20), P(None, ("expert", "fsdp"), None)),
        ("llm/moe/meta/fc1/kernel", (2, 6, 20), P(None, "expert", None)),
        ("llm/moe/router/fc1/kernel", (2, 16, 4), P()),
        ("llm/layers/ln1/scale", (4, 16), P()),
    ],
)
def test_parameters(path: str, shape: tuple[int, ...], want: P) -> None:
    """By the table, without the axes that do not divide."""
    assert sharding.spec(path, shape, abstract(1, 2, 2)) == want


def test_an_unknown_parameter() -> None:
    with pytest.raises(
        ConfigError, match="no sharding rule matches the parameter 'llm/new/kernel'"
    ):
        sharding.spec("llm/new/kernel", (1, 2, 3), abstract(1, 1, 1))
