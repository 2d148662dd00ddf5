"""sum_k w_k expert_k(x): a slow, obvious form and the ones that run, with the same parameters.

The experts' parameters are stacked ([E, ...] leaves) or a tuple of trees (`separate`). The second
form is what `decoder.unstack` makes for generation: an expert can then be read without copying it
first.
"""

from __future__ import annotations

import logging
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from medmoe_jax.models import buckets, layers, products, quantized
from medmoe_jax.models.grouped import FEW, Experts, expert, grouped
from medmoe_jax.models.layers import Array, Params
from medmoe_jax.models.tiles import tiled
from medmoe_jax.sharding import BOTH, fitting

AXIS = "expert"  # the mesh axis that experts are split over, named as in `config.MeshConfig`
ROWS = "data"  # the one that conversations are split over in generation
LAST = ("fc2", "down")  # linear layers that FFNs end with


def separate(p: Params, n_experts: int, ways: int) -> tuple[Params, ...]:
    """Stacked experts as a tuple of E / ways trees, the i-th of which holds the i-th expert of each
    of `ways` devices: [ways, ...], or a plain tree where `ways` is 1."""
    n = n_experts // ways
    if ways == 1:
        return tuple(expert(p, e) for e in range(n))
    return tuple(jax.tree.map(lambda a, i=i: a[i::n], p) for i in range(n))


def reference(p: Experts, x: Array, choice: Array, weight: Array, n_experts: int) -> Array:
    """Runs every expert on every token: obvious, right, and slow where some are not chosen.

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
    platform. For many it reads separate experts where they lie on a CPU; elsewhere its branches
    would all take memory at once.
    """
    few = partial(grouped, n_experts=n_experts)
    if choice.size <= FEW:
        return few(p, x, choice, weight)
    form = partial(_tiled, n_experts=n_experts)
    return jax.lax.platform_dependent(
        p,
        x,
        choice,
        weight,
        cpu=few if isinstance(p, tuple) else partial(form, product=buckets.cpu, tile=1),
        tpu=partial(form, product=products.tpu),
        cuda=partial(form, product=products.gpu),
        default=partial(form, product=products.plain),
    )


def _tiled(
    p: Experts,
    x: Array,
    choice: Array,
    weight: Array,
    n_experts: int,
    product: products.Product,
    tile: int = 0,
) -> Array:
    """`tiled` for parameters of either form."""
    if isinstance(p, tuple):
        p = _kernels_apart(p)
    return tiled(p, x, choice, weight, n_experts, product, tile)


def _kernels_apart(each: tuple[Params, ...]) -> Params:
    """Separate experts as one tree, with a list of E kernels, which are not copied, where the
    stacked form has an array; the rest is small, or quantized, and is stacked."""

    def together(layer: str, leaf: str) -> Any:
        found = [p[layer][leaf] for p in each]
        if leaf == "kernel" and not quantized.is_quantized(found[0]):
            return found
        return jax.tree.map(lambda *a: jnp.stack(a), *found)

    return {layer: {leaf: together(layer, leaf) for leaf in each[0][layer]} for layer in each[0]}


def spread(p: Params, x: Array, choice: Array, weight: Array, n_experts: int) -> Array:
    """Experts split over the axis AXIS of the mesh, tokens over all its axes.

    The devices along AXIS show each other their tokens. Each runs its own experts, on those tokens
    that chose them, and the sums are sent back. No token is dropped.

    Args:
      p: stacked parameters, E a multiple of the axis' size.
      x: as in `reference`, like `choice` and `weight`; B a multiple of the number of devices.
      choice: experts of each token.
      weight: of each choice.
      n_experts: E.

    Returns:
      [B, T, D] in the dtype of x.
    """
    mesh = jax.sharding.get_abstract_mesh()
    devices = mesh.shape[AXIS]
    n = n_experts // devices  # experts of a device

    def run(p: Params, x: Array, choice: Array, weight: Array) -> Array:
        p = _dropout_of(p, jax.lax.axis_index(mesh.axis_names))
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
    # Before the devices exchange them, so that less travels; the gradients come back like this too.
    p = {k: v | {"kernel": layers.cast(v["kernel"], x.dtype)} for k, v in p.items()}
    return split(p, x, choice, weight)


