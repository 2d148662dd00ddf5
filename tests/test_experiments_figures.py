"""The paper's figures: a look at a tiny router, and figures of traces whose truth is known."""

from __future__ import annotations

import dataclasses
import json
import runpy
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny_runs

import medmoe_jax
from medmoe_jax import checkpoint
from medmoe_jax.analyse import inputs, routing
from medmoe_jax.analyse.routing import Trace
from medmoe_jax.config import ConfigError, MoeConfig
from medmoe_jax.data import sources
from medmoe_jax.data.image_store import ImageStore
from medmoe_jax.experiments import figure_drawing, figures_experts, figures_router, looks
from medmoe_jax.experiments.catalogue import EXPERIMENTS
from medmoe_jax.experiments.cells import DONE, Cell, Store
from medmoe_jax.experiments.figures_experts import Leaders, Shares
from medmoe_jax.experiments.figures_router import Depths, Labels
from medmoe_jax.experiments.study import Study
from medmoe_jax.models import layers, moe

pytestmark = pytest.mark.usefixtures("quick_compile")
ROOT = Path(__file__).resolve().parents[1]
N = 40  # samples of a trace


def trace(own: float, seed: int = 0, text: float = 0.25, experts: int = 4) -> Trace:
    """Samples of all modalities in turn, two layers, 10 image and 20 text tokens each.

    Args:
      own: share of the image tokens that go to the expert of the modality; the rest to the next.
      seed: of the scores' noise.
      text: the same share of the text tokens.
      experts: E.
    """
    modality = np.arange(N) % 4
    first = np.zeros((N, 2, 3, experts), np.int64)
    rows = np.arange(N)
    for kind, tokens, share in ((0, 10, own), (1, 15, text), (2, 5, text)):
        mine = round(tokens * share)
        first[rows, :, kind, modality] += mine
        first[rows, :, kind, (modality + 1) % 4] += tokens - mine
    scores = np.eye(experts)[modality] * own
    scores += 0.1 * np.random.default_rng(seed).standard_normal(scores.shape)
    posterior = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    tokens = first[:, 0].sum(-1)
    return Trace(first, first, np.ones((N, 2, 3)), tokens, scores, posterior, modality, (0, 2))


def store_trace(store: Store, cell: Cell, found: Trace) -> None:
    """A finished look."""
    folder = store.place(cell)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {f.name: np.asarray(getattr(found, f.name)) for f in dataclasses.fields(found)}
    images = np.array([f"i{n}" for n in range(N)])
    np.savez(folder / looks.FILE, **arrays, **{looks.IMAGES: images})
    (folder / DONE).write_text(json.dumps({"seconds": 1.0}))


def tiny_study(seeds: int = 2) -> Study:
    cfg = runpy.run_path(str(ROOT / "configs" / "experiments.py"))["get_config"]("tiny")
    return Study(dataclasses.replace(cfg, bootstrap=200), seeds)


def values(result: Any, row: str) -> dict[str, float]:
    return {column: found["mean"] for column, found in result.data["levels"][row].items()}


def test_what_a_look_keeps(tmp_path: Path) -> None:
    """Of a router beside a dense model: the trace of the same rows, and their images."""
    mixture = MoeConfig()
    folder = tiny_runs.save_start(tmp_path / "model")
    params, meta = checkpoint.load_model(folder)
    leaves = moe.router_leaves(meta.model.llm.width, mixture.experts, 2)
    router = jax.device_get(layers.initialise(jax.random.key(1), leaves))
    checkpoint.save_model(folder, params | {"router": router}, meta)
    questions = tiny_runs.save_questions(tmp_path, 8)
    looks.look(folder, (str(questions),), "", 4, 4, mixture, tmp_path)
    found, images = looks.read(tmp_path)
    assert sorted(found.modality.tolist()) == [0, 1, 2, 3] and found.layers == (0,)

    model = medmoe_jax.load(folder)
    samples = sources.read_samples([questions], tmp_path / "images").samples
    drawn = inputs.draw(samples, 4, 0)
    assert images == [s.images[0] for s in drawn]
    shown = ImageStore(tmp_path / "images", model.spec, keep=False)
    rows = [inputs.of_sample(model, s, shown) for s in drawn]
    batches = list(inputs.batches(rows, 4))
    direct = routing.trace(
        model.params | {"router": router}, model.config, batches, mixture=mixture
    )
    np.testing.assert_array_equal(found.first, direct.first)
    np.testing.assert_allclose(found.scores, direct.scores, rtol=1e-6)


