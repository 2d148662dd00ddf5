"""Weights of 8 or 4 bits, for inference and frozen in training (`layout.py`), and what they take.

    params = quantize(params, 8)     # stacked, or from generate.for_generation

The matrices of the language model, of the projector and of the vision tower become `Int8` or `Int4`
(`models/quantized.py`). The router, norms, biases, the embedding table and the embeddings of the
tower stay as they are: they are small or only looked up, and the router must choose as it did.
`python -m medmoe_jax.quantize` measures what a model loses by it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from medmoe_jax.config import ConfigError, ModelConfig
from medmoe_jax.models import medmoe
from medmoe_jax.models.layers import Array, Params
from medmoe_jax.models.quantized import Int4, Int8, is_quantized, to_int4, to_int8

BITS = (8, 4)
GROUP = 128  # inputs that share a step size with 4 bits

# Part of the model -> path of its matrices, in stacked and in unstacked trees.
PARTS = {
    "llm": r"llm/(.+/)?(attn/\w+|mlp/\w+|experts(/\d+)?/\w+|meta/\w+|lm_head)/kernel",
    "projector": r"projector/\w+/kernel",
    "vision": r"vision/layers/.+/kernel",
}
ALL = tuple(PARTS)

# Component -> start of the paths that belong to it; the first match decides.
COMPONENTS = {
    "vision tower": r"vision/",
    "projector": r"projector/",
    "embedding": r"llm/embed/",
    "language-model head": r"llm/lm_head/",
    "router": r"(llm/.*)?(router|coefficient)/",
    "experts": r"llm/.*experts/",
    "meta expert": r"llm/.*meta/",
    "plain FFNs": r"llm/.*mlp/",
    "attention and norms": r"llm/",
}


def check_settings(bits: int, group: int = GROUP, parts: Sequence[str] = ALL) -> None:
    """Raises ConfigError where `quantize` cannot work so."""
    unknown = [part for part in parts if part not in PARTS]
    if bits not in BITS:
        raise ConfigError(f"bits is {bits!r}; weights can have 8 or 4 bits")
    if group < 2 or group % 2:
        raise ConfigError(f"group is {group}; it must be even and at least 2")
    if unknown or not parts:
        raise ConfigError(f"parts {unknown or parts} cannot be quantized; use {', '.join(PARTS)}")


def is_matrix(path: str, parts: Sequence[str] = ALL) -> bool:
    """Whether a parameter of these parts is one that is quantized."""
    return any(re.fullmatch(PARTS[part], path) for part in parts)


def quantize(
    params: Params, bits: int, *, group: int = GROUP, parts: Sequence[str] = ALL
) -> Params:
    """The same tree with quantized matrices.

    Matrices are rounded one at a time, so that from host arrays only the result and one matrix (of
    a stack, its small numbers and one of its matrices) need to be in the device's memory.

    Args:
      params: all parameters (`vision`, `projector`, `llm`), stacked or from
        `generate.for_generation`, any float dtype.
      bits: 8: one step size for each output. 4: one for each output and group of inputs; two
        numbers take a byte on every platform.
      group: inputs of a group, even; with 8 bits it means nothing.
      parts: of PARTS; the others stay as they are.

    Returns:
      Parameters; leaves that are not quantized are the given ones.

    Raises:
      ConfigError: a setting that does not exist, or parameters that are quantized already.
    """
    check_settings(bits, group, parts)
    if any(is_quantized(leaf) for leaf in jax.tree.leaves(params, is_leaf=is_quantized)):
        raise ConfigError("these parameters are quantized already; start from float weights")

    def one(path: Any, leaf: Any) -> Any:
        return kernel(leaf, bits, group) if is_matrix(_name(path), parts) else leaf

    return jax.tree_util.tree_map_with_path(one, params)


@partial(jax.jit, static_argnames=("bits", "group", "places"))
def kernel(w: Array, bits: int, group: int = GROUP, places: Int8 | Int4 | None = None) -> Any:
    """One kernel, quantized.

    Args:
      w: [*stack, in, out].
      bits: see `quantize`.
      group: see `quantize`.
      places: where the result shall lie, a NamedSharding for each part. With them all matrices are
        rounded at once, each device its share; else one after the other.
    """
    one = to_int8 if bits == 8 else partial(to_int4, group=group)
    if places is not None:
        for _ in w.shape[:-2]:
            one = jax.vmap(one)
        return jax.lax.with_sharding_constraint(one(w), places)
    if w.ndim == 2:
        return one(w)
    done = jax.lax.map(one, w.reshape(-1, *w.shape[-2:]))
    return jax.tree.map(lambda a: a.reshape(*w.shape[:-2], *a.shape[1:]), done)


def nbytes(params: Any) -> dict[str, int]:
    """Bytes of each component (see COMPONENTS) of a tree of arrays or of their shapes."""
    total: dict[str, int] = dict.fromkeys(COMPONENTS, 0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = _name(path)
        found = next((c for c, pattern in COMPONENTS.items() if re.match(pattern, name)), None)
        if found is None:
            raise ConfigError(f"the parameter {name!r} belongs to no part of the model")
        total[found] += prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize
    return {name: size for name, size in total.items() if size}


def sizes(
    cfg: ModelConfig,
    bits: int,
    *,
    dtype: Any = jnp.bfloat16,
    group: int = GROUP,
    parts: Sequence[str] = ALL,
) -> dict[str, int]:
    """Bytes of each component of a model, without allocating anything.

    Args:
      cfg: shapes.
      bits: 8 or 4; 0 = not quantized.
      dtype: of what is not quantized, the router excepted, which is float32.
      group: see `quantize`.
      parts: see `quantize`.
    """

    def kept(path: Any, leaf: Any) -> Any:
        exact = "/router/" in _name(path)
        return jax.ShapeDtypeStruct(leaf.shape, jnp.float32 if exact else dtype)

    shapes = jax.tree_util.tree_map_with_path(kept, medmoe.shapes(cfg))
    if bits:
        shapes = jax.eval_shape(partial(quantize, bits=bits, group=group, parts=parts), shapes)
    return nbytes(shapes)


def size_table(columns: Mapping[str, Mapping[str, int]]) -> list[list[str]]:
    """Rows of megabytes by component, their sum last.

    Args:
      columns: name of a column -> bytes by component, the same components in each.

    Returns:
      The head and the rows, as text.
    """
    rows = [["MB", *columns]]
    for name in next(iter(columns.values())):
        rows.append([name, *(f"{sized[name] / 1e6:,.2f}" for sized in columns.values())])
    return [*rows, ["all", *(f"{sum(sized.values()) / 1e6:,.2f}" for sized in columns.values())]]


def _name(path: Any) -> str:
    """`llm/blocks/0/mlp/fc1/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