def _dropout_of(p: Params, device: Array) -> Params:
    """Experts whose adapters, where they drop something, do so in a way of the device's own."""

    def one(path: Any, a: Array) -> Array:
        drops = getattr(path[-1], "key", "") == "dropout"
        return a.at[..., 1].add(device.astype(a.dtype)) if drops else a

    return jax.tree_util.tree_map_with_path(one, p)


def stationary(
    p: tuple[Params, ...], x: Array, choice: Array, weight: Array, n_experts: int
) -> Array:
    """The form of generation on a mesh: weights stay where they are, and few numbers travel.

    Rows are split over the axis ROWS; the other devices all see the same tokens. Each runs its own
    experts, and of each its share of the hidden layer, on the tokens that chose them; the sum of
    what they give is the result. No token is dropped.

    Args:
      p: experts of `separate`, with the size of AXIS as `ways`, or 1.
      x: as in `reference`, like `choice` and `weight`; B need not be a multiple of anything.
      choice: experts of each token.
      weight: of each choice.
      n_experts: E.

    Returns:
      [B, T, D] in the dtype of x.
    """
    mesh, n = jax.sharding.get_abstract_mesh(), len(p)
    rows = (ROWS,) if ROWS in mesh.shape and len(x) % mesh.shape[ROWS] == 0 else ()
    owners = (AXIS,) if n < n_experts else ()
    ffn = next(quantized.inputs(v["kernel"]) for k, v in p[0].items() if k in LAST)
    # As `sharding.GENERATION` has them.
    hidden = fitting(tuple(axis for axis in BOTH if axis not in owners), ffn, mesh)

    def run(p: tuple[Params, ...], x: Array, choice: Array, weight: Array) -> Array:
        if owners:
            p = tuple(expert(tree, 0) for tree in p)
            mine = choice - n * jax.lax.axis_index(AXIS)
            choice = jnp.where((mine >= 0) & (mine < n), mine, n)
        if hidden:
            p = tuple(_bias_once(tree, jax.lax.axis_index(hidden) == 0) for tree in p)
        y = _on_one_device(p, x, choice, weight, n)
        return jax.lax.psum(y, (*owners, *hidden)) if owners or hidden else y

    def place(path: Any, leaf: Any) -> Any:
        last, name = path[-2].key in LAST, path[-1].key
        into = hidden if last and name in ("kernel", "lora_a") else None
        out = hidden if not last and name in ("kernel", "lora_b", "bias") else None
        axes = (out,) if name == "bias" else (into, out)
        return quantized.split(leaf, P(*owners, *axes))

    tokens = P(rows)
    whole = partial(jax.tree_util.tree_map_with_path, is_leaf=quantized.is_quantized)
    specs = whole(place, p), tokens, tokens, tokens
    # Nothing is derived here, and kernels do not say along which axes their results vary.
    form = jax.shard_map(run, in_specs=specs, out_specs=tokens, check_vma=False)
    return form(p, x, choice, weight)


def _bias_once(p: Params, here: Array) -> Params:
    """An FFN that adds its last bias on one of the devices that share its hidden layer."""

    def one(name: str, layer: Params) -> Params:
        if name not in LAST or "bias" not in layer:
            return layer
        return layer | {"bias": jnp.where(here, layer["bias"], jnp.zeros_like(layer["bias"]))}

    return {name: one(name, layer) for name, layer in p.items()}


def _obstacle(rows: int, n_experts: int, mesh: AbstractMesh) -> str:
    """Why `spread` cannot be used; "" if it can."""
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

    Over several devices it is `stationary` in generation and `spread` in training where the numbers
    divide, else `reference`, and the log tells.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1:
        # Where every token goes to every expert there is nothing to sort.
        form = reference if choice.shape[-1] == n_experts else _on_one_device
        return form(p, x, choice, weight, n_experts)
    if isinstance(p, tuple):
        return stationary(p, x, choice, weight, n_experts)
    if obstacle := _obstacle(len(x), n_experts, mesh):
        _warn(obstacle)
        return reference(p, x, choice, weight, n_experts)
    return spread(p, x, choice, weight, n_experts)
