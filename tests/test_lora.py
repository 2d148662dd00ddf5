"""Adapters: where they go, what they add and learn, and what is kept of them."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models
from flax.traverse_util import flatten_dict, unflatten_dict

from medmoe_jax import flops, generate, info, layout, lora, optim, step
from medmoe_jax.config import ConfigError, LoraConfig, ModelConfig, MoeConfig, RunConfig
from medmoe_jax.models import experts, grouped, layers, products, tiles

pytestmark = pytest.mark.usefixtures("quick_compile")

MODEL = small_models.config("phi", MoeConfig(experts=2), layers=2)
DENSE = small_models.config("stablelm", layers=2)


def run_config(
    model: ModelConfig = MODEL, train: tuple[str, ...] = ("llm/.*",), **settings: Any
) -> RunConfig:
    """A run with adapters, in float32."""
    return RunConfig(
        model=model,
        train=train,
        lora=LoraConfig(**{"rank": 3, "dropout": 0.0} | settings),
        compute_dtype="float32",
        frozen_dtype="float32",
        remat="none",
        loss_chunk=0,
    )


def parameters(cfg: RunConfig) -> dict[str, Any]:
    """Random parameters with adapters that have an effect, by path."""
    flat = flatten_dict(small_models.params(cfg.model), sep="/")
    return flat | small_models.fill(lora.shapes(cfg, flat), seed=1)


def kinds(paths: Any) -> set[str]:
    """Names of the targets that adapters stand beside."""
    kernels = {re.sub(r"lora_[ab]$", "kernel", path) for path in paths}
    named = {
        name for name, rule in lora.TARGETS.items() if any(re.fullmatch(rule, k) for k in kernels)
    }
    assert all(any(re.fullmatch(rule, k) for rule in lora.TARGETS.values()) for k in kernels)
    return named


def adapters(cfg: RunConfig) -> dict[str, Any]:
    return {path: leaf for path, leaf in layout.shapes(cfg).items() if lora.is_adapter(path)}


def test_adapters_stand_where_the_phase_trains() -> None:
    """Stage 3: experts and meta expert; stage 2: attention and FFNs; names narrow it down."""
    stage3 = adapters(run_config(train=("llm/moe/(experts|meta)/.*",)))
    assert kinds(stage3) == {"experts", "meta"}
    stage2 = adapters(run_config(DENSE, ("projector/.*", "llm/.*")))
    assert kinds(stage2) == {"attention", "mlp"}
    assert kinds(adapters(run_config())) == set(lora.TARGETS)
    assert kinds(adapters(run_config(targets=("attention", "experts")))) == {"attention", "experts"}
    shapes = {path: leaf.shape for path, leaf in stage3.items()}
    assert shapes["llm/moe/experts/fc1/lora_a"] == (1, 2, 16, 3)
    assert shapes["llm/moe/experts/fc1/lora_b"] == (1, 2, 3, 20)
    assert shapes["llm/moe/meta/fc2/lora_a"] == (1, 20, 3) and len(shapes) == 8
    assert {path.split("/")[-2] for path in stage2} == {*"qkv", "out", "gate", "up", "down"}


def test_only_adapters_train() -> None:
    cfg = run_config(train=("llm/moe/(experts|meta)/.*",))
    shapes = layout.shapes(cfg)
    label = layout.labels(cfg, shapes)
    assert {k for k, v in label.items() if v == optim.TRAIN} == set(adapters(cfg))
    assert set(label) == set(shapes)


@pytest.mark.parametrize(
    ("settings", "run", "message"),
    [
        ({"rank": -1}, {}, "rank is -1; give 1 or more"),
        ({"targets": ("expert",)}, {}, r"\['expert'\] cannot have adapters; use experts, meta"),
        ({"dropout": 1.0}, {}, r"dropout lie in \[0, 1\)"),
        ({"alpha": -1.0}, {}, "alpha must not be negative"),
        ({"rank": 0, "targets": ("meta",)}, {}, "rank is 0, which means no adapters"),
        ({}, {"objective": "router", "train": ("router/.*",)}, "router phase .* no adapters"),
        ({}, {"train": ("projector/.*",)}, "none of .* is in what stage3 trains"),
        ({}, {"train": ("llm/.*", "llm/typo/.*")}, "matches no parameter"),
        (
            {"targets": ("experts", "attention")},
            {"train": ("llm/moe/.*",)},
            "names attention, but config.train .* leaves out llm/layers/attn/k/kernel",
        ),
        ({"targets": ("experts",)}, {"model": DENSE}, "names experts, which this model has not"),
    ],
)
def test_settings_that_cannot_work(
    settings: dict[str, Any], run: dict[str, Any], message: str
) -> None:
    cfg = dataclasses.replace(run_config(**settings), **run)
    with pytest.raises(ConfigError, match=message):
        layout.labels(cfg, layout.shapes(cfg))


def test_they_start_as_nothing() -> None:
    """B is zero and A as `peft` draws it: uniform up to 1 / sqrt(inputs); a seed decides."""
    cfg = run_config()
    flat = flatten_dict(small_models.params(MODEL), sep="/")
    first = lora.fresh(cfg, flat)
    for path, value in first.items():
        if path.endswith("lora_b"):
            assert not value.any()
        else:
            bound = value.shape[-2] ** -0.5
            assert 0.8 * bound < np.abs(value).max() <= bound
            assert np.abs(value).mean() == pytest.approx(bound / 2, rel=0.25)
    again, other = lora.fresh(cfg, flat), lora.fresh(dataclasses.replace(cfg, seed=1), flat)
    assert all(np.array_equal(again[k], v) for k, v in first.items())
    assert not np.array_equal(other["llm/mlp/fc1/lora_a"], first["llm/mlp/fc1/lora_a"])


@pytest.mark.parametrize("model", [MODEL, DENSE], ids=["experts", "dense"])
def test_merged_weights_are_the_same_model(model: ModelConfig) -> None:
    """Loss and gradients beside the frozen weights are those of W + s A B, by the chain rule."""
    cfg = run_config(model, alpha=4.5)
    flat = parameters(cfg)
    label = layout.labels(cfg, flat)
    train, frozen = optim.split(flat, label)
    batch = layout.on_device(small_models.batch(model))
    whole = dataclasses.replace(cfg, lora=LoraConfig())

    @jax.jit
    def value(train: Any, frozen: Any, cfg: RunConfig = cfg) -> Any:
        def total(train: Any) -> Any:
            return step.forward_loss(cfg, model, train | frozen, batch).rows.sum()

        return jax.value_and_grad(total)(train)

    loss, gradient = value(train, frozen)
    merged = flatten_dict(lora.merge(unflatten_dict(flat, sep="/"), 1.5), sep="/")
    assert merged.keys() == frozen.keys()
    changed = {k: merged.pop(k) for k in lora.adapted(cfg, list(frozen))}
    want, dw = jax.jit(lambda a, b: value.__wrapped__(a, b, whole))(changed, merged)
    assert float(loss) == pytest.approx(float(want), rel=1e-5)
    for path, slope in dw.items():
        place = path.removesuffix("kernel")
        a, b = flat[place + "lora_a"], flat[place + "lora_b"]
        da, db = 1.5 * slope @ b.swapaxes(-1, -2), 1.5 * a.swapaxes(-1, -2) @ slope
        scale = max(np.abs(da).max(), np.abs(db).max())
        np.testing.assert_allclose(gradient[place + "lora_a"], da, atol=1e-5 * scale)
        np.testing.assert_allclose(gradient[place + "lora_b"], db, atol=1e-5 * scale)


def test_merging_layer_by_layer() -> None:
    """On the device, for the answers of an evaluation in training, it gives what the host gives."""
    cfg = run_config()
    tree = unflatten_dict(parameters(cfg), sep="/")
    want = generate.for_generation(lora.merge(tree, 2.0), MODEL)
    have = lora.merge(generate.for_generation(jax.tree.map(jnp.asarray, tree), MODEL), 2.0)
    assert jax.tree.structure(have) == jax.tree.structure(want)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), have, want)
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), tree)
    assert {a.dtype for a in jax.tree.leaves(lora.merge(half, 2.0))} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("product", [products.plain], ids=["plain"])
def test_tiles_add_what_experts_add(product: Any) -> None:
    """The grouped products of accelerators, values and gradients, against every expert's sum."""
    n, width, ffn, tokens = 3, 8, 12, 140
    p = small_models.fill(layers.mlp_leaves("stablelm", width, ffn, (n,)))
    for name, part in p.items():
        d_in, d_out = part["kernel"].shape[1:]
        sizes = {"lora_a": (n, d_in, 2), "lora_b": (n, 2, d_out)}
        given = {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in sizes.items()}
        p[name] = part | small_models.fill(given, seed=len(name))
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((1, tokens, width)), jnp.float32)
    choice = jnp.asarray(rng.integers(0, n, (1, tokens, 1)), jnp.int32)
    weight = jnp.ones((1, tokens, 1))

    def gradient(form: Any) -> Any:
        def total(p: Any, x: Any) -> Any:
            y = form(p, x, choice, weight, n)
            return (y * y).sum(), y

        return jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(p, x)

    want = gradient(experts.reference)
    for form in (grouped.grouped, lambda *a: tiles.tiled(*a, product)):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
            gradient(form),
            want,
        )


