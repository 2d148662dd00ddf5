"""Low-rank adapters (LoRA) beside the matrices of attention, plain FFNs, experts and meta expert.

    y = x W + scale * dropout(x) A B

An adapter is two more leaves beside a `kernel` [*stack, d_in, d_out], stacked as it is: `lora_a`
[*stack, d_in, r] and `lora_b` [*stack, r, d_out]. So layers and experts are sliced, split over
devices and multiplied as the kernels are (`models.layers.low_rank`). They alone train; B starts at
zero, so that a run starts from the function of the frozen weights. `checkpoint.Delta` says how they
are kept, `python -m medmoe_jax.lora` puts them into the weights.

Source: Hu et al. 2021; initial values as in the library `peft`.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from medmoe_jax import stored
from medmoe_jax.config import ConfigError, LoraConfig, RunConfig
from medmoe_jax.lora.merged import Merged
from medmoe_jax.models.quantized import is_quantized

A, B, DROPOUT = "lora_a", "lora_b", "dropout"
# What can have adapters -> paths of its kernels.
TARGETS = {
    "experts": r"llm/moe/experts/\w+/kernel",
    "meta": r"llm/moe/meta/\w+/kernel",
    "mlp": r"llm/mlp/\w+/kernel",
    "attention": r"llm/layers/attn/\w+/kernel",
}
SEEDS = 2**23  # of dropout: numbers that a float holds exactly, with room for those of the devices

Flat = dict[str, Any]  # path -> array


def is_adapter(path: str) -> bool:
    """Whether a parameter is part of an adapter."""
    return path.endswith((f"/{A}", f"/{B}"))


def is_target(name: str, path: str) -> bool:
    """Whether a parameter is a kernel of the kind `name` of TARGETS."""
    return re.fullmatch(TARGETS[name], path) is not None


def is_matrix(path: str) -> bool:
    """Whether a parameter is a kernel of any kind of TARGETS: the decoder's, routers excepted."""
    return any(is_target(name, path) for name in TARGETS)


def check(cfg: LoraConfig) -> None:
    """Raises ConfigError on a setting that cannot work."""
    unknown = [name for name in cfg.targets if name not in TARGETS]
    if unknown:
        raise ConfigError(f"lora.targets {unknown} cannot have adapters; use {', '.join(TARGETS)}")
    if cfg.rank < 0:
        raise ConfigError(f"lora.rank is {cfg.rank}; give 1 or more, or 0 for no adapters")
    if cfg.rank == 0 and cfg.targets:
        raise ConfigError(
            f"lora.targets is {cfg.targets}, but lora.rank is 0, which means no adapters; set the "
            "rank"
        )
    if cfg.alpha < 0 or not 0 <= cfg.dropout < 1:
        raise ConfigError(
            f"lora.alpha is {cfg.alpha} and lora.dropout {cfg.dropout}; alpha must not be "
            "negative, dropout lie in [0, 1)"
        )


def adapted(cfg: RunConfig, paths: Iterable[str]) -> list[str]:
    """Paths of the kernels that get an adapter: those that config.train covers, of the kinds that
    config.lora.targets names.

    Raises:
      ConfigError: the settings do not go together, or there is no such kernel.
    """
    check(cfg.lora)
    if not cfg.lora.rank:
        return []
    if cfg.objective == "router":
        raise ConfigError(
            "the router phase trains the router, which has no adapters; set lora.rank=0"
        )
    found: list[str] = []
    kernels = [path for path in paths if path.endswith("/kernel")]
    for target in cfg.lora.targets or TARGETS:
        mine = [path for path in kernels if is_target(target, path)]
        covered = [path for path in mine if any(re.fullmatch(p, path) for p in cfg.train)]
        if cfg.lora.targets and len(covered) < len(mine):
            missing = sorted(set(mine) - set(covered))
            raise ConfigError(
                f"lora.targets names {target}, but config.train {cfg.train} leaves out "
                f"{', '.join(missing)}; make it cover them, as in --config.train=\"('llm/.*',)\""
            )
        if cfg.lora.targets and not mine:
            raise ConfigError(
                f"lora.targets names {target}, which this model has not: experts and meta are of "
                "stage 3, a model in which every layer has experts has no mlp"
            )
        found += covered
    if not found:
        raise ConfigError(
            f"lora.rank is {cfg.lora.rank}, but none of {', '.join(TARGETS)} is in what "
            f"{cfg.phase} trains (config.train {cfg.train}); adapters are for stages 2 and 3"
        )
    return found


