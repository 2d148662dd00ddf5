"""sum_k w_k expert_k(x): a slow, obvious form and the ones that run, with the same parameters.

The experts' parameters are stacked ([E, ...] leaves) or a tuple of E trees. The second form is what
`decoder.unstack` makes for generation: an expert can then be read without copying it first.
"""

from __future__ import annotations

import logging
from functools import cache, partial

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from medmoe_jax.models import layers, products
from medmoe_jax.models.grouped import FEW, Experts, expert, grouped
from medmoe_jax.models.layers import Array, Params
from medmoe_jax.models.tiles import tiled

AXIS = "expert"  # the mesh axis that experts are split over, named as in `config.MeshConfig`


def reference(p: Experts, x: Array, choice: Array, weight: Array, n_experts: int) -> Array:
    """Runs every expert on every token: slow, obvious, right.

    Args:
      p: expert parameters.
      x: [B, T, D].
      choice: i32[B, T, K], the chosen experts; E stands for none of them.
      weight: f32[B, T, K], their weights.
      n_experts: E.

    Returns:
      [B, T, D] in the dtype of x.
    """
    y = jnp.zeros_like(x)
    for e in range(n_experts):
        share = jnp.where(choice == e, weight, 0.0).sum(-1, keepdims=True)
        y += share.astype(x.dtype) * layers.mlp(expert(p, e), x)
    return y


def _on_one_device(p: Experts, x: Array, choice: Array, weight: Array, n_experts: int) -> Array:
    """The form for the platform that the program is compiled for, and for the number of tokens.

    For a few tokens, as in decoding, `grouped` reads the chosen experts' weights only, on every
    platform. For many it is the fastest form on a CPU; elsewhere its branches would all take memory
    at once.
    """
    few = partial(grouped, n_experts=n_experts)
    if choice.size <= FEW:
        return few(p, x, choice, weight)
    return jax.lax.platform_dependent(
        p,
        x,
        choice,
        weight,
        cpu=few,
        tpu=partial(_tiled, n_experts=n_experts, product=products.tpu),
        cuda=partial(_tiled, n_experts=n_experts, product=products.gpu),
        default=partial(_tiled, n_experts=n_experts, product=products.plain),
    )


def _tiled(
    p: Experts, x: Array, choice: Array, weight: Array, n_experts: int, product: products.Product
) -> Array:
    """`tiled` for parameters of either form."""
    if isinstance(p, tuple):
        # A copy of one layer's experts, for 1 / E of the arithmetic of `reference`.
        stacked: Params = jax.tree.map(lambda *each: jnp.stack(each), *p)
        return tiled(stacked, x, choice, weight, n_experts, product)
    return tiled(p, x, choice, weight, n_experts, product)


def spread(p: Params, x: Array, choice: Array, weight: Array, n_experts: int) -> Array:
    """Experts split over the axis AXIS of the mesh, tokens over all its axes.

    The devices along AXIS show each other their tokens. Each runs its own experts, on those tokens
    that chose them, and the sums are sent back. No token is dropped.

    Args:
      p: stacked parameters, E a multiple of the axis' size.
      x, choice, weight: as in `reference`, B a multiple of the number of devices.
      n_experts: E.

    Returns:
      [B, T, D] in the dtype of x.
    """
    mesh = jax.sharding.get_abstract_mesh()
    devices = mesh.shape[AXIS]
    n = n_experts // devices  # experts of a device

    def run(p: Params, x: Array, choice: Array, weight: Array) -> Array:
        if devices == 1:
            return _on_one_device(p, x, choice, weight, n)
        x, choice, weight = (jax.lax.all_gather(a, AXIS, tiled=True) for a in (x, choice, weight))
        mine = choice - n * jax.lax.axis_index(AXIS)
        mine = jnp.where((mine >= 0) & (mine < n), mine, n)
        y = _on_one_device(p, x, mine, weight, n)
        return jax.lax.psum_scatter(y, AXIS, tiled=True)

    tokens = P(mesh.axis_names)
    specs = P(AXIS), tokens, tokens, tokens
    # The kernels of `products` do not say over which axes their results vary. And without these
    # checks the gradients of weights that several devices hold are summed behind `run`, not in the
    # branches of `grouped`, which these devices do not all take: a deadlock.
    split = jax.shard_map(run, in_specs=specs, out_specs=tokens, check_vma=False)
    return split(p, x, choice, weight)


def _obstacle(p: Experts, rows: int, n_experts: int, mesh: AbstractMesh) -> str:
    """Why `spread` cannot be used; "" if it can."""
    if isinstance(p, tuple):
        return "generation keeps each expert by itself"
    if AXIS not in mesh.shape:
        return f"the mesh has no axis {AXIS!r}"
    if n_experts % mesh.shape[AXIS]:
        return f"{mesh.shape[AXIS]} devices of the axis {AXIS!r} do not divide {n_experts} experts"
    if rows % mesh.size:
        return f"{mesh.size} devices do not divide {rows} rows"
    return ""


@cache
def _warn(obstacle: str) -> None:
    """Says why it is slow: once, not for every layer and compilation."""
    logging.getLogger(__name__).warning("Every expert is run on every token: %s", obstacle)


def mixture(p: Experts, x: Array, choice: Array, weight: Array, n_experts: int) -> Array:
    """The form for the devices at hand. Arguments and result as in `reference`.

    Over several devices it is `spread` where the numbers divide, else `reference`, and the log
    tells.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1:
        return _on_one_device(p, x, choice, weight, n_experts)
    if obstacle := _obstacle(p, len(x), n_experts, mesh):
        _warn(obstacle)
        return reference(p, x, choice, weight, n_experts)
    assert isinstance(p, dict)
    return spread(p, x, choice, weight, n_experts)
