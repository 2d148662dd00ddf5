"""A program that compares one training step on meshes of eight virtual CPU devices with that on
one device, and prints what it found as JSON, one object a line.

`test_sharding.py` runs it: the number of devices is fixed once JAX has started.
"""

from __future__ import annotations

import functools
import json
import math
import re
import sys
import tempfile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import small_models
import tensorstore
from flax.traverse_util import flatten_dict, unflatten_dict

from medmoe_jax import checkpoint, layout, lora, optim, sharding, step, stored
from medmoe_jax.config import (
    LoraConfig,
    MeshConfig,
    ModelConfig,
    MoeConfig,
    OptimConfig,
    RunConfig,
)
from medmoe_jax.models import experts, grouped, layers
from medmoe_jax.plan import hlo_text

DEVICES = 8
ROUTINGS = ("mixed", "one expert")


class Model(NamedTuple):
    """What a step is about, whatever the devices."""

    family: str
    top_k: int
    experts: int = 4
    remat: str = "none"
    dtype: str = "float32"
    accumulate: int = 1
    lora: int = 0  # rank of adapters
    frozen: str = "bfloat16"  # how frozen weights are kept
    everything: bool = False  # all of the language model trains, as in stage 2


class Case(NamedTuple):
    """A model and the devices along data, fsdp and expert."""

    model: Model
    mesh: tuple[int, int, int]

    def __str__(self) -> str:
        return "-".join(map(str, (*self.model, "x".join(map(str, self.mesh)))))


MESHES = ((8, 1, 1), (1, 8, 1), (1, 2, 4), (2, 1, 4), (2, 2, 2), (4, 1, 2), (1, 4, 2))
PHI, PHI2 = Model("phi", 1), Model("phi", 2, remat="full")
STABLELM, STABLELM2 = Model("stablelm", 1, remat="dots"), Model("stablelm", 2)
ALL = tuple(Case(model, mesh) for mesh in MESHES for model in (PHI, PHI2, STABLELM, STABLELM2))
# Every axis alone and with others, both families, one expert and two; the rest is marked slow.
QUICK = (
    Case(PHI, (8, 1, 1)),
    Case(Model("stablelm", 2, everything=True), (1, 8, 1)),
    Case(PHI, (1, 2, 4)),
    Case(Model("phi", 1, remat="full", lora=2, frozen="int8"), (2, 2, 2)),
    Case(Model("phi", 2, experts=6), (2, 1, 3)),  # on six of the devices
    Case(Model("stablelm", 1, experts=2, accumulate=2), (1, 4, 2)),
)
REST = (
    *(case for case in ALL if case not in QUICK),
    Case(Model("phi", 2, remat="full", dtype="bfloat16"), (1, 2, 4)),
    Case(Model("phi", 1, remat="full", everything=True), (2, 2, 2)),
    Case(Model("phi", 1, lora=2), (2, 2, 2)),
    Case(Model("phi", 2, lora=2, frozen="int8"), (1, 2, 4)),
    Case(Model("phi", 1, lora=2, frozen="int4"), (2, 2, 2)),
    Case(Model("phi", 1, remat="dots", frozen="int8"), (1, 8, 1)),
    Case(Model("phi", 2, experts=6), (4, 1, 2)),
    Case(Model("stablelm", 2, experts=6), (1, 2, 3)),
    Case(Model("phi", 2, experts=2), (2, 2, 2)),
    Case(Model("stablelm", 1, experts=8), (1, 1, 8)),
)


class Result(NamedTuple):
    """What a step gave, for each of ROUTINGS, and what the program looks like."""

    values: dict[str, dict[str, Any]]  # routing -> loss, norm, gradient, weights
    shards: dict[str, tuple[int, ...]]  # see `parts`
    groups: dict[str, list[int]]  # see `groups`
    program: dict[str, Any]  # see `facts`
    memory: dict[str, Any]  # see `memory`


def config(model: Model) -> tuple[RunConfig, ModelConfig]:
    """A run that trains what the official stage 3 trains, or adapters. The large epsilon makes
    Adam's step a smooth function of the gradient, also where that is about zero. Adapters add half
    of what weights give: with four times that, attention is so steep that one device in float32 is
    1.6e-5 away from the gradient in float64."""
    whole = ("llm/moe/(experts|meta)/.*", "llm/mlp/.*", "projector/.*")
    sizes = small_models.config(model.family, MoeConfig(model.experts, model.top_k), layers=4)
    return RunConfig(
        model=sizes,
        train=("llm/.*",) if model.lora or model.everything else whole,
        lora=LoraConfig(model.lora, alpha=model.lora / 2, dropout=0.0),
        compute_dtype=model.dtype,
        frozen_dtype=model.frozen,
        remat=model.remat,
        loss_chunk=0,
        optim=OptimConfig(
            lr=1e-2, schedule="constant", warmup=0.0, eps=1e-2, accumulate=model.accumulate
        ),
    ), sizes


