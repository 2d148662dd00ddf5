"""Weights of generation on their way to the devices: one leaf at a time, in a dtype or quantized.

The host holds one leaf at most, and of a leaf over several devices each process what its own
devices hold. So a model is loaded that is larger than the memory of a host or of a device.
"""

from __future__ import annotations

import re
from functools import partial
from math import gcd
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from medmoe_jax import quantize, sharding
from medmoe_jax.config import ModelConfig
from medmoe_jax.models import quantized
from medmoe_jax.models.layers import Params

# What is split between the units of a hidden layer, and between heads: on the side of the outputs,
# and on that of the inputs.
FIRST, LAST = r"(.+)/(fc1|gate|up)/(kernel|bias|lora_b)", r"(.+)/(fc2|down)/(kernel|lora_a)"
APART, JOINED = r"llm/.+/attn/[qkv]/(kernel|bias|lora_b)", r"llm/.+/attn/out/(kernel|lora_a)"


def in_dtype(params: Params, dtype: Any) -> Params:
    """The parameters as device arrays of `dtype`; routers and quantized kernels keep theirs."""

    def one(path: Any, leaf: Any) -> Any:
        if quantized.is_quantized(leaf):
            return leaf  # its numbers and scales have dtypes of their own
        return jnp.asarray(leaf, leaf.dtype if _routes(path) else dtype)

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=quantized.is_quantized)


def placed(
    params: Params,
    cfg: ModelConfig,
    dtype: Any,
    *,
    bits: int = 0,
    group: int = quantize.GROUP,
    mesh: Mesh | None = None,
) -> Params:
    """The parameters on the devices.

    Args:
      params: of `generate.for_generation`, arrays or leaves on disk (`stored.Stored`).
      cfg: shapes.
      dtype: of what is not quantized; routers keep theirs.
      bits: 8 or 4 for weights of that size, the same numbers on any devices; 0 = as they are.
      group: see `quantize.quantize`.
      mesh: the devices; None = one.

    Raises:
      ConfigError: weights cannot have so many bits, or such groups.
    """
    shapes: Any = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)
    if bits:
        shapes = jax.eval_shape(partial(quantize.quantize, bits=bits, group=group), shapes)

    read = where = jax.tree.map(lambda _: None, shapes, is_leaf=quantized.is_quantized)
    if mesh is not None:
        read, where = places(params, cfg, mesh), places(shapes, cfg, mesh)

    def one(path: Any, leaf: Any, target: Any, start: Any, place: Any) -> Any:
        smaller = quantized.is_quantized(target)
        kind = leaf.dtype if smaller or _routes(path) else dtype
        if mesh is None:
            array = jnp.asarray(np.asarray(leaf), kind)
        else:
            array = sharding.put(leaf, start, kind)
        return quantize.kernel(array, bits, group, place) if smaller else array

    return jax.tree_util.tree_map_with_path(one, params, shapes, read, where)


def places(params: Params, cfg: ModelConfig, mesh: Mesh | AbstractMesh) -> Params:
    """Where parameters of `generate.for_generation` lie, quantized or not (arrays or their shapes):
    a NamedSharding for each leaf. Step sizes lie with the numbers that they belong to.

    Attention is split between heads of keys and values, each with the queries that read it, as the
    cache is (`generate.laid_out`): where a head is cut, XLA sends a kernel along with every token.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=quantized.is_quantized)
    # The hidden layer of an FFN is split alike in all its layers: between groups, if it has groups.
    hidden = {
        found[1]: quantized.inputs(leaf)
        for path, leaf in leaves
        if (found := re.fullmatch(LAST, _name(path))) and found[3] == "kernel"
    }
    heads, ways = cfg.llm.kv_heads, sharding.generation_ways(mesh, cfg)

    def one(path: Any, leaf: Any) -> Any:
        name = _name(path)
        shape = full = quantized.outline(leaf)
        if found := re.fullmatch(FIRST, name):
            shape = (*full[:-1], hidden.get(found[1], full[-1]))
        elif found := re.fullmatch(LAST, name):
            shape = (*full[:-2], hidden.get(found[1], full[-2]), full[-1])
        elif re.fullmatch(APART, name):
            shape = (*full[:-1], heads)
        elif re.fullmatch(JOINED, name):  # between groups of inputs as well, if it has groups
            shape = (*full[:-2], gcd(heads, full[-2]), full[-1])
        entries = tuple(sharding.generation_spec(name, shape, mesh, ways))
        spec = P(*entries, *(None,) * (len(shape) - len(entries)))
        return jax.tree.map(lambda part: NamedSharding(mesh, part), quantized.split(leaf, spec))

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=quantized.is_quantized)


def _routes(path: Any) -> bool:
    """Whether a parameter is a router's."""
    return any(key.key == "router" for key in path if hasattr(key, "key"))


def _name(path: Any) -> str:
    """`llm/blocks/0/mlp/fc1/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
