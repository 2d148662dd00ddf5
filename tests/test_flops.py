"""Model FLOPs of a step by hand, and the utilisation that a run reports."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models

from medmoe_jax import flops, hardware, layout, optim, presets
from medmoe_jax.config import LogConfig, ModelConfig, MoeConfig, RunConfig
from medmoe_jax.report import Reporter, model_flops

DENSE = ("projector/.*", "llm/.*")
EXPERTS = ("llm/moe/(experts|meta)/.*",)
# Sizes of small_models: width 16, FFN 20, 4 heads of 4, 2 of keys and values, 48 words.
D, F, KV, V = 16, 20, 8, 48
ATTENTION = D * D + 2 * D * KV + D * D  # numbers of the products of a layer


def costs(
    family: str, train: tuple[str, ...], moe: MoeConfig | None = None, layers: int = 2, **run: Any
) -> flops.Costs:
    cfg = RunConfig(model=small_models.config(family, moe, layers=layers), train=train, **run)
    label = optim.labels(list(layout.shapes(cfg)), train) if train else {}
    return flops.costs(cfg, layout.model_of(cfg), label)


@pytest.mark.parametrize(
    ("moe", "tokens", "share"),
    [
        (None, 5, 1.0),
        (MoeConfig(4, top_k=1), 1, 1 / 4),
        (MoeConfig(4, top_k=1), 2, 7 / 16),  # the second token finds it chosen in 1 case of 4
        (MoeConfig(4, top_k=2), 2, 3 / 4),
        (MoeConfig(4, routing="uniform"), 1, 1.0),
    ],
)
def test_share_of_experts_that_tokens_choose(
    moe: MoeConfig | None, tokens: int, share: float
) -> None:
    assert flops.chosen(moe, tokens) == share


@pytest.mark.parametrize(("family", "ffn"), [("phi", 2 * D * F), ("stablelm", 3 * D * F)])
def test_what_trains_counts_three_times(family: str, ffn: int) -> None:
    """Forward: twice the numbers of the weights; all of them train: three times that."""
    weights = 2 * (ATTENTION + ffn) + D * V
    forward, whole = costs(family, ()), costs(family, DENSE)
    assert forward.token == 2 * weights and forward.pair == 2 * 4 * D
    assert whole.token == 6 * weights and whole.pair == 3 * forward.pair
    # With the projector alone the gradient passes all products, and no weight has one.
    aligned = costs(family, ("projector/.*",))
    assert aligned.token == 4 * weights and aligned.pair == whole.pair
    # One layer of the tower runs, on 4 patches and the class token of width 8, FFN 12.
    tower = 5 * (8 * 8 * 8 + 4 * 8 * 12) + 4 * 8 * 25 + 4 * 2 * 48 * 8
    assert forward.image == tower + 4 * 2 * (8 * D + D * D)
    assert aligned.image == tower + 4 * (4 * 8 * D + 6 * D * D)


def test_experts() -> None:
    """Nothing flows back below the first experts; an expert that is not chosen costs nothing."""
    moe = MoeConfig(experts=4, placement="0,1")
    found = costs("phi", EXPERTS, moe)
    # fc1 of the first layer needs no gradient of its input.
    first = 2 * (2 * D * F) * 2 + 2 * (2 * F * D) * 3 + 2 * D * 4 + 2 * ATTENTION
    second = 2 * 2 * (2 * D * F) * 3 + 2 * (2 * D * 4) + 2 * 2 * ATTENTION
    assert found.token == first + second + 2 * 2 * D * V
    assert found.pair == 4 * D * (1 + 3)
    more = costs("phi", EXPERTS, MoeConfig(experts=8, placement="0,1"))
    assert more.token - found.token == 2 * D * 4 * (1 + 2)  # the router's columns only
    two = costs("phi", EXPERTS, MoeConfig(experts=4, placement="0,1", top_k=2))
    assert two.token - found.token == 2 * D * F * (2 + 3 + 3 + 3)


def test_router_phase() -> None:
    """Forward up to the last layer that will hold experts, and the router's own gradient."""
    moe = MoeConfig(experts=4, placement="0,2")
    router = 2 * D * 4 * 2  # in the forward pass and for its weight
    phi = costs("phi", ("router/.*",), moe, 4, objective="router")
    assert phi.token == 2 * 2 * (ATTENTION + 2 * D * F) + 2 * router
    assert phi.pair == 2 * 4 * D
    stable = costs("stablelm", ("router/.*",), moe, 4, objective="router")
    assert stable.token == 2 * 2 * (ATTENTION + 3 * D * F) + 2 * ATTENTION + 2 * router
    # config.model may name another size than the model that runs: only its mixture counts.
    cfg = RunConfig(model=small_models.config("phi", MoeConfig(4), layers=8), objective="router")
    model = small_models.config("phi", layers=4)
    assert flops.costs(cfg, model, {"router/fc1/kernel": "train"}) == phi


