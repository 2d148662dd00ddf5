"""What enters a step: the same for arrays and for shapes alone."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
import small_models
from flax.traverse_util import flatten_dict

from medmoe_jax import layout, lora, optim, router, sharding
from medmoe_jax.config import ConfigError, LoraConfig, MeshConfig, MoeConfig, OptimConfig, RunConfig

pytestmark = pytest.mark.usefixtures("quick_compile")

MODEL = small_models.config("phi", MoeConfig(experts=2), layers=2)
RUNS = {
    "experts": RunConfig(model=MODEL, train=("llm/moe/(experts|meta)/.*",)),
    "adapters": RunConfig(model=MODEL, train=("llm/moe/.*",), lora=LoraConfig(rank=2)),
    "router": RunConfig(
        model=MODEL, objective="router", train=("router/.*",), frozen_dtype="float32"
    ),
}


def outline(tree: Any) -> list[Any]:
    """Path, shape, dtype and place of every leaf."""
    return [
        (jax.tree_util.keystr(path), leaf.shape, leaf.dtype, leaf.sharding)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


@pytest.mark.parametrize("name", RUNS)
def test_shapes_are_those_of_the_arrays(name: str) -> None:
    cfg = RUNS[name]
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    model = layout.model_of(cfg)
    params = small_models.params(model)
    if name == "router":
        assert cfg.model.moe and not model.moe
        params |= {"router": jax.device_get(router.fresh(model, cfg.model.moe, 0))}
    flat = flatten_dict(params, sep="/")
    flat |= lora.fresh(cfg, flat)
    label = layout.labels(cfg, flat)
    tx = optim.make(cfg.optim, 10, label)
    train, frozen = (
        layout.place_weights(cfg, part, label, mesh) for part in optim.split(flat, label)
    )
    state = layout.first_state(tx, train, frozen, mesh)
    shapes = layout.abstract_weights(cfg, layout.shapes(cfg), label, mesh)
    assert outline(shapes) == outline((train, frozen))
    assert outline(layout.abstract_state(tx, *shapes, mesh)) == outline(state)
    assert {v.dtype for v in train.values()} == {np.dtype("float32")}
    kept = {k for k, v in frozen.items() if v.dtype == np.float32}
    want = set(frozen) if name == "router" else {k for k in frozen if "router" in k}
    assert kept == want


def test_the_batch_is_that_of_the_data() -> None:
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    cfg = RunConfig(model=MODEL, optim=OptimConfig(batch_size=3))
    batch = small_models.batch(MODEL, length=20)
    batch["images"] = batch["images"].astype(np.uint8)
    placed = sharding.place_batch(layout.on_device(batch), mesh)
    assert outline(layout.abstract_batch(cfg, mesh, length=20, images=2)) == outline(placed)


@pytest.mark.parametrize(
    ("experts", "devices", "message"),
    [
        (4, 4, ""),
        (6, 3, ""),
        (None, 3, ""),  # a dense model: the axis splits weights and the batch
        (4, 3, "mesh.expert 3 does not divide the 4 experts of the model; use one of 1, 2, 4, and"),
        (5, 2, "does not divide the 5 experts of the model; use one of 1, 5,"),
        (2, 4, "use one of 1, 2,"),
    ],
)
def test_experts_that_cannot_be_shared_out(experts: int | None, devices: int, message: str) -> None:
    mesh = jax.sharding.AbstractMesh((1, 1, devices), sharding.AXES)
    model = small_models.config("phi", MoeConfig(experts=experts) if experts else None)
    if not message:
        return layout.check_experts(model, mesh)
    with pytest.raises(ConfigError, match=message):
        layout.check_experts(model, mesh)
    return None


@pytest.mark.parametrize(
    ("size", "parts", "message"),
    [
        (6, 4, r"batch_size 6 cannot be split into 4 micro-batches \(optim.accumulate\)"),
        (12, 0, "cannot be split into 0 micro-batches"),
        (6, 1, "batch_size 6 cannot be split over 4 devices"),
        (12, 2, "batch_size 12, in 2 micro-batches of 6, cannot be split over 4 devices"),
        (8, 2, ""),
    ],
)
def test_batches_that_cannot_be_split(size: int, parts: int, message: str) -> None:
    mesh = jax.sharding.AbstractMesh((1, 2, 2), sharding.AXES)
    cfg = RunConfig(optim=OptimConfig(batch_size=size, accumulate=parts))
    if not message:
        return layout.check_batch_size(cfg, mesh)
    with pytest.raises(ConfigError, match=message):
        layout.check_batch_size(cfg, mesh)
    return None