def batch(sizes: ModelConfig, rows: int) -> dict[str, np.ndarray]:
    """Rows of different lengths, the last one nothing but padding."""
    found = small_models.batch(sizes, (1, 0, 2, 0, 1, 0, 1, 0) * (rows // DEVICES), text=3)
    for key, nothing in (("tokens", 0), ("image_pos", -1), ("labels", -100), ("mask", False)):
        found[key][-1] = nothing
    keys = ("tokens", "image_pos", "labels", "mask", "images", "modality")
    return {key: found[key] for key in keys}


def parameters(run: RunConfig, sizes: ModelConfig, routing: str) -> dict[str, np.ndarray]:
    """Random parameters, adapters among them; the router prefers the last expert for all tokens, if
    so wanted."""
    flat = flatten_dict(small_models.params(sizes), sep="/")
    flat |= small_models.fill(lora.shapes(run, flat), seed=1)
    if routing == "one expert":
        kernel, bias = (f"llm/moe/router/fc1/{name}" for name in ("kernel", "bias"))
        flat[kernel] = 0 * flat[kernel]
        flat[bias] = np.broadcast_to(np.arange(flat[bias].shape[-1], dtype="f"), flat[bias].shape)
    return flat


def first_step(model: Model, mesh: jax.sharding.Mesh, size: int) -> Result:
    """One step with `size` rows on the devices of a mesh; compiled once for all routings."""
    run, sizes = config(model)
    values: dict[str, dict[str, Any]] = {}
    program: Any = None
    shards: dict[str, tuple[int, ...]] = {}
    held: dict[str, Any] = {}
    rows = sharding.place_batch(batch(sizes, size), mesh)
    for routing in ROUTINGS:
        flat = parameters(run, sizes, routing)
        label = layout.labels(run, flat)
        train, frozen = (
            layout.place_weights(run, part, label, mesh) for part in optim.split(flat, label)
        )
        tx = optim.make(run.optim, 10, label)
        state = layout.first_state(tx, train, frozen, mesh)
        shards, places = parts(train), jax.tree.map(lambda leaf: leaf.sharding, state)
        with jax.set_mesh(mesh):
            if program is None:
                one = step.make_step(run, sizes, tx, state)
                program = one.lower(state, frozen, rows).compile()
            state, metrics = program(state, frozen, rows)
        held = memory(state, frozen)
        assert parts(state.train) == shards, "the step has moved experts"
        assert jax.tree.map(lambda leaf: leaf.sharding, state) == places, "the state has moved"
        values[routing] = jax.device_get(
            {
                "loss": metrics["loss"],
                "norm": metrics["grad_norm"],
                "gradient": optax.tree.get(state.opt, "mu"),
                "weights": state.train,
            }
        )
    return Result(values, shards, groups(program.as_text()), facts(program, state), held)


def parts(flat: dict[str, jax.Array]) -> dict[str, tuple[int, ...]]:
    """Shapes of what one device holds of the experts."""
    held = {path: value for path, value in flat.items() if "/experts/" in path}
    return {path: value.addressable_shards[0].data.shape for path, value in held.items()}


def groups(program: str) -> dict[str, list[int]]:
    """Sizes of the groups of devices that exchange tokens in a compiled program."""
    found: dict[str, list[int]] = {}
    for line in program.splitlines():
        kind = re.search(r'op_name="[^"]*/shard_map/(all_gather|reduce_scatter)"', line)
        if kind and (size := hlo_text.group_size(line)):
            found.setdefault(kind[1], []).append(size)
    return found


def facts(program: Any, state: step.State) -> dict[str, Any]:
    """What a compiled step does beside its mathematics.

    Returns:
      leaves: of the state; reused: of them, those whose buffers are taken for the result. images:
      lines that send images to other devices. host: lines that talk to the host. whole: lines where
      a device holds all experts of all layers, be it weights, gradients or moments, though it owns
      some of them alone.
    """
    header, *lines = program.as_text().splitlines()
    shapes = {
        ",".join(map(str, leaf.shape))
        for path, leaf in state.train.items()
        if "/experts/" in path and leaf.ndim == 4 and not leaf.is_fully_replicated
    }
    call = re.compile(r" = (.*?) (all-|collective-|reduce-|infeed|outfeed|send|recv)[\w-]*\(")
    calls = [(found[1], found[2], line) for line in lines if (found := call.search(line))]
    return {
        "leaves": len(jax.tree.leaves(state)),
        "reused": header.count("-alias)"),
        "images": [line for kind, name, line in calls if "-" in name and "8,8,3]" in kind],
        "host": [line for _, name, line in calls if "-" not in name]
        + [line for line in lines if "callback" in line],
        "whole": [line for line in lines if any(f"[{shape}]" in line for shape in shapes)],
    }


def memory(state: step.State, frozen: dict[str, jax.Array]) -> dict[str, Any]:
    """What of the arguments of a step a device holds.

    Returns:
      train, mu and nu (the moments), frozen: path -> dtype, shape, and shape of a device's part;
      of quantized kernels under kernel/values and kernel/scale.
      others: of the optimiser's leaves, how many numbers each has that is no moment.
    """

    def described(flat: dict[str, Any]) -> dict[str, Any]:
        return {
            "/".join([path, *(key.name for key in place)]): (
                leaf.dtype.name,
                leaf.shape,
                leaf.addressable_shards[0].data.shape,
            )
            for path, kept in flat.items()  # a frozen parameter has a mark in place of its moments
            for place, leaf in jax.tree_util.tree_leaves_with_path(kept)
        }

    moments = {name: optax.tree.get(state.opt, name) for name in ("mu", "nu")}
    whole = {"train": state.train, **moments, "frozen": frozen}
    known = {id(leaf) for leaf in jax.tree.leaves(moments)}
    others = [leaf.size for leaf in jax.tree.leaves(state.opt) if id(leaf) not in known]
    return {name: described(flat) for name, flat in whole.items()} | {"others": others}


@functools.cache
def on_one_device(model: Model, size: int) -> Result:
    """The step that all meshes must repeat."""
    return first_step(model, sharding.make_mesh(MeshConfig(), jax.devices()[:1]), size)


def difference(have: Any, want: Any) -> float:
    """Largest difference between two trees, each leaf's relative to its largest number."""
    pairs = zip(jax.tree.leaves(have), jax.tree.leaves(want), strict=True)
    # np.max, unlike max, lets no NaN pass.
    return float(np.max([np.abs(a - b).max() / max(np.abs(b).max(), 1e-6) for a, b in pairs]))


def compare(case: Case) -> dict[str, Any]:
    """A row of the table."""
    devices = jax.devices()[: math.prod(case.mesh)]
    size = math.lcm(DEVICES, len(devices)) * case.model.accumulate
    want = on_one_device(case.model, size)
    have = first_step(case.model, sharding.make_mesh(MeshConfig(*case.mesh), devices), size)
    return {
        "case": str(case),
        "differences": {
            routing: {
                name: difference(value, want.values[routing][name])
                for name, value in have.values[routing].items()
            }
            for routing in ROUTINGS
        },
        "shards": have.shards,
        "whole": want.shards,
        "groups": have.groups,
        "program": have.program,
        "memory": have.memory,
    }


def loaded(mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """A model on its way from the disk to the devices.

    Returns:
      bytes: of all its parameters; read: from files; differences: of frozen weights, as bfloat16,
      and of those that train.
    """
    run, sizes = config(PHI)
    stored.CHUNK_BYTES = 64
    flat = parameters(run, sizes, "mixed")
    label = optim.labels(list(flat), run.train)
    with tempfile.TemporaryDirectory() as folder:
        meta = checkpoint.ModelMeta("stage3", sizes)
        checkpoint.save_model(folder, unflatten_dict(flat, sep="/"), meta)
        params, _ = checkpoint.open_model(folder)
        before = bytes_read()
        have = layout.place_weights(run, flatten_dict(params, sep="/"), label, mesh)
        read = bytes_read() - before
    want = {path: leaf.astype(have[path].dtype) for path, leaf in flat.items()}
    return {
        "case": "loaded",
        "bytes": sum(leaf.nbytes for leaf in flat.values()),
        "read": read,
        "equal": [path for path in want if (np.asarray(have[path]) == want[path]).all()] == [*want],
    }


def bytes_read() -> int:
    """What TensorStore has read from files so far."""
    name = "/tensorstore/kvstore/file/bytes_read"
    return tensorstore.experimental_collect_matching_metrics(name)[0]["values"][0]["value"]


def idle_expert(mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Tokens that avoid an expert whose weights are NaN: what that expert would give shows."""
    width, n = 8, 4
    # Without biases, which are added by a product with zeros and ones.
    p = small_models.fill(layers.mlp_leaves("stablelm", width, 12, (n,)))
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((8, 20, width)), jnp.float32)
    choice = jnp.asarray(rng.integers(1, n, (8, 20, 1)), jnp.int32)
    weight = jnp.ones((8, 20, 1))

    def total(p: Any, x: Any) -> Any:
        y = experts.mixture(p, x, choice, weight, n)
        return (y * y).sum(), y

    value = jax.value_and_grad(total, (0, 1), has_aux=True)
    want = value(p, x)
    spoilt = jax.tree.map(lambda a: np.concatenate([np.full_like(a[:1], np.nan), a[1:]]), p)
    with jax.set_mesh(mesh):
        have = jax.jit(value)(spoilt, x)
    return {"case": "idle expert", "difference": difference(have, want)}


def main() -> None:
    """Prints the table of the cases named on the command line: QUICK or REST."""
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    # Most of the time goes into compilation: no optimisations, and few sizes of groups.
    jax.config.update("jax_disable_most_optimizations", True)
    grouped.BUCKETS = 2
    for case in {"QUICK": QUICK, "REST": REST}[sys.argv[1]]:
        print(json.dumps(compare(case)), flush=True)
    print(json.dumps(idle_expert(sharding.make_mesh(MeshConfig(2, 1, 4)))), flush=True)
    print(json.dumps(loaded(sharding.make_mesh(MeshConfig(2, 2, 2)))), flush=True)


if __name__ == "__main__":
    main()
