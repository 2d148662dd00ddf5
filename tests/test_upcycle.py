"""Dense -> MoE: the official start, and the start that keeps the function."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import small_models
from flax.traverse_util import flatten_dict

from medmoe_jax.checkpoint import load_router
from medmoe_jax.config import ConfigError, ModelConfig, MoeConfig
from medmoe_jax.convert import check, comparison
from medmoe_jax.models import medmoe, moe
from medmoe_jax.upcycle import upcycle

pytestmark = pytest.mark.usefixtures("quick_compile")

DENSE = {family: small_models.config(family, layers=2) for family in ("phi", "stablelm")}


def router(cfg: ModelConfig, mixture: MoeConfig) -> dict[str, Any]:
    """A random router that fits."""
    leaves = moe.router_leaves(cfg.llm.width, mixture.experts, mixture.router_layers)
    return small_models.fill(leaves)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("family", ["phi", "stablelm"])
def test_goldens(fixtures: Path, family: str, top_k: int) -> None:
    """The same model as the official `initialize_moe_modules` makes."""
    pytest.importorskip("torch", reason="needs the extra medmoe_jax[torch]")
    folder = fixtures / f"{family}_dense_stage2"
    params, cfg = small_models.golden_params(folder)
    mixture = MoeConfig(experts=4, top_k=top_k, aux_coef=0.01)
    params, cfg = upcycle(params, cfg, mixture, load_router(folder / "router.pth"))
    io = small_models.golden_io(folder)
    images = int(np.maximum((io["input_ids"][:2] == -200).sum(1), 1).sum())
    inputs = {key: io[key][:2] for key in ("input_ids", "attention_mask", "labels")}
    inputs["pixel_values"] = io["pixel_values"][:images]
    want = small_models.golden_io(folder, f"upcycled_top{top_k}_io")
    result = comparison.compare(check.activations(params, cfg, inputs, "io"), want, 1e-4)
    assert result.ok and len(result.rows) == 5 and not result.unchecked, result.text()


def test_paper_start_copies_the_ffn() -> None:
    """Every expert, the meta expert and every layer's router are copies; the rest is shared."""
    cfg = dataclasses.replace(
        DENSE["stablelm"], llm=dataclasses.replace(DENSE["stablelm"].llm, layers=4)
    )
    params = small_models.params(cfg)
    mixture = MoeConfig(experts=3, placement="1,3")
    given = router(cfg, mixture)
    new, model = upcycle(params | {"router": given}, cfg, mixture, given)
    assert model == dataclasses.replace(cfg, moe=mixture)
    shapes = {k: v.shape for k, v in flatten_dict(medmoe.shapes(model), sep="/").items()}
    flat = flatten_dict(new, sep="/")
    assert {k: v.shape for k, v in flat.items()} == shapes
    for name in ("gate", "up", "down"):
        ffn = params["llm"]["mlp"][name]["kernel"]
        experts = new["llm"]["moe"]["experts"][name]["kernel"]
        for place, layer in enumerate((1, 3)):
            assert all((experts[place, e] == ffn[layer]).all() for e in range(3))
            assert (new["llm"]["moe"]["meta"][name]["kernel"][place] == ffn[layer]).all()
        assert (new["llm"]["mlp"][name]["kernel"] == ffn[[0, 2]]).all()
    for place in range(2):
        kernel = new["llm"]["moe"]["router"]["fc1"]["kernel"]
        assert (kernel[place] == given["fc1"]["kernel"]).all()
    assert new["llm"]["layers"] is params["llm"]["layers"] and new["vision"] is params["vision"]
    assert params["llm"]["mlp"]["up"]["kernel"].shape[0] == 4 and "moe" not in params["llm"]
    everywhere, _ = upcycle(params, cfg, MoeConfig(3, placement="dense"), given)
    assert "mlp" not in everywhere["llm"]


@pytest.mark.parametrize(
    ("family", "mixture"),
    [
        ("phi", MoeConfig(experts=3)),
        ("stablelm", MoeConfig(experts=2, top_k=2, placement="dense")),
        ("phi", MoeConfig(experts=4, use_residual=True, placement="1")),
        ("stablelm", MoeConfig(experts=3, top_k=2, meta=False)),
    ],
    ids=["top-1", "top-2", "residual", "top-2 without meta"],
)
def test_function_preserving_start(family: str, mixture: MoeConfig) -> None:
    """The logits are the dense model's; with the paper's start they are not."""
    cfg = DENSE[family]
    params, batch = small_models.params(cfg), small_models.batch(cfg, (1, 0))
    arrays = {k: batch[k] for k in small_models.ON_DEVICE}

    def logits(p: Any, cfg: ModelConfig) -> Any:
        return medmoe.logits(p, medmoe.forward(p, cfg, arrays)[0])

    run = jax.jit(logits, static_argnums=1)
    want = np.asarray(run(params, cfg))
    given = router(cfg, mixture)
    new, model = upcycle(params, cfg, mixture, given, "function_preserving")
    np.testing.assert_allclose(run(new, model), want, atol=1e-5)
    if mixture.meta:
        paper, _ = upcycle(params, cfg, mixture, given, "paper")
        assert np.abs(np.asarray(run(paper, model)) - want).max() > 0.1


def test_function_preserving_keeps_dtypes() -> None:
    """Scaling does not widen stored weights."""
    cfg = DENSE["phi"]
    half = jax.tree.map(lambda a: a.astype(np.float16), small_models.params(cfg))
    mixture = MoeConfig(experts=2, use_residual=True)
    new, _ = upcycle(half, cfg, mixture, router(cfg, mixture), "function_preserving")
    ffns = [new["llm"]["moe"][name] for name in ("experts", "meta")]
    assert {a.dtype for a in jax.tree.leaves(ffns)} == {np.dtype(np.float16)}


def test_what_cannot_work() -> None:
    cfg = DENSE["phi"]
    params, one = small_models.params(cfg), MoeConfig(experts=3)
    good = router(cfg, one)
    for mixture, given, mode, message in (
        (one, good, "best", "'best' is unknown; use one of paper, function_preserving"),
        (MoeConfig(experts=4), good, "paper", r"ends in \(16, 3\); the model needs 1 layer.*4\)"),
        (MoeConfig(3, router_layers=2), good, "paper", "needs 2 layer"),
        (MoeConfig(3, meta=False), good, "function_preserving", "without a meta expert"),
        (MoeConfig(3, placement="5"), good, "paper", "below 2"),
    ):
        with pytest.raises(ConfigError, match=message):
            upcycle(params, cfg, mixture, given, mode)
    with pytest.raises(ConfigError, match="has experts already"):
        upcycle(params, dataclasses.replace(cfg, moe=one), one, good)
