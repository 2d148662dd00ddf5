"""Frozen matrices of 8 and 4 bits: what is kept, what a step computes with it, what it holds."""

from __future__ import annotations

import dataclasses
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models
from flax.traverse_util import flatten_dict, unflatten_dict

from medmoe_jax import generate, layout, lora, optim, quantize, sharding, step
from medmoe_jax.config import (
    ConfigError,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    MoeConfig,
    OptimConfig,
    RunConfig,
)
from medmoe_jax.models import buckets, grouped, medmoe, products, quantized, tiles

MODEL = small_models.config("phi", MoeConfig(2, placement="0"), layers=1)
ADAPTERS = RunConfig(
    model=MODEL,
    train=("llm/.*",),
    lora=LoraConfig(2, dropout=0.0),
    compute_dtype="float32",
    frozen_dtype="int8",
    remat="none",
    loss_chunk=0,
)
WHOLE = dataclasses.replace(
    ADAPTERS, train=("llm/moe/(experts|meta)/.*",), lora=LoraConfig(), remat="full", loss_chunk=16
)
PROJECTOR = dataclasses.replace(WHOLE, train=("projector/.*",), remat="dots")


@pytest.fixture
def quick(quick_compile: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few loops to compile, and no optimisations."""
    monkeypatch.setattr(grouped, "BUCKETS", 1)


def parameters(cfg: RunConfig) -> dict[str, np.ndarray]:
    """Random parameters with adapters that have an effect, by path."""
    flat = flatten_dict(small_models.params(cfg.model), sep="/")
    return flat | small_models.fill(lora.shapes(cfg, flat), seed=1)


def placed(cfg: RunConfig, flat: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(trainable, frozen), as training puts them on one device."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    label = layout.labels(cfg, flat)
    train, frozen = optim.split(flat, label)
    return tuple(layout.place_weights(cfg, part, label, mesh) for part in (train, frozen))


def floats(tree: Any, like: Any) -> Any:
    """The tree with the numbers that its quantized kernels stand for."""

    def one(leaf: Any, shape: Any) -> Any:
        if not quantized.is_quantized(leaf):
            return leaf
        return quantized.dequantize(leaf)[..., : shape.shape[-2], :]

    return jax.tree.map(one, tree, like, is_leaf=quantized.is_quantized)


@pytest.mark.parametrize("bits", ["int8", "int4"])
@pytest.mark.usefixtures("quick")
def test_what_is_kept(bits: str) -> None:
    """The matrices that are quantized for serving, with the same numbers; nothing that trains."""
    cfg = dataclasses.replace(ADAPTERS, frozen_dtype=bits, compute_dtype="bfloat16")
    flat = parameters(cfg)
    train, frozen = placed(cfg, flat)
    served = quantize.quantize(unflatten_dict(flat, sep="/"), layout.BITS[bits])
    want = flatten_dict(served, sep="/")
    for path, leaf in frozen.items():
        assert type(leaf) is type(want[path]) or not quantized.is_quantized(want[path]), path
        if quantized.is_quantized(leaf):
            jax.tree.map(np.testing.assert_array_equal, leaf, want[path])
        else:
            assert leaf.dtype == (jnp.float32 if "/router/" in path else jnp.bfloat16), path
    few = {path for path, leaf in frozen.items() if not quantized.is_quantized(leaf)}
    assert {path for path in few if path.endswith("kernel")} == {
        "llm/moe/router/fc1/kernel",
        "vision/patch_embedding/kernel",
    }
    assert all(lora.is_adapter(path) for path in train)
    # From shapes alone it is the same, and the optimiser has moments of adapters.
    label = layout.labels(cfg, flat)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    shapes = layout.abstract_weights(cfg, layout.shapes(cfg), label, mesh)
    outline = partial(jax.tree.map, lambda a: (a.shape, a.dtype, a.sharding))
    assert outline(shapes) == outline((train, frozen))
    tx = optim.make(OptimConfig(), 10, label)
    state = layout.first_state(tx, train, frozen, mesh)
    assert outline(layout.abstract_state(tx, *shapes, mesh)) == outline(state)
    assert len([a for a in jax.tree.leaves(state.opt) if a.ndim]) == 2 * len(train)
    assert "int8" in optim.group_table(frozen, label)


def test_unknown_dtypes() -> None:
    for name in ("int3", "uint8", "float8"):
        cfg = dataclasses.replace(ADAPTERS, frozen_dtype=name)
        with pytest.raises(ConfigError, match=rf"frozen_dtype '{name}' is unknown; use one of"):
            layout.abstract_weights(cfg, layout.shapes(cfg), {}, jax.sharding.AbstractMesh((), ()))


@pytest.mark.parametrize(
    ("cfg", "bits"),
    [
        pytest.param(ADAPTERS, "int8", id="adapters8"),
        pytest.param(ADAPTERS, "int4", id="adapters4", marks=pytest.mark.slow),
        pytest.param(WHOLE, "int8", id="whole", marks=pytest.mark.slow),
        pytest.param(PROJECTOR, "int8", id="projector", marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("quick")
def test_a_step_is_that_with_the_numbers_as_floats(cfg: RunConfig, bits: str) -> None:
    """Loss and gradients, in float32."""
    cfg = dataclasses.replace(cfg, frozen_dtype=bits)
    flat = parameters(cfg)
    train, frozen = jax.device_get(placed(cfg, flat))
    batch = layout.on_device(small_models.batch(MODEL, length=40))  # enough tokens for tiles

    @jax.jit
    def value(train: Any, frozen: Any) -> Any:
        def total(train: Any) -> Any:
            return step.forward_loss(cfg, MODEL, train | frozen, batch).rows.sum()

        return jax.value_and_grad(total)(train)

    loss, have = value(train, frozen)
    whole = jax.device_get(floats(frozen, {path: flat[path] for path in frozen}))
    want_loss, want = value(train, whole)
    assert float(loss) == pytest.approx(float(want_loss), rel=1e-5)
    for path, slope in want.items():
        scale = np.abs(slope).max()
        assert scale > 0, path
        np.testing.assert_allclose(have[path], slope, atol=1e-5 * scale, err_msg=path)
    # The rounding shows: it is not the float weights that were used.
    exact, _ = value(train, {path: flat[path] for path in frozen})
    assert abs(float(exact) - float(loss)) > 1e-4


TPU, GPU = (partial(product, interpret=True) for product in (products.tpu, products.gpu))


@pytest.mark.parametrize(
    ("product", "bits"),
    [
        pytest.param(products.plain, 4, id="plain4"),
        pytest.param(buckets.cpu, 8, id="cpu8"),
        pytest.param(TPU, 8, id="tpu8"),
        pytest.param(buckets.cpu, 4, id="cpu4", marks=pytest.mark.slow),
        pytest.param(TPU, 4, id="tpu4", marks=pytest.mark.slow),
        pytest.param(GPU, 8, id="gpu8", marks=pytest.mark.slow),
        pytest.param(GPU, 4, id="gpu4", marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("quick")
def test_tiles_of_quantized_experts(product: Any, bits: int) -> None:
    """Values and gradients of every form's product, by the tokens and by adapters beside."""
    n, width, tokens = 2, 128, 129
    w = small_models.fill(small_shapes(n, width))
    small = jax.device_get(quantize.kernel(jnp.asarray(w["kernel"]), bits, group=48))
    rng = np.random.default_rng(0)
    rows = jnp.asarray(rng.standard_normal((1, tokens, width)), jnp.float32)
    choice = jnp.asarray(rng.integers(0, n, (1, tokens, 1)), jnp.int32)
    weight = jnp.ones((1, tokens, 1))
    rest = {k: v for k, v in w.items() if k != "kernel"}
    tile = 1 if product is buckets.cpu else 0

    @jax.jit
    def value(kernel: Any, rest: Any, rows: Any) -> Any:
        def total(rest: Any, rows: Any) -> Any:
            p = {name: rest | {"kernel": kernel} for name in ("fc1", "fc2")}
            return (tiles.tiled(p, rows, choice, weight, n, product, tile) ** 2).sum()

        return jax.value_and_grad(total, (0, 1))(rest, rows)

    have = value(small, rest, rows)
    want = value(floats(small, w["kernel"]), rest, rows)
    for a, b in zip(jax.tree.leaves(have), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


def small_shapes(n: int, width: int) -> dict[str, Any]:
    """Square matrices with adapters and biases, stacked over experts."""
    sizes = {"kernel": (width, width), "lora_a": (width, 2), "lora_b": (2, width), "bias": (width,)}
    return {k: jax.ShapeDtypeStruct((n, *size), jnp.float32) for k, size in sizes.items()}


@pytest.mark.parametrize("remat", ["none", pytest.param("full", marks=pytest.mark.slow)])
def test_all_layers_never_exist_as_floats(remat: str) -> None:
    """In the compiled step every stack of matrices of the language model is there as integers, none
    as floats, and no array of floats is as large as the experts of all layers."""
    base = small_models.config("stablelm", MoeConfig(2, placement="dense"), layers=3)
    llm = dataclasses.replace(base.llm, width=64, ffn=192)
    model = ModelConfig(base.vision, llm, base.projector, base.moe).validate()
    cfg = dataclasses.replace(ADAPTERS, model=model, remat=remat)
    shapes = layout.shapes(cfg)
    label = layout.labels(cfg, shapes)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    tx = optim.make(cfg.optim, 10, label)
    train, frozen = layout.abstract_weights(cfg, shapes, label, mesh)
    state = layout.abstract_state(tx, train, frozen, mesh)
    batch = layout.on_device(small_models.batch(model, (1,), length=66))
    text = step.make_step(cfg, model, tx).lower(state, frozen, batch).compile().as_text()

    def sizes(kinds: str) -> set[tuple[int, ...]]:
        found = re.findall(rf"(?:{kinds})\[([\d,]+)\]", text)
        return {tuple(map(int, dims.split(","))) for dims in found}

    stacks = {
        leaf.shape
        for path, leaf in shapes.items()
        if path.startswith("llm/") and quantize.is_matrix(path) and len(leaf.shape) > 2
    }
    assert stacks <= sizes("s8") and not stacks & sizes("f32|bf16")
    assert (3, 2, 64, 192) in stacks
    assert max(map(np.prod, sizes("f32|bf16"))) < 3 * 2 * 64 * 192


@pytest.mark.usefixtures("quick")
def test_answers_have_the_adapters_beside_the_weights() -> None:
    """In an evaluation during training: the scores are those of the sum of both."""
    flat = parameters(ADAPTERS)
    train, frozen = jax.device_get(placed(ADAPTERS, flat))
    batch = {k: v for k, v in small_models.batch(MODEL).items() if k in small_models.ON_DEVICE}

    @jax.jit
    def scores(flat: Any) -> Any:
        parts = generate.for_generation(unflatten_dict(flat, sep="/"), MODEL)
        ready = lora.merge(parts, ADAPTERS.lora.scale)
        return medmoe.logits(ready, medmoe.forward(ready, MODEL, batch)[0])

    whole = jax.device_get(floats(frozen, {path: flat[path] for path in frozen}))
    have, want = scores(train | frozen), scores(train | whole)
    np.testing.assert_allclose(have, want, atol=1e-4)
    nothing = {path: np.zeros_like(leaf) for path, leaf in train.items()}
    assert np.abs(have - scores(nothing | frozen)).max() > 0.1