def test_no_gradient_of_a_frozen_matrix_is_computed() -> None:
    """In the compiled form for a CPU no product has the shape of a kernel, unless kernels train."""
    n, width, ffn, rank = 2, 26, 44, 3
    p = small_models.fill(layers.mlp_leaves("phi", width, ffn, (n,)))
    pairs = {
        name: {
            "lora_a": jnp.ones((n, part["kernel"].shape[1], rank)),
            "lora_b": jnp.ones((n, rank, part["kernel"].shape[2])),
        }
        for name, part in p.items()
    }
    x = jnp.ones((1, 70, width))
    choice, weight = jnp.zeros((1, 70, 1), jnp.int32), jnp.ones((1, 70, 1))

    def total(pairs: Any, p: Any) -> Any:
        whole = {name: p[name] | pairs[name] for name in p}
        return grouped.grouped(whole, x, choice, weight, n).sum()

    def products_like_kernels(argument: int) -> int:
        program = jax.jit(jax.grad(total, argument)).lower(pairs, p).compile().as_text()
        return len(re.findall(r"= f32\[(?:26,44|44,26)\]\S* dot\(", program))

    jax.config.update("jax_disable_most_optimizations", False)
    try:
        found = products_like_kernels(0), products_like_kernels(1)
    finally:
        jax.config.update("jax_disable_most_optimizations", True)
    assert found[0] == 0 and found[1] > 0