def shapes(cfg: RunConfig, flat: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """The adapters of a run as shapes (f32), by path; `flat`: all other parameters, anything with
    a `shape`. Raises ConfigError as `adapted` does."""
    found = {}
    for path in adapted(cfg, flat):
        *stack, d_in, d_out = flat[path].shape
        place = path.removesuffix("kernel")
        sizes = {A: (d_in, cfg.lora.rank), B: (cfg.lora.rank, d_out)}
        for name, size in sizes.items():
            found[place + name] = jax.ShapeDtypeStruct((*stack, *size), jnp.float32)
    return found


def fresh(cfg: RunConfig, flat: Mapping[str, Any]) -> Flat:
    """Adapters that do nothing yet, f32 on the host: A uniform in +-1/sqrt(d_in), B zero.

    Raises ConfigError as `adapted` does.
    """
    rng = np.random.default_rng(cfg.seed)

    def one(path: str, shape: tuple[int, ...]) -> np.ndarray:
        if path.endswith(B):
            return np.zeros(shape, np.float32)
        return (2 * rng.random(shape, np.float32) - 1) / np.float32(shape[-2] ** 0.5)

    return {path: one(path, leaf.shape) for path, leaf in shapes(cfg, flat).items()}


def active(flat: Flat, cfg: LoraConfig, key: jax.Array | None = None) -> Flat:
    """All parameters as the model takes them: B multiplied by the scale, and, with a key, what
    `layers.low_rank` needs to drop some of its input.

    The seeds are kept as floats, so that everything beside a kernel can be differentiated.
    """
    new: Flat = {}
    for i, path in enumerate(sorted(path for path in flat if path.endswith(f"/{B}"))):
        new[path] = flat[path] * cfg.scale
        if key is not None and cfg.dropout:
            stack = flat[path].shape[:-2]
            seed = jax.random.randint(jax.random.fold_in(key, i), stack, 0, SEEDS)
            pair = jnp.full(stack, cfg.dropout, jnp.float32), seed.astype(jnp.float32)
            new[path.removesuffix(B) + DROPOUT] = jnp.stack(pair, -1)
    return flat | new


def merge(tree: Any, scale: float) -> Any:
    """W + scale A B in place of every kernel that has an adapter, in its dtype.

    A quantized kernel keeps its adapter beside it, B multiplied by the scale: the sum would have to
    be rounded to it once more.

    Args:
      tree: parameters, stacked or from `decoder.unstack`. Kernels on disk (`stored.Stored`) are
        read and added to when they are wanted.
      scale: see `LoraConfig.scale`.
    """
    if isinstance(tree, tuple) and not hasattr(tree, "_fields"):
        return tuple(merge(part, scale) for part in tree)
    if not isinstance(tree, dict):
        return tree
    rest = {k: merge(v, scale) for k, v in tree.items() if k not in (A, B)}
    if A not in tree:
        return rest
    kernel = tree["kernel"]
    if is_quantized(kernel):
        return rest | {A: tree[A], B: tree[B] * scale}
    if isinstance(kernel, stored.Stored):
        return rest | {"kernel": Merged(kernel, np.asarray(tree[A]), np.asarray(tree[B]), scale)}
    return rest | {"kernel": _add(kernel, tree[A], tree[B], scale)}


def _add(kernel: Any, a: Any, b: Any, scale: float) -> jax.Array:
    product = jnp.matmul(a, b, precision="highest")
    return (kernel.astype(jnp.float32) + scale * product).astype(kernel.dtype)


def joined(whole: Mapping[str, Any], part: Mapping[str, Any]) -> dict[str, Any]:
    """Two nested dicts as one; what is in both is taken from `part`."""
    both = {
        k: joined(whole[k], v) if k in whole and isinstance(v, dict) else v for k, v in part.items()
    }
    return {**whole, **both}


def fingerprint(params: Mapping[str, Any]) -> str:
    """A hash of the names, dtypes, shapes and numbers of a tree of host arrays, or of leaves on
    disk, which are read piece by piece."""

    def one(item: tuple[Any, Any]) -> bytes:
        path, leaf = item
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        head = f"{name} {leaf.dtype} {leaf.shape} ".encode()
        found = hashlib.blake2b(head, digest_size=16)
        for numbers in stored.in_order(leaf):
            found.update(numbers.view(np.uint8).data)
        return found.digest()

    leaves = jax.tree_util.tree_leaves_with_path(dict(params))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = sorted(pool.map(one, leaves))
    return hashlib.blake2b(b"".join(digests), digest_size=16).hexdigest()
