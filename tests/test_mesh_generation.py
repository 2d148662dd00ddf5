"""Generation over several devices says what it says on one."""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import mesh_generation
import numpy as np
import pytest
import tiny_runs
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from mesh_generation import QUICK, REST, Case

import medmoe_jax
from medmoe_jax import generate, placement, quantize, sharding
from medmoe_jax.config import ConfigError, MoeConfig
from medmoe_jax.model import mesh_sizes
from medmoe_jax.models import medmoe, quantized

pytestmark = pytest.mark.usefixtures("quick_compile")


@functools.cache
def rows(cases: tuple[Case, ...]) -> dict[str, dict[str, Any]]:
    """What a process of its own finds for the cases, by their names."""
    command = [sys.executable, mesh_generation.__file__, *map(str, cases)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {row["case"]: row for row in map(json.loads, done.stdout.splitlines())}


def row(case: Case) -> dict[str, Any]:
    """Of the cases that share answers on one device, one process makes all rows."""
    if case in QUICK:
        return rows(QUICK)[str(case)]
    alike = case._replace(mesh=(1, 1, 1))
    return rows(tuple(c for c in REST if c._replace(mesh=(1, 1, 1)) == alike))[str(case)]


@pytest.mark.parametrize(
    "case",
    [
        *(pytest.param(case, id=str(case)) for case in QUICK),
        *(pytest.param(case, id=str(case), marks=pytest.mark.slow) for case in REST),
    ],
)
def test_answers_are_those_of_one_device(case: Case) -> None:
    """The same ids; probabilities, scores of options and the router's posterior to 1e-5. Each
    device holds its share of the experts, and no token moves a matrix."""
    found = row(case)
    assert all(found["same"].values()), found["same"]
    assert max(found["differences"].values()) < 1e-5, found["differences"]
    _, fsdp, expert = case.mesh
    divides = case.experts % expert == 0
    assert found["trees"] == (case.experts // expert if divides else case.experts)
    parts = fsdp * expert
    if case.bits == 4 and not divides:  # hidden layers of 24 / GROUP groups lie on all devices
        parts = max(n for n in (1, fsdp, expert, parts) if 24 // mesh_generation.GROUP % n == 0)
    assert found["share"] == pytest.approx(1 / parts, abs=0.01)
    assert found["moved"] == []


@pytest.mark.parametrize(
    ("path", "shape", "ways", "want"),
    [
        ("llm/blocks/0/moe/experts/0/fc1/kernel", (2, 16, 24), 2, P("expert", None, "fsdp")),
        ("llm/blocks/0/moe/experts/0/fc1/bias", (2, 24), 2, P("expert", "fsdp")),
        ("llm/blocks/0/moe/experts/1/down/kernel", (2, 24, 16), 2, P("expert", "fsdp", None)),
        ("llm/blocks/0/moe/experts/1/fc2/bias", (2, 16), 2, P("expert", None)),
        ("llm/blocks/0/moe/experts/2/up/kernel", (16, 24), 1, P(None, ("expert", "fsdp"))),
        ("llm/blocks/0/moe/experts/0/up/lora_a", (2, 16, 2), 2, P("expert", None, None)),
        ("llm/blocks/0/moe/experts/0/up/lora_b", (2, 2, 24), 2, P("expert", None, "fsdp")),
        ("llm/blocks/0/moe/meta/fc2/lora_a", (24, 2), 2, P(("expert", "fsdp"), None)),
        ("llm/blocks/0/moe/meta/fc2/lora_b", (2, 16), 2, P(None, None)),
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


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_parameters(bits: int) -> None:
    """Integers lie as the kernel would, step sizes with them; with 4 bits between groups of inputs,
    and all layers of an FFN alike: 12 groups of the hidden layer's 24 go over 4 devices, not 8."""
    cfg = tiny_runs.model_config("stablelm", MoeConfig(2))
    shapes: Any = jax.eval_shape(partial(generate.for_generation, cfg=cfg), medmoe.shapes(cfg))
    small = jax.eval_shape(partial(quantize.quantize, bits=bits, group=2), shapes)
    mesh: Any = AbstractMesh((1, 2, 4), sharding.AXES, axis_types=(AxisType.Auto,) * 3)
    places = placement.places(small, cfg, mesh)
    both = ("expert", "fsdp")
    split = both if bits == 8 else "expert"
    for ffn in (places["llm"]["blocks"][0]["moe"]["experts"][1], places["llm"]["blocks"][1]["mlp"]):
        up, down = (ffn[name]["kernel"] for name in ("up", "down"))
        assert up.scale.spec == (P(split) if bits == 8 else P(None, split))
        assert down.scale.spec == (P(None) if bits == 8 else P(split, None))
        if bits == 8:
            assert up.values.spec == P(None, split) and down.values.spec == P(split, None)
        else:
            assert up.values.spec == P(None, None, split)
            assert down.values.spec == P(split, None, None)
    assert places["llm"]["lm_head"]["kernel"].scale.spec[-1] == both
    stacked = places["vision"]["layers"]["fc1"]["kernel"]  # [L, 8, 16]
    assert stacked.values.spec[1] == (both if bits == 8 else "expert")
    assert places["llm"]["blocks"][0]["moe"]["router"]["fc1"]["kernel"].spec == P(None, None)


@pytest.mark.parametrize("bits", [0, 8, 4])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "split", "joined"),
    [
        (2, 2, "fsdp", "fsdp"),  # fewer than the eight devices
        (4, 4, "expert", "expert"),
        (6, 6, "fsdp", "fsdp"),
        (32, 32, ("expert", "fsdp"), "expert"),  # 20 groups of inputs: five on a device
        (32, 4, "expert", "expert"),
        (8, 2, "fsdp", "fsdp"),
        (6, 3, None, None),
        (8, 1, None, None),
    ],
)
def test_attention_is_split_between_heads(
    heads: int, kv_heads: int, split: Any, joined: Any, bits: int
) -> None:
    """A device has whole heads of keys and values, as the cache has them, and all queries that read
    them; with 4 bits (the last column) `out` is cut between groups of inputs besides."""
    mesh: Any = AbstractMesh((1, 2, 4), sharding.AXES, axis_types=(AxisType.Auto,) * 3)
    cfg = tiny_runs.model_config("phi")
    llm = dataclasses.replace(cfg.llm, width=480, heads=heads, kv_heads=kv_heads)
    cfg = dataclasses.replace(cfg, llm=llm)
    d, kv, group = llm.width, kv_heads * llm.head_dim, 24

    def linear(n_in: int, n_out: int) -> dict[str, Any]:
        sizes = {"kernel": (n_in, n_out), "bias": (n_out,)}
        sizes |= {"lora_a": (n_in, 2), "lora_b": (2, n_out)}
        leaves: dict[str, Any] = {k: jax.ShapeDtypeStruct(v, np.float32) for k, v in sizes.items()}
        if bits:
            small = partial(quantize.kernel, bits=bits, group=group)
            leaves["kernel"] = jax.eval_shape(small, leaves["kernel"])
        return leaves

    attn = {"q": linear(d, d), "k": linear(d, kv), "v": linear(d, kv), "out": linear(d, d)}
    tree = {"llm": {"blocks": ({"layers": {"attn": attn}},)}}
    found = placement.places(tree, cfg, mesh)["llm"]["blocks"][0]["layers"]["attn"]
    cut = {"kernel": P(None, split), "bias": P(split), "lora_a": P(None, None)}
    cut |= {"lora_b": P(None, split)}
    joined = P(joined if bits == 4 else split, None)
    ends = {"kernel": joined, "bias": P(None), "lora_a": P(split, None), "lora_b": P(None, None)}
    for name, layer in attn.items():
        want = cut if name in "qkv" else ends
        for leaf, value in layer.items():
            have = jax.tree.map(lambda place: place.spec, found[name][leaf])
            assert have == quantized.split(value, want[leaf]), (name, leaf)
    cache = sharding.fitting(sharding.BOTH, kv_heads, mesh)
    assert cache == ((split,) if isinstance(split, str) else (split or ()))


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