def test_dropout() -> None:
    """It drops the share asked for, of the adapter's input alone, and rescales the rest."""
    x = jnp.ones((4, 500))
    eye = {"lora_a": jnp.eye(500), "lora_b": jnp.eye(500)}
    p = {"kernel": jnp.zeros((500, 500))} | eye
    y = np.asarray(layers.linear(p | {"dropout": jnp.asarray([0.25, 7.0])}, x))
    assert set(np.unique(y)) == {0.0, np.float32(4 / 3)}
    assert (y == 0).mean() == pytest.approx(0.25, abs=0.03)
    other = np.asarray(layers.linear(p | {"dropout": jnp.asarray([0.25, 8.0])}, x))
    assert not np.array_equal(y, other)
    np.testing.assert_array_equal(layers.linear(p, x), x)


def test_dropout_is_that_of_the_step() -> None:
    """The same for the same key, another for another, and none in evaluation."""
    cfg = run_config(dropout=0.5)
    flat = {path: jnp.asarray(leaf) for path, leaf in parameters(cfg).items()}
    batch = layout.on_device(small_models.batch(MODEL))

    @jax.jit
    def rows(flat: Any, key: Any) -> Any:
        return step.forward_loss(cfg, MODEL, flat, batch, key).rows

    first, again = rows(flat, jax.random.key(1)), rows(flat, jax.random.key(1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(rows(flat, jax.random.key(2)) - first).max() > 1e-3
    evaluated = lora.active(flat, cfg.lora)
    assert evaluated.keys() == flat.keys()
    seeds = [v for k, v in lora.active(flat, cfg.lora, jax.random.key(1)).items() if "dropout" in k]
    assert len(seeds) == len(lora.adapted(cfg, flat))
    every = np.concatenate([pair[..., 1].ravel() for pair in seeds])
    assert len(np.unique(every)) == len(every)  # of every matrix, of every layer, of every expert


def test_flops_by_hand() -> None:
    """Frozen products count forward and where something flows back; factors three times."""
    d, f, r, v = 16, 20, 3, 48
    cfg = run_config(train=("llm/moe/(experts|meta)/.*",))
    found = flops.costs(cfg, MODEL, layout.labels(cfg, layout.shapes(cfg)))
    attention = 2 * (d * d + 2 * d * 8 + d * d)
    factors = 2 * r * (2 * (d + f) + f) + 2 * r * (2 * (d + f) + d + f)  # fc1: no input gradient
    first = 2 * (2 * d * f + 2 * 2 * d * f + factors) + 2 * d * 2 + attention
    second = 2 * 2 * 2 * d * f + 2 * attention
    assert found.token == first + second + 2 * 2 * d * v


def test_info_counts_them() -> None:
    """Two of the experts' matrices and two of the meta expert's; one expert of two is active."""
    cfg = run_config(train=("llm/moe/(experts|meta)/.*",))
    pair = 2 * 3 * (16 + 20)
    assert info.adapters(cfg) == (3 * pair, 2 * pair)


def test_fingerprint() -> None:
    """Numbers, names, shapes and dtypes count; order and memory do not."""
    numbers = np.arange(6, dtype=np.float32).reshape(2, 3)
    tree = {"a": {"b": numbers}, "c": np.zeros(2, np.float32)}
    first = lora.fingerprint(tree)
    assert lora.fingerprint({"c": tree["c"], "a": {"b": tree["a"]["b"].T.copy().T}}) == first
    changed = tree["a"]["b"].copy()
    changed[1, 2] = 5.5
    for other in (
        tree | {"a": {"b": changed}},
        tree | {"a": {"d": tree["a"]["b"]}},
        tree | {"a": {"b": tree["a"]["b"].reshape(3, 2)}},
        tree | {"c": np.zeros(2, np.int32)},
    ):
        assert lora.fingerprint(other) != first
