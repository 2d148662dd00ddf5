"""Mesh and placement of every parameter, optimiser leaf and batch: one ordered table.

Axes: `data` (batch), `fsdp` (batch; parameters and optimiser state are split), `expert` (batch;
experts are split). Every axis carries a share of the batch. Experts are spread over `expert` and,
inside one expert, over `fsdp`; all other large weights are spread over both. A device sees the
tokens of its neighbours along `expert` in MoE layers only, see `models.experts.spread`.

Generation reads all weights for few tokens, so there the weights stay and the tokens go to them:
`data` splits the conversations, `expert` the experts, and `fsdp` (and `expert`, in all other
weights) heads and hidden layers.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from math import gcd, prod
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from medmoe_jax.config import ConfigError, MeshConfig, ModelConfig

AXES = ("data", "fsdp", "expert")
BOTH = ("expert", "fsdp")

# regex on the path -> spec; the first match wins, a path without a match is an error.
RULES: tuple[tuple[str, P], ...] = (
    (r"llm/moe/experts/.*/(kernel|lora_[ab])", P(None, "expert", "fsdp", None)),
    (r"llm/moe/experts/.*/bias", P(None, "expert", None)),
    (r"(llm/moe/)?router/.*", P()),
    (r"llm/embed/embedding", P(BOTH, None)),
    (r"llm/lm_head/kernel", P(None, BOTH)),
    (r"llm/(layers|mlp|moe/meta|moe/coefficient)/.*(kernel|lora_[ab])", P(None, BOTH, None)),
    (r"vision/layers/.*/kernel", P(None, BOTH, None)),
    (r"projector/.*/kernel", P(BOTH, None)),
    (r"vision/.*embedding(/kernel)?", P()),
    (r".*/(bias|scale)", P()),
)


# In generation, where the language model is one tree a layer (`models.decoder.unstack`). Anything
# else lies as RULES say. Experts that are split over `expert` have that axis in front.
GENERATION: tuple[tuple[str, P], ...] = (
    (r"llm/blocks/.*/(q|k|v|fc1|gate|up)/(kernel|lora_b)", P(None, BOTH)),
    (r"llm/blocks/.*/(q|k|v|fc1|gate|up)/bias", P(BOTH)),
    (r"llm/blocks/.*/(out|fc2|down)/(kernel|lora_a)", P(BOTH, None)),
    (r"llm/blocks/.*/(out|fc2|down)/bias", P(None)),
    (r"llm/blocks/.*/lora_[ab]", P(None, None)),
    (r"llm/blocks/\d+/moe/(router|coefficient)/.*", P()),
)


def make_mesh(cfg: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Mesh with the axes AXES over `devices` (default: all).

    Raises:
      ConfigError: more than one -1, sizes whose product is not the number of devices, or slices
        that are not equally large.
    """
    devices = list(jax.devices()) if devices is None else devices
    sizes = [cfg.data, cfg.fsdp, cfg.expert]
    known = prod(s for s in sizes if s != -1)
    if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes) or len(devices) % known:
        raise ConfigError(
            f"mesh {dict(zip(AXES, sizes, strict=True))} does not divide {len(devices)} device(s)"
        )
    sizes = [len(devices) // known if s == -1 else s for s in sizes]
    if prod(sizes) != len(devices):
        raise ConfigError(
            f"mesh {dict(zip(AXES, sizes, strict=True))} needs {prod(sizes)} devices; "
            "there are "
            f"{len(devices)}. Set one axis to -1 to fill it"
        )
    return Mesh(arranged(sizes, devices), AXES, axis_types=(AxisType.Auto,) * 3)


def arranged(sizes: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """The devices as an array of these sizes, neighbours along an axis near each other.

    The network between slices of TPUs, or between machines with GPUs, is slow. The first axes cross
    it, the last ones stay inside of it as far as their sizes allow. `jax.make_mesh` does not take
    several slices, nor axes for which those of a TPU's torus have to be split.

    Raises:
      ConfigError: slices, or machines, that are not equally large.
    """
    slices = Counter(getattr(device, "slice_index", 0) for device in devices)
    if len(set(slices.values())) > 1:
        raise ConfigError(
            f"the slices or machines of this run have {sorted(slices.values())} devices; use "
            "equally large ones"
        )
    outer, left = [], len(slices)
    for size in sizes:
        outer.append(gcd(size, left))
        left //= outer[-1]
    inner = [size // times for size, times in zip(sizes, outer, strict=True)]
    if len(slices) == 1:
        return mesh_utils.create_device_mesh(inner, devices, allow_split_physical_axes=True)
    return mesh_utils.create_hybrid_device_mesh(
        inner, outer, devices, allow_split_physical_axes=True
    )


def spec(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> P:
    """Spec of one parameter; mesh axes that do not divide a dimension are left out there.

    Raises:
      ConfigError: no rule matches `path`.
    """
    for pattern, rule in RULES:
        if re.fullmatch(pattern, path):
            return _fitted(rule, shape, mesh)
    raise ConfigError(f"no sharding rule matches the parameter {path!r}; add one to sharding.RULES")


def generation_spec(
    path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh, ways: int = 1
) -> P:
    """Spec of one parameter in generation, see `spec`; `ways` as in `models.decoder.unstack`."""
    if "/router/" in path:
        return P()
    for pattern, rule in GENERATION:
        if re.fullmatch(pattern, path):
            if ways > 1 and "/experts/" in path:
                rule = P("expert", *("fsdp" if entry == BOTH else entry for entry in rule))
            return _fitted(rule, shape, mesh)
    return spec(path, shape, mesh)


def generation_ways(mesh: Mesh | AbstractMesh, cfg: ModelConfig) -> int:
    """Over how many devices experts are split in generation: all along `expert`, or one where their
    number does not divide."""
    n_experts = cfg.moe.experts if cfg.moe else 1
    return 1 if n_experts % mesh.shape["expert"] else mesh.shape["expert"]


def constrain(x: jax.Array, *axes: Any) -> jax.Array:
    """In a compiled function: x with its first axes split over these mesh axes where they divide,
    and on all devices otherwise; x itself where there is no mesh, and in `shard_map`, where a
    device sees its own part alone."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1 or AxisType.Manual in mesh.axis_types:
        return x
    return jax.lax.with_sharding_constraint(x, _fitted(P(*axes), x.shape, mesh))


def outline(a: Any, *axes: Any, mesh: Mesh | AbstractMesh) -> jax.ShapeDtypeStruct:
    """The shape of an array that lies where `constrain` puts it."""
    place = NamedSharding(mesh, _fitted(P(*axes), a.shape, mesh))
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place)


@jax.custom_jvp
def rows_of_gradient(x: jax.Array) -> jax.Array:
    """x [B, ...] as it is; its gradient is split over all axes by rows, as batches are.

    For the input of a product with a kernel that is split along its inputs. Left to itself XLA
    splits the gradient like that too, which takes the rows of all devices together first.
    """
    return x


@rows_of_gradient.defjvp
def _rows_of_gradient_jvp(
    given: tuple[jax.Array], change: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    return given[0], constrain(change[0], AXES)


def _fitted(rule: P, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> P:
    return P(*(_fit(entry, size, mesh) for entry, size in zip(rule, shape, strict=False)))


def _fit(entry: Any, size: int, mesh: Mesh | AbstractMesh) -> Any:
    """The axes of an entry of a spec that divide `size`."""
    axes = fitting((entry,) if isinstance(entry, str) else tuple(entry or ()), size, mesh)
    return axes if len(axes) > 1 else (axes[0] if axes else None)


def fitting(axes: tuple[str, ...], size: int, mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """Those of the axes, in their order, over which `size` can be split most ways; the first of
    several such choices."""
    chosen = [c for n in range(len(axes), -1, -1) for c in itertools.combinations(axes, n)]
    ways = [prod(mesh.shape[axis] for axis in choice) for choice in chosen]
    most = max(n for n in ways if size % n == 0)
    return chosen[ways.index(most)]


def place(
    flat: dict[str, Any], mesh: Mesh, dtypes: Mapping[str, Any] | None = None
) -> dict[str, jax.Array]:
    """Puts parameters (path -> array as in `put`) on the devices as the table says, in `dtypes`
    (path -> dtype; default: their own), one after the other."""
    return {
        path: put(
            value,
            NamedSharding(mesh, spec(path, value.shape, mesh)),
            None if dtypes is None else dtypes[path],
        )
        for path, value in flat.items()
    }


def put(value: Any, place: NamedSharding, dtype: Any = None) -> jax.Array:
    """A host array that all processes have, or a leaf on disk (`stored.Stored`), on the devices in
    `dtype`. Each process reads and converts what its own devices hold, once."""
    kind = value.dtype if dtype is None else dtype
    parts: dict[str, np.ndarray] = {}

    def part(index: Any) -> np.ndarray:
        name = str(index)  # devices may hold the same part
        if name not in parts:
            parts[name] = np.asarray(value[index], kind)
        return parts[name]

    return jax.make_array_from_callback(value.shape, place, part)


def everywhere(tree: Any, mesh: Mesh) -> Any:
    """`tree` with what is not on the mesh yet (step counters) copied to all of its devices."""

    def one(leaf: jax.Array) -> jax.Array:
        there = isinstance(leaf.sharding, NamedSharding) and leaf.sharding.mesh == mesh
        return leaf if there else put(np.asarray(leaf), NamedSharding(mesh, P()))

    return jax.tree.map(one, tree)


def place_batch(batch: dict[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts a batch on the devices, its first axis split over all mesh axes; each process gives its
    own rows."""
    placement = NamedSharding(mesh, P(AXES))
    return {k: jax.make_array_from_process_local_data(placement, v) for k, v in batch.items()}


def on_host(tree: Any) -> Any:
    """What lies on devices as host arrays; where some of it lies on those of other processes, all
    processes must call this, and all get the whole."""

    def one(leaf: jax.Array) -> np.ndarray:
        if leaf.is_fully_addressable or leaf.is_fully_replicated:
            return np.asarray(leaf)
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(one, tree)


def own_rows(values: jax.Array) -> np.ndarray:
    """The rows of an array split like a batch that belong to this process, in their order."""
    parts = {shard.index[0].start or 0: shard.data for shard in values.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])