def test_of_a_batch() -> None:
    """Padding and blank images cost nothing; samples in one row do not see each other."""
    model: ModelConfig = small_models.config()
    unit = flops.Costs(1.0, 1000.0, 1e6)
    batch = small_models.batch(model, (1, 0, 2), text=6, length=24)
    lengths = [6 + 4, 7, 8 + 2 * 4]
    pairs = sum(n * (n + 1) // 2 for n in lengths)
    assert model_flops(unit, batch, 4) == sum(lengths) + 1000 * pairs + 3e6
    packed = {
        "segments": np.array([[1, 1, 2, 2, 2, 0], [1, 0, 0, 0, 0, 0]]),
        "mask": np.array([[1, 1, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0]], bool),
        "image_pos": np.full((2, 6), -1),
    }
    assert model_flops(unit, packed, 4) == 6 + 1000 * (3 + 6 + 1)
    nothing = {k: np.zeros_like(v) for k, v in packed.items()} | {"image_pos": np.full((2, 6), -1)}
    assert model_flops(unit, nothing, 4) == 0


def test_full_sizes() -> None:
    """Twice the paper's activated parameters a token: 3.6B and 2.0B (Table 14), embedding left out
    (a look-up)."""
    for name, activated, embedding in (
        ("phi2", 3.6e9, 51200 * 2560),
        ("stablelm", 2.0e9, 100352 * 2048),
    ):
        cfg = RunConfig(model=presets.model(name, MoeConfig()))
        token = flops.costs(cfg, cfg.model, {}).token
        assert token == pytest.approx(2 * (activated - embedding), rel=0.05)


def test_peak() -> None:
    """Known chips by what JAX calls them; nothing is said of the others."""
    assert hardware.peak("TPU v5 lite", "bfloat16") == 197e12
    assert hardware.peak("NVIDIA H200", "bfloat16") == 989.5e12
    assert hardware.peak("TPU v5 lite", "float32") is None
    assert hardware.peak(jax.devices("cpu")[0].device_kind, "float32") is None
    assert len({kind for chip in hardware.CHIPS for kind in chip.kinds}) == sum(
        len(chip.kinds) for chip in hardware.CHIPS
    )
    for chip in hardware.CHIPS:
        assert hardware.by_name(chip.name) is chip and chip.reserve < chip.memory / 10
    assert hardware.by_name("abacus") is None


@pytest.mark.parametrize("known", [True, False])
def test_utilisation(known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run reports model FLOPs a second, and their share of the peak where that is known."""
    model = small_models.config()
    monkeypatch.setattr(hardware, "peak", lambda kind, dtype: 1e6 if known else None)
    cfg = RunConfig(log=LogConfig(every=1, tensorboard=False))  # its model is not the one
    unit = flops.Costs(token=2.0, pair=0.0, image=5.0)
    patches = model.vision.patches
    batch = small_models.batch(model, (1, 0)) | {"row": np.arange(2)}
    metrics = {name: jnp.ones(()) for name in ("loss", "grad_norm")} | {"rows": jnp.ones(2)}
    with closing(Reporter(cfg, tmp_path, 0, 1, lambda step: 0.0, (), unit, patches)) as reporter:
        reporter.add(1, metrics, batch, waited=0.5)
        reporter.flush()
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    tokens = batch["mask"].sum()
    work = 2.0 * tokens + 5.0  # one image
    assert row["model_flops_per_second"] == pytest.approx(work / row["seconds"])
    assert row["tokens_per_second"] == pytest.approx(tokens / row["seconds"])
    assert row["data_seconds"] == 0.5
    share = work / row["seconds"] / (1e6 * jax.device_count())
    assert row.get("mfu") == (pytest.approx(share) if known else None)
