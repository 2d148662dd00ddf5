"""The programs that training and generation run, compiled for a target from shapes alone."""

from __future__ import annotations

import dataclasses
import re
import time
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import AbstractMesh, Mesh

from medmoe_jax import flops, generate, layout, optim, placement, sharding, step
from medmoe_jax.config import ConfigError, LoraConfig, MeshConfig, ModelConfig, RunConfig
from medmoe_jax.plan.targets import Target

STEPS = 1000  # of the schedule; the program is the same for any number


class Program(NamedTuple):
    """A compiled program, or why there is none."""

    name: str  # train | prefill | decode
    mesh: dict[str, int]
    arguments: dict[str, float]  # what a device holds of each group of arguments, bytes
    model_flops: float  # of all devices
    text: str  # optimised HLO; "" where it does not fit
    memory: dict[str, float]  # bytes of a device, as the compiler says
    obstacle: str  # why there is no program
    too_large: bool  # whether that is for want of memory
    seconds: float  # to compile


def held(tree: Any) -> float:
    """Bytes that one device holds of ShapeDtypeStructs with places."""
    return sum(
        float(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=float)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def mesh_config(text: str) -> MeshConfig:
    """'1,2,4' -> MeshConfig. Raises ConfigError."""
    if not re.fullmatch(r"-?\d+,-?\d+,-?\d+", text):
        raise ConfigError(f"mesh {text!r}: give data,fsdp,expert, as in 1,2,4 (-1 fills one axis)")
    return MeshConfig(*(int(n) for n in text.split(",")))


class Abstract(NamedTuple):
    """What enters a training step, as shapes."""

    state: step.State
    frozen: dict[str, Any]
    batch: dict[str, Any]
    label: dict[str, str]
    tx: Any

    @property
    def groups(self) -> dict[str, float]:
        """Bytes a device."""
        return {
            "trainable": held(self.state.train),
            "frozen": held(self.frozen),
            "optimiser": held(self.state.opt),
            "batch": held(self.batch),
        }


def abstract(cfg: RunConfig, mesh: Mesh, length: int, images: int) -> Abstract:
    """What training would put on the devices.

    Raises:
      ConfigError: the batch cannot be split over them, or a setting does not fit.
    """
    layout.check_batch_size(cfg, mesh)
    layout.check_experts(layout.model_of(cfg), mesh)
    places = cfg.model.vision.patches * images
    if length < 1 or images < 0 or places > length:
        raise ConfigError(f"{images} image(s) of {places} places do not fit into {length} tokens")
    flat = layout.shapes(cfg)
    label = layout.labels(cfg, flat)
    tx = optim.make(cfg.optim, STEPS, label)
    train, frozen = layout.abstract_weights(cfg, flat, label, mesh)
    state = layout.abstract_state(tx, train, frozen, mesh)
    batch = layout.abstract_batch(cfg, mesh, length, max(images, 1))
    return Abstract(state, frozen, batch, label, tx)


def train_step(cfg: RunConfig, target: Target, length: int, images: int) -> Program:
    """The step of `train` on all devices of the target.

    Args:
      cfg: the run, its mesh included.
      target: the devices.
      length: tokens of a row.
      images: images of a row.
    """
    mesh = sharding.make_mesh(cfg.mesh, target.devices)
    model = layout.model_of(cfg)
    given = abstract(cfg, mesh, length, images)
    rows = cfg.optim.batch_size
    work = flops.costs(cfg, model, given.label).total([length] * rows, rows * images)
    with jax.set_mesh(mesh):
        traced = step.make_step(cfg, model, given.tx, given.state).trace(
            given.state, given.frozen, given.batch
        )
        return compiled("train", traced, target, dict(mesh.shape), given.groups, work)


def left_out(cfg: RunConfig, target: Target, length: int, images: int, obstacle: str) -> Program:
    """In place of `train_step`, for a run that needs no compiler to see that it does not fit."""
    mesh = sharding.make_mesh(cfg.mesh, target.devices)
    groups = abstract(cfg, mesh, length, images).groups
    return Program("train", dict(mesh.shape), groups, 0.0, "", {}, obstacle, True, 0.0)


def generation(
    cfg: RunConfig,
    target: Target,
    length: int,
    images: int,
    new: int,
    mesh_cfg: MeshConfig | None = None,
) -> list[Program]:
    """Prefill of prompts and decoding of one token a row.

    Args:
      cfg: model and dtype; batch_size is the number of rows.
      target: the devices.
      length: tokens of a prompt.
      images: images of a row.
      new: tokens that the cache has room for beside the prompt.
      mesh_cfg: as of `medmoe_jax.load`; None = the first device alone.
    """
    cfg = dataclasses.replace(cfg, lora=LoraConfig())  # adapters are in the weights by then
    model, dtype, rows = layout.model_of(cfg), jnp.dtype(cfg.compute_dtype), cfg.optim.batch_size
    devices = target.devices if mesh_cfg else target.devices[:1]
    mesh = sharding.make_mesh(mesh_cfg or MeshConfig(1, 1, 1), devices)
    there = partial(sharding.outline, mesh=mesh)
    params = generation_weights(cfg, model, mesh)
    size = generate.bucket(length + new)
    state = jax.eval_shape(lambda: generate.empty(model, rows, size, dtype))
    state = generate.laid_out(state, there)
    batch = layout.abstract_batch(cfg, mesh, length, max(images, 1))
    batch = {k: there(v) for k, v in batch.items() if k not in ("labels", "modality")}
    unit = flops.costs(cfg, model, {})
    # The scores of the last token of a row alone are computed.
    head = 2.0 * model.llm.width * model.llm.vocab
    read = unit.total([length] * rows, rows * images) - head * rows * (length - 1)
    each = rows * (unit.token + unit.pair * length)
    sizes = dict(mesh.shape) if mesh.size > 1 else {}

    def follow(p: Any, state: Any, token: Any) -> Any:
        valid = jnp.ones(rows, bool)
        return generate.laid_out(generate.follow(p, model, state, token, valid, dtype))

    with jax.set_mesh(mesh):
        groups = {"frozen": held(params), "cache": held(state), "batch": held(batch)}
        traced = generate.extend.trace(params, model, state, batch, dtype, fresh=True)
        prefill = compiled("prefill", traced, target, sizes, groups, read)
        token = there(jax.ShapeDtypeStruct((rows,), jnp.int32))
        traced = jax.jit(follow, donate_argnums=1).trace(params, state, token)
        groups = {"frozen": held(params), "cache": held(state)}
        return [prefill, compiled("decode", traced, target, sizes, groups, each)]


def generation_weights(cfg: RunConfig, model: ModelConfig, mesh: Mesh | AbstractMesh) -> Any:
    """The parameters that answering takes, as shapes where `medmoe_jax.load` puts them."""
    kinds = layout.dtypes(cfg, dict.fromkeys(layout.shapes(cfg), optim.FROZEN))
    flat = {
        path: layout.kept_as(leaf.shape, kinds[path])
        for path, leaf in layout.shapes(cfg).items()
        if not path.startswith("router/")
    }
    ways = sharding.generation_ways(mesh, model)
    tree = unflatten_dict(flat, sep="/")
    params = jax.eval_shape(lambda p: generate.for_generation(p, model, ways), tree)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        params,
        placement.places(params, model, mesh),
    )


