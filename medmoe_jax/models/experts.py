"""sum_k w_k expert_k(x): a slow, obvious form and the ones that run, with the same parameters.

The experts' parameters are stacked ([E, ...] leaves) or a tuple of E trees. The second form is what
`decoder.unstack` makes for generation: an expert can then be read without copying it first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from medmoe_jax.models import layers
from medmoe_jax.models.layers import Array, Params

Experts = Params | tuple[Params, ...]
FEW = 64  # (token, expert) pairs up to which only the bytes of the weights matter
BUCKET = 32  # pairs by which the static sizes of an expert's group differ at least
BUCKETS = 8  # most static sizes of a group, beside the empty one
AXIS = "expert"  # the mesh axis that experts are split over, named as in `config.MeshConfig`


def expert(p: Experts, e: int) -> Params:
    """The parameters of expert `e`."""
    return p[e] if isinstance(p, tuple) else jax.tree.map(lambda a: a[e], p)


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


def group_sizes(pairs: int) -> list[int]:
    """Static sizes of an expert's group among `pairs` (token, expert) pairs: 0, ..., pairs."""
    n = 1 if pairs <= FEW else min(BUCKETS, -(-pairs // BUCKET))
    return [-(-pairs * i // n) for i in range(n + 1)]


def grouped(p: Experts, x: Array, choice: Array, weight: Array, n_experts: int) -> Array:
    """Each expert on its own tokens, padded to the next of a few static sizes (`group_sizes`).

    No token is dropped: the largest size holds all of them. An expert that nobody chose is not
    read. Arguments and result as in `reference`.
    """
    b, t, d = x.shape
    k = choice.shape[-1]
    order = jnp.argsort(choice.reshape(-1), stable=True)
    counts = jnp.bincount(choice.reshape(-1), length=n_experts)
    rows = x.reshape(b * t, d)[order // k]
    y = _sorted_rows(tuple(expert(p, e) for e in range(n_experts)), rows, counts)
    share = weight.reshape(-1)[order].astype(x.dtype)
    return jnp.zeros((b * t, d), x.dtype).at[order // k].add(share[:, None] * y).reshape(x.shape)


Slices = Callable[[Array], Array]  # [M + largest size, ...] -> the rows of one group, padded


def _by_group(
    n: int, counts: Array, run: Callable[[int, int, Slices, Array, Any], Any], start: Any
) -> Any:
    """Folds run(expert, size, slices, place, carry) over the groups of `n` sorted rows.

    `size` is the static size of the expert's group, `place` where it begins; the carry of an empty
    group is left alone.
    """
    sizes, carry = group_sizes(n), start
    places = jnp.cumsum(counts) - counts
    for e in range(len(counts)):

        def branch(size: int, e: int = e) -> Callable[[Any], Any]:
            def slices(a: Array) -> Array:
                rows = jax.lax.dynamic_slice_in_dim(a, places[e], size)
                # Rows of the next group are in the slice as well.
                return jnp.where((jnp.arange(size) < counts[e])[:, None], rows, 0)

            return lambda value: run(e, size, slices, places[e], value)

        bucket = (counts[e] > jnp.asarray(sizes[:-1])).sum()
        branches = [lambda value: value, *map(branch, sizes[1:])]
        carry = jax.lax.switch(bucket, branches, carry)
    return carry


def _add(total: Array, place: Array, rows: Array) -> Array:
    """total with `rows` added from `place` on."""
    before = jax.lax.dynamic_slice_in_dim(total, place, len(rows))
    return jax.lax.dynamic_update_slice_in_dim(total, before + rows, place, 0)


@jax.custom_vjp
def _sorted_rows(p: tuple[Params, ...], rows: Array, counts: Array) -> Array:
    """Expert outputs of rows [M, D] that are sorted by expert; counts i32[E] rows for each.

    The derivative is written out because that of `lax.switch` keeps what every branch would need,
    filled with zeros, which costs more than the products. It computes the hidden layer again.
    """
    # A group's slice may reach past the last row: it must not be moved back by clamping.
    padded = jnp.pad(rows, ((0, len(rows)), (0, 0)))

    def run(e: int, size: int, slices: Slices, place: Array, y: Array) -> Array:
        mine = (jnp.arange(size) < counts[e])[:, None]
        return _add(y, place, jnp.where(mine, layers.mlp(p[e], slices(padded)), 0))

    return _by_group(len(rows), counts, run, jnp.zeros_like(padded))[: len(rows)]


def _forward(p: tuple[Params, ...], rows: Array, counts: Array) -> tuple[Array, Any]:
    return _sorted_rows(p, rows, counts), (p, rows, counts)


def _backward(kept: Any, dy: Array) -> tuple[Any, Array, None]:
    p, rows, counts = kept
    padded, dy = (jnp.pad(a, ((0, len(rows)), (0, 0))) for a in (rows, dy))

    def run(e: int, size: int, slices: Slices, place: Array, carry: Any) -> Any:
        dx, dp = carry
        _, pull = jax.vjp(layers.mlp, p[e], slices(padded))
        mine, drows = pull(slices(dy))
        return _add(dx, place, drows), (*dp[:e], mine, *dp[e + 1 :])

    dx, dp = _by_group(len(rows), counts, run, jax.tree.map(jnp.zeros_like, (padded, p)))
    return dp, dx[: len(rows)], None


_sorted_rows.defvjp(_forward, _backward)


def _on_one_device(p: Experts, x: Array, choice: Array, weight: Array, n_experts: int) -> Array:
    """The form for the platform and the number of tokens.

    For a few tokens, as in decoding, `grouped` reads the chosen experts' weights only, on every
    platform. For many it is the fastest form on a CPU (measured against `ragged_dot` and blocks);
    elsewhere its branches would all take memory at once.
    """
    if choice.size <= FEW:
        return grouped(p, x, choice, weight, n_experts)
    return jax.lax.platform_dependent(
        p,
        x,
        choice,
        weight,
        cpu=partial(grouped, n_experts=n_experts),
        default=partial(reference, n_experts=n_experts),
    )


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
    others = tuple(axis for axis in mesh.axis_names if axis != AXIS)

    def run(p: Params, x: Array, choice: Array, weight: Array) -> Array:
        # The gradients of weights that several devices hold are summed here. Without the cast they
        # would be in the branches of `grouped`, which these devices do not all take: a deadlock.
        p = jax.lax.pcast(p, others, to="varying")
        if devices == 1:
            return _on_one_device(p, x, choice, weight, n)
        x, choice, weight = (jax.lax.all_gather(a, AXIS, tiled=True) for a in (x, choice, weight))
        mine = choice - n * jax.lax.axis_index(AXIS)
        mine = jnp.where((mine >= 0) & (mine < n), mine, n)
        y = _on_one_device(p, x, mine, weight, n)
        return jax.lax.psum_scatter(y, AXIS, tiled=True)

    tokens = P(mesh.axis_names)
    specs = P(AXIS), tokens, tokens, tokens
    return jax.shard_map(run, in_specs=specs, out_specs=tokens)(p, x, choice, weight)


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
