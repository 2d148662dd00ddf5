"""The programs that training and generation run, compiled for a target from shapes alone."""

from __future__ import annotations

import dataclasses
import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, SingleDeviceSharding

from medmoe_jax import flops, generate, layout, optim, sharding, step
from medmoe_jax.config import ConfigError, LoraConfig, MeshConfig, RunConfig
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
    obstacle: str  # why it could not be compiled: out of memory
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
    with jax.set_mesh(mesh):
        traced = step.make_step(cfg, model, given.tx, given.state).trace(
            given.state, given.frozen, given.batch
        )
    rows = cfg.optim.batch_size
    work = flops.costs(cfg, model, given.label).total([length] * rows, rows * images)
    with jax.set_mesh(mesh):
        return _compiled("train", traced, target, dict(mesh.shape), given.groups, work)


def generation(cfg: RunConfig, target: Target, length: int, images: int, new: int) -> list[Program]:
    """Prefill of prompts and decoding of one token a row, on one device of the target.

    Args:
      cfg: model and dtype; batch_size is the number of rows.
      target: its first device is used.
      length: tokens of a prompt.
      images: images of a row.
      new: tokens that the cache has room for beside the prompt.
    """
    cfg = dataclasses.replace(cfg, lora=LoraConfig())  # adapters are in the weights by then
    model, dtype, rows = layout.model_of(cfg), jnp.dtype(cfg.compute_dtype), cfg.optim.batch_size
    place = SingleDeviceSharding(target.devices[0])

    def there(tree: Any) -> Any:
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), tree)

    kinds = layout.dtypes(cfg, dict.fromkeys(layout.shapes(cfg), optim.FROZEN))
    flat = {
        path: layout.kept_as(leaf.shape, kinds[path])
        for path, leaf in layout.shapes(cfg).items()
        if not path.startswith("router/")
    }
    tree = unflatten_dict(flat, sep="/")
    params = there(jax.eval_shape(lambda p: generate.for_generation(p, model), tree))
    size = generate.bucket(length + new)
    state = there(jax.eval_shape(lambda: generate.empty(model, rows, size, dtype)))
    whole = sharding.make_mesh(MeshConfig(1, 1, 1), target.devices[:1])
    batch = there(layout.abstract_batch(cfg, whole, length, max(images, 1)))
    batch = {k: v for k, v in batch.items() if k not in ("labels", "modality")}
    unit = flops.costs(cfg, model, {})
    groups = {"frozen": held(params), "cache": held(state), "batch": held(batch)}
    # The scores of the last token of a row alone are computed.
    head = 2.0 * model.llm.width * model.llm.vocab
    read = unit.total([length] * rows, rows * images) - head * rows * (length - 1)
    traced = generate.extend.trace(params, model, state, batch, dtype, fresh=True)
    found = [_compiled("prefill", traced, target, {}, groups, read)]

    def follow(p: Any, state: Any, token: Any) -> Any:
        return generate.follow(p, model, state, token, jnp.ones(rows, bool), dtype)

    token = there(jax.ShapeDtypeStruct((rows,), jnp.int32))
    traced = jax.jit(follow, donate_argnums=1).trace(params, state, token)
    each = rows * (unit.token + unit.pair * length)
    groups = {"frozen": held(params), "cache": held(state)}
    return [*found, _compiled("decode", traced, target, {}, groups, each)]


def _compiled(
    name: str,
    traced: Any,
    target: Target,
    mesh: dict[str, int],
    groups: dict[str, float],
    work: float,
) -> Program:
    begun = time.perf_counter()
    text, memory, obstacle = "", {}, ""
    try:
        program = traced.lower(lowering_platforms=(target.platform,)).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
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
    return Program(name, mesh, groups, work, text, memory, obstacle, seconds)


def with_batch(cfg: RunConfig, rows: int) -> RunConfig:
    """The run with another number of rows a step."""
    return dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, batch_size=rows))
