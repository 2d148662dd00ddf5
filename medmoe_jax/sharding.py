"""Mesh and placement of every parameter, optimiser leaf and batch: one ordered table.

Axes: `data` (batch), `fsdp` (batch; parameters and optimiser state are split), `expert` (batch;
experts are split). Every axis carries a share of the batch. Experts are spread over `expert` and,
inside one expert, over `fsdp`; all other large weights are spread over both. A device sees the
tokens of its neighbours along `expert` in MoE layers only, see `models.experts.spread`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from medmoe_jax.config import ConfigError, MeshConfig

AXES = ("data", "fsdp", "expert")
BOTH = ("expert", "fsdp")

# regex on the path -> spec; the first match wins, a path without a match is an error.
RULES: tuple[tuple[str, P], ...] = (
    (r"llm/moe/experts/.*/kernel", P(None, "expert", "fsdp", None)),
    (r"llm/moe/experts/.*/bias", P(None, "expert", None)),
    (r"(llm/moe/)?router/.*", P()),
    (r"llm/embed/embedding", P(BOTH, None)),
    (r"llm/lm_head/kernel", P(None, BOTH)),
    (r"llm/(layers|mlp|moe/meta|moe/coefficient)/.*kernel", P(None, BOTH, None)),
    (r"vision/layers/.*/kernel", P(None, BOTH, None)),
    (r"projector/.*/kernel", P(BOTH, None)),
    (r"vision/.*embedding(/kernel)?", P()),
    (r".*/(bias|scale)", P()),
)


def make_mesh(cfg: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Mesh with the axes AXES over `devices` (default: all).

    Raises:
      ConfigError: more than one -1, or sizes whose product is not the number of devices.
    """
    devices = list(jax.devices()) if devices is None else devices
    sizes = [cfg.data, cfg.fsdp, cfg.expert]
    known = int(np.prod([s for s in sizes if s != -1]))
    if sizes.count(-1) > 1 or known < 1 or len(devices) % known:
        raise ConfigError(
            f"mesh {dict(zip(AXES, sizes, strict=True))} does not divide {len(devices)} device(s)"
        )
    sizes = [len(devices) // known if s == -1 else s for s in sizes]
    if int(np.prod(sizes)) != len(devices):
        raise ConfigError(
            f"mesh {dict(zip(AXES, sizes, strict=True))} needs {int(np.prod(sizes))} devices; "
            "there are "
            f"{len(devices)}. Set one axis to -1 to fill it"
        )
    return jax.make_mesh(tuple(sizes), AXES, (AxisType.Auto,) * 3, devices=devices)


def spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """Spec of one parameter; mesh axes that do not divide a dimension are left out there.

    Raises:
      ConfigError: no rule matches `path`.
    """
    for pattern, rule in RULES:
        if re.fullmatch(pattern, path):
            return P(*(_fit(entry, size, mesh) for entry, size in zip(rule, shape, strict=False)))
    raise ConfigError(f"no sharding rule matches the parameter {path!r}; add one to sharding.RULES")


def _fit(entry: Any, size: int, mesh: Mesh) -> Any:
    """The axes of `entry`, dropped from the right until their product divides `size`."""
    axes = (entry,) if isinstance(entry, str) else tuple(entry or ())
    while axes and size % int(np.prod([mesh.shape[a] for a in axes])):
        axes = axes[:-1]
    return axes if len(axes) > 1 else (axes[0] if axes else None)


def place(flat: dict[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts parameters (path -> host array, the same in every process) on the devices as the table
    says."""

    return {path: _put(value, mesh, spec(path, value.shape, mesh)) for path, value in flat.items()}


def _put(value: Any, mesh: Mesh, where: P) -> jax.Array:
    """A host array that all processes have on the devices; each process fills its own."""
    placement = NamedSharding(mesh, where)
    return jax.make_array_from_callback(value.shape, placement, lambda part: value[part])


def everywhere(tree: Any, mesh: Mesh) -> Any:
    """`tree` with what is not on the mesh yet (step counters) copied to all of its devices."""

    def one(leaf: jax.Array) -> jax.Array:
        there = isinstance(leaf.sharding, NamedSharding) and leaf.sharding.mesh == mesh
        return leaf if there else _put(np.asarray(leaf), mesh, P())

    return jax.tree.map(one, tree)


def place_batch(batch: dict[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts a batch on the devices, its first axis split over all mesh axes; each process gives its
    own rows."""
    placement = NamedSharding(mesh, P(AXES))
    return {k: jax.make_array_from_process_local_data(placement, v) for k, v in batch.items()}


def own_rows(values: jax.Array) -> np.ndarray:
    """The rows of an array split like a batch that belong to this process, in their order."""
    parts = {shard.index[0].start or 0: shard.data for shard in values.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])