def test_depth_of_the_router(tmp_path: Path) -> None:
    study, store, figure = tiny_study(), Store(tmp_path), Depths("stablelm", "Figure 3")
    shares = {1: 0.8, 2: 0.9, 3: 1.0}
    for depth, share in shares.items():
        for seed in study.seeds:
            store_trace(store, figure.cell(study, depth, seed), trace(share, seed))
    assert len({cell.digest for cell in figure.cells(study)}) == 6
    result = figure.result("figure3", study, store, tmp_path)
    for depth, share in shares.items():
        row = values(result, f"{depth} layer{'s' * (depth > 1)}")
        assert row["samples"] == 100 and row["image tokens"] == pytest.approx(100 * share)
        assert row["text tokens"] == pytest.approx(100 * (round(15 * 0.25) + round(1.25)) / 20)
        assert 40 < row["silhouette x 100"] < 95
    verdicts = {claim.text: claim.verdict for claim in result.claims}
    assert verdicts["three layers are better than one (image tokens)"] == 1
    assert verdicts["three layers are better than one (samples)"] == 0
    assert (tmp_path / "figure3.png").read_bytes()[:4] == b"\x89PNG"
    json.dumps(result.data, allow_nan=False)


def test_silhouette_is_that_of_scikit_learn_and_zero_for_one_label() -> None:
    points = np.array([[0.0], [1.0], [10.0], [11.0]])
    found = figures_router.silhouette(points, np.array([0, 0, 1, 1]))
    expected = [1 - 1 / 10.5, 1 - 1 / 9.5, 1 - 1 / 9.5, 1 - 1 / 10.5]
    np.testing.assert_allclose(found, expected)
    assert (figures_router.silhouette(points, np.zeros(4)) == 0).all()


def test_number_of_labels(tmp_path: Path) -> None:
    study, store, figure = tiny_study(), Store(tmp_path), Labels("Figure 6")
    counts = figure.counts(study)
    assert counts == (5, 10, 25, 50, 100, 200)
    for n in counts:
        for seed in study.seeds:
            store_trace(store, figure.cell(study, n, seed), trace(min(1.0, n / 100), seed))
    result = figure.result("figure6", study, store, tmp_path)
    assert values(result, "50")["image tokens"] == pytest.approx(50)
    verdicts = {claim.text: claim.verdict for claim in result.claims}
    assert verdicts["200 labels of a modality are better than 50 (image tokens)"] == 1
    assert verdicts["200 labels of a modality are better than 100 (image tokens)"] == 0
    phases = {cell.parents[0].spec["run"]["optim"]["steps"] for cell in figure.cells(study)}
    assert phases == {50}, "all routers train for as many steps"


def test_tokens_of_the_experts(tmp_path: Path) -> None:
    study, store = tiny_study(), Store(tmp_path)
    figure = Shares("Figure 11", ("CT", "Pathology"))
    for cell in figure.cells(study):
        store_trace(store, cell, trace(0.7, text=0.2))
    result = figure.result("figure11", study, store, tmp_path)
    assert values(result, "CT: expert CT") == pytest.approx(
        {"of image tokens": 70, "of text tokens": 20, "image less text": 50}
    )
    assert values(result, "Pathology: expert CT")["of text tokens"] == pytest.approx(80)
    assert [claim.verdict for claim in result.claims] == [1, 1]
    with pytest.raises(ConfigError, match="names its modality"):
        figures_experts._of(dataclasses.replace(trace(1), modality=np.full(N, -1)), 0)


def test_busiest_experts(tmp_path: Path) -> None:
    """One router has an expert for each modality, the other one for all."""
    study, store, figure = tiny_study(), Store(tmp_path), Leaders("Figure 5")
    fused = trace(1.0)
    everywhere = np.zeros_like(fused.first)
    everywhere[..., 2] = fused.first.sum(-1)
    for variant, found in (
        ("moe", trace(1.0, text=1.0)),
        ("learned", dataclasses.replace(fused, first=everywhere)),
    ):
        for seed in study.seeds:
            store_trace(store, figures_experts.experts_cell(study, variant, seed), found)
    result = figure.result("figure5", study, store, tmp_path)
    told, information = "modality told by the busiest expert", "information, % of the most"
    assert values(result, "pretrained router") == pytest.approx({told: 100, information: 100})
    assert values(result, "learned router") == pytest.approx({told: 25, information: 0})
    assert result.claims[0].verdict == 1 and result.claims[0].of_paper
    rows = {row[0]: row[1:] for row in result.tables[1].rows}
    assert rows["pretrained router, X-ray"] == ("2 (100 %)", "2 (100 %)")
    assert rows["learned router, CT"] == ("2 (100 %)", "2 (100 %)")


def test_principal_components_keep_distances_of_a_plane() -> None:
    rng = np.random.default_rng(0)
    plane = rng.standard_normal((30, 2))
    turned = plane @ np.linalg.qr(rng.standard_normal((5, 5)))[0][:2]
    found = figure_drawing.principal(turned)
    between = [np.linalg.norm(x[:, None] - x[None], axis=-1) for x in (plane, found)]
    np.testing.assert_allclose(*between, atol=1e-9)
    assert found[:, 0].var() >= found[:, 1].var()


def test_all_figures_are_in_the_catalogue() -> None:
    names = [name for name in EXPERIMENTS if name.startswith("figure")]
    assert names == ["figure3", "figure4", "figure5", "figure6", "figure10", "figure11"]
