"""What enters a training step: shapes, dtypes and places of weights, optimiser state and batch.

Training puts arrays where this says; a plan (`medmoe_jax.plan`) compiles the same step from the
shapes alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from medmoe_jax import lora, optim, quantize, sharding
from medmoe_jax.config import ConfigError, ModelConfig, RunConfig
from medmoe_jax.models import medmoe, moe, quantized
from medmoe_jax.step import State

# What a step reads of a batch; the last two where rows hold several samples.
ON_DEVICE = (
    *("tokens", "image_pos", "labels", "mask", "images", "modality"),
    *("segments", "positions"),
)
# The router decides in float32 whatever the rest of the model is stored in.
KEEP_FLOAT32 = ("router/", "llm/moe/router/", "llm/moe/coefficient/")
BITS = {"int8": 8, "int4": 4}  # what config.frozen_dtype can be for matrices alone
FROZEN = ("float32", "bfloat16", "float16", *BITS)

Flat = dict[str, Any]


def on_device(batch: dict[str, Any]) -> dict[str, Any]:
    """What a step reads of a batch."""
    return {name: batch[name] for name in ON_DEVICE if name in batch}


def check_batch_size(cfg: RunConfig, mesh: Mesh | AbstractMesh) -> None:
    """Raises ConfigError where a batch cannot be split over micro-batches and devices."""
    size, parts = cfg.optim.batch_size, cfg.optim.accumulate
    if parts < 1 or size < 1 or size % parts:
        raise ConfigError(
            f"optim.batch_size {size} cannot be split into {parts} micro-batches "
            "(optim.accumulate); use a multiple"
        )
    if size // parts % mesh.size:
        each = f", in {parts} micro-batches of {size // parts}," if parts > 1 else ""
        raise ConfigError(
            f"optim.batch_size {size}{each} cannot be split over {mesh.size} devices; "
            "use a multiple of their number, or fewer devices"
        )


def labels(cfg: RunConfig, paths: Iterable[str]) -> dict[str, str]:
    """path -> TRAIN or FROZEN (`optim.labels`): what config.train names, or with config.lora.rank
    the adapters alone. Raises ConfigError as those do."""
    paths = list(paths)
    label = optim.labels([path for path in paths if not lora.is_adapter(path)], cfg.train)
    if not cfg.lora.rank:
        return label
    return {path: optim.TRAIN if lora.is_adapter(path) else optim.FROZEN for path in paths}


def check_experts(model: ModelConfig, mesh: Mesh | AbstractMesh) -> None:
    """Raises ConfigError where experts cannot be shared out evenly: training would have to run all
    of them on every token."""
    devices, experts = mesh.shape["expert"], model.moe.experts if model.moe else 0
    if experts % devices:
        fit = [str(n) for n in range(1, experts + 1) if experts % n == 0]
        raise ConfigError(
            f"mesh.expert {devices} does not divide the {experts} experts of the model; use one of "
            f"{', '.join(fit)}, and mesh.fsdp or mesh.data for the other devices"
        )


def dtypes(cfg: RunConfig, label: dict[str, str]) -> dict[str, np.dtype]:
    """The dtype each parameter is kept in: float32 what trains and the router, else
    config.frozen_dtype. Where that is of BITS, it is for matrices (`quantize.is_matrix`), and
    everything else frozen is in config.compute_dtype.

    Raises:
      ConfigError: config.frozen_dtype is unknown.
    """
    if cfg.frozen_dtype not in FROZEN:
        raise ConfigError(
            f"frozen_dtype {cfg.frozen_dtype!r} is unknown; use one of {', '.join(FROZEN)}"
        )
    single, frozen = np.dtype(np.float32), jnp.dtype(cfg.frozen_dtype)
    rest = jnp.dtype(cfg.compute_dtype) if cfg.frozen_dtype in BITS else frozen

    def kept(path: str, kind: str) -> np.dtype:
        if kind == optim.TRAIN or path.startswith(KEEP_FLOAT32):
            return single
        return frozen if quantize.is_matrix(path) else rest

    return {path: kept(path, kind) for path, kind in label.items()}


def place_weights(cfg: RunConfig, flat: Flat, label: dict[str, str], mesh: Mesh) -> Flat:
    """Parameters, or some of them (path -> array as `sharding.put` takes it), on the devices."""
    kinds = dtypes(cfg, label)
    small = {path: leaf for path, leaf in flat.items() if kinds[path].name in BITS}
    rest = {path: leaf for path, leaf in flat.items() if path not in small}
    return sharding.place(rest, mesh, kinds) | {
        path: _quantized(path, leaf, kinds[path], mesh) for path, leaf in small.items()
    }


def _quantized(path: str, leaf: Any, kind: np.dtype, mesh: Mesh) -> Any:
    """A matrix, or a stack of them, as `quantize.kernel` makes it of the numbers on disk, the same
    on any mesh. The devices hold those of one layer as floats at a time."""
    target = _outline(path, leaf.shape, kind, mesh)
    places = jax.tree.map(lambda part: part.sharding, target)
    bits, spec = BITS[kind.name], sharding.spec(path, leaf.shape, mesh)
    if leaf.ndim == 2:
        return _rounding(bits, places)(sharding.put(leaf, NamedSharding(mesh, spec)))
    made = jax.tree.map(
        lambda part: jnp.zeros(part.shape, part.dtype, device=part.sharding), target
    )
    for i in range(len(leaf)):
        layer = sharding.put(leaf[i], NamedSharding(mesh, P(*spec[1:])))
        made = _with_layer(bits, places)(made, layer, i)
    return made


@cache
def _rounding(bits: int, places: Any) -> Callable[[jax.Array], Any]:
    """Compiles a matrix -> its quantized kernel, which lies at `places`."""
    return jax.jit(partial(quantize.kernel, bits=bits, places=places), out_shardings=places)


@cache
def _with_layer(bits: int, places: Any) -> Callable[[Any, jax.Array, int], Any]:
    """Compiles (stack of quantized kernels, matrices of a layer, its number) -> the stack with that
    layer, in place."""
    here = jax.tree.map(lambda place: NamedSharding(place.mesh, P(*place.spec[1:])), places)

    def change(made: Any, layer: jax.Array, i: int) -> Any:
        new = quantize.kernel(layer, bits, places=here)
        return jax.tree.map(lambda whole, part: whole.at[i].set(part), made, new)

    return jax.jit(change, out_shardings=places, donate_argnums=0)


def first_state(tx: optax.GradientTransformation, train: Flat, frozen: Flat, mesh: Mesh) -> State:
    """Step 0 of a run, from arrays on the devices."""
    places = _beside(jax.eval_shape(tx.init, train | frozen), train, mesh)
    opt = jax.jit(tx.init, out_shardings=places)(train | frozen)
    return sharding.everywhere(State(jnp.zeros((), jnp.int32), train, opt), mesh)


def _beside(opt: Any, train: Flat, mesh: Mesh) -> Any:
    """Places of optimiser leaves: moments lie where their parameters do, counters everywhere."""

    def one(path: Any, leaf: Any) -> NamedSharding:
        owner = train.get(str(getattr(path[-1], "key", "")))
        if owner is not None and owner.shape == leaf.shape:
            return owner.sharding
        return NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(one, opt)


def model_of(cfg: RunConfig) -> ModelConfig:
    """The model that a phase runs: the router phase reads a dense one."""
    if cfg.objective == "router":
        return dataclasses.replace(cfg.model, moe=None).validate()
    return cfg.model.validate()


def shapes(cfg: RunConfig) -> Flat:
    """path -> f32 ShapeDtypeStruct of all parameters of a phase, adapters included.

    Raises:
      ConfigError: a router phase without config.model.moe, or adapters where there can be none.
    """
    model = model_of(cfg)
    tree = medmoe.shapes(model)
    if cfg.objective == "router":
        mixture = cfg.model.moe
        if mixture is None:
            raise ConfigError("the router phase needs config.model.moe")
        leaves = moe.router_leaves(model.llm.width, mixture.experts, mixture.router_layers)
        tree |= {
            "router": {
                layer: {
                    name: jax.ShapeDtypeStruct(leaf.shape, jnp.float32)
                    for name, leaf in part.items()
                }
                for layer, part in leaves.items()
            }
        }
    flat = flatten_dict(tree, sep="/")
    return flat | lora.shapes(cfg, flat)


def abstract_weights(
    cfg: RunConfig, flat: Flat, label: dict[str, str], mesh: Mesh
) -> tuple[Flat, Flat]:
    """What `place_weights` makes of leaves with the shapes of `flat`, as ShapeDtypeStructs with
    their places: (trainable, frozen). Raises ConfigError as `dtypes` does."""
    kinds = dtypes(cfg, label)
    outline = {path: _outline(path, leaf.shape, kinds[path], mesh) for path, leaf in flat.items()}
    return optim.split(outline, label)


def kept_as(shape: tuple[int, ...], kind: np.dtype) -> Any:
    """A parameter in one of `dtypes`, as ShapeDtypeStructs."""
    if kind.name not in BITS:
        return jax.ShapeDtypeStruct(shape, kind)
    whole = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(partial(quantize.kernel, bits=BITS[kind.name]), whole)


def _outline(path: str, shape: tuple[int, ...], kind: np.dtype, mesh: Mesh) -> Any:
    """`kept_as` with places. Step sizes lie with the numbers that they belong to."""
    leaf = kept_as(shape, kind)
    specs = quantized.split(leaf, sharding.spec(path, quantized.outline(leaf), mesh))
    return jax.tree.map(
        lambda part, spec: jax.ShapeDtypeStruct(
            part.shape, part.dtype, sharding=NamedSharding(mesh, spec)
        ),
        leaf,
        specs,
    )


def abstract_state(
    tx: optax.GradientTransformation, train: Flat, frozen: Flat, mesh: Mesh
) -> State:
    """What `first_state` makes, as ShapeDtypeStructs with their places."""
    opt = jax.eval_shape(tx.init, train | frozen)
    opt = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        opt,
        _beside(opt, train, mesh),
    )
    step: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P()))
    return State(step, train, opt)


def abstract_batch(
    cfg: RunConfig, mesh: Mesh, length: int, images: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """A whole batch as `sharding.place_batch` gives it to a step.

    Args:
      cfg: batch size and model.
      mesh: the devices.
      length: T, places of a row.
      images: images of a row.
    """
    rows, side = cfg.optim.batch_size, cfg.model.vision.image_size
    place = NamedSharding(mesh, P(sharding.AXES))
    numbers = dict.fromkeys(("tokens", "image_pos", "labels"), jnp.int32) | {"mask": jnp.bool_}
    found = {
        name: jax.ShapeDtypeStruct((rows, length), dtype, sharding=place)
        for name, dtype in numbers.items()
    }
    found["images"] = jax.ShapeDtypeStruct((rows, images, side, side, 3), jnp.uint8, sharding=place)
    found["modality"] = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=place)
    if cfg.data.batching == "pack":  # with a sample for each image
        for name in ("segments", "positions"):
            found[name] = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=place)
        found["modality"] = jax.ShapeDtypeStruct((rows, images), jnp.int32, sharding=place)
    return found