def compiled(
    name: str,
    traced: Any,
    target: Target,
    mesh: dict[str, int],
    groups: dict[str, float],
    work: float,
) -> Program:
    """Compiles a traced function.

    Args:
      name: of the program.
      traced: with shapes that have places.
      target: the devices.
      mesh: their axes.
      groups: bytes of a device, by what they are for.
      work: model FLOPs of all devices.
    """
    begun = time.perf_counter()
    text, memory, obstacle, too_large = "", {}, "", False
    try:
        program = traced.lower(lowering_platforms=(target.platform,)).compile()
    except jax.errors.JaxRuntimeError as error:
        too_large = "RESOURCE_EXHAUSTED" in str(error)
        obstacle = str(error).splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ")
    else:
        text, stats = program.as_text(), program.memory_analysis()
        memory = {
            "arguments": stats.argument_size_in_bytes,
            "outputs": stats.output_size_in_bytes,
            "reused": stats.alias_size_in_bytes,
            "temporaries": stats.temp_size_in_bytes,
            "code": stats.generated_code_size_in_bytes,
        }
    seconds = time.perf_counter() - begun
    return Program(name, mesh, groups, work, text, memory, obstacle, too_large, seconds)


def with_batch(cfg: RunConfig, rows: int) -> RunConfig:
    """The run with another number of rows a step."""
    return dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, batch_size=rows))
