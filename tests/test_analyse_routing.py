"""Expert loads against a direct loop over tokens, and the figures made of them."""

from __future__ import annotations

import json
import math
from typing import Any

import jax
import numpy as np
import pytest
import small_models

from medmoe_jax.analyse import inputs, routing
from medmoe_jax.analyse.routing import Trace
from medmoe_jax.config import MODALITIES, ConfigError, ModelConfig, MoeConfig
from medmoe_jax.data.problems import DataError
from medmoe_jax.data.sources import Sample
from medmoe_jax.models import medmoe

pytestmark = pytest.mark.usefixtures("quick_compile")

LABELS = np.array([2, -1, 0, 2], np.int32)


def batches(cfg: ModelConfig) -> list[dict[str, np.ndarray]]:
    """Two batches of two rows and one of padding each; rows with two, no and one images."""
    found = []
    for seed, images in enumerate([(2, 0), (1, 2)]):
        batch = small_models.batch(cfg, images, length=20, seed=seed)
        rows = len(batch["mask"]) + 1
        padded = {k: np.concatenate([v, np.zeros_like(v[:1])]) for k, v in batch.items()}
        padded["image_pos"][-1], padded["labels"][-1] = -1, -100
        padded["modality"] = np.append(LABELS[2 * seed : 2 * seed + 2], -1).astype(np.int32)
        assert len(padded["mask"]) == rows
        found.append(padded)
    return found


def by_hand(params: Any, cfg: ModelConfig, given: list[dict[str, np.ndarray]]) -> dict[str, Any]:
    """The sums of a trace, token by token."""
    assert cfg.moe is not None
    run = jax.jit(lambda batch: medmoe.forward(params, cfg, batch)[1]["router_logits"])
    names = ("chosen", "first", "entropy", "tokens")
    found: dict[str, list[Any]] = {name: [] for name in names}
    for batch in given:
        arrays = {k: batch[k] for k in small_models.ON_DEVICE}
        logits = np.asarray(run(arrays), float)  # [Lm, B, T, E]
        for row in range(len(batch["mask"])):
            if not batch["mask"][row].any():
                continue
            n_layers, n_experts = len(logits), logits.shape[-1]
            chosen = np.zeros((n_layers, 3, n_experts), int)
            first, entropy = np.zeros_like(chosen), np.zeros((n_layers, 3))
            tokens = np.zeros(3, int)
            for place in np.flatnonzero(batch["mask"][row]):
                kind = 2 if batch["labels"][row, place] != -100 else 1
                kind = 0 if batch["image_pos"][row, place] >= 0 else kind
                tokens[kind] += 1
                for layer in range(n_layers):
                    scores = logits[layer, row, place]
                    order = np.argsort(-scores)
                    first[layer, kind, order[0]] += 1
                    for expert in order[: cfg.moe.top_k]:
                        chosen[layer, kind, expert] += 1
                    p = np.exp(scores - scores.max())
                    p /= p.sum()
                    entropy[layer, kind] -= sum(x * math.log2(x) for x in p)
            for name, value in zip(names, (chosen, first, entropy, tokens), strict=True):
                found[name].append(value)
    return {name: np.stack(values) for name, values in found.items()}


def test_loads_are_those_of_a_direct_loop() -> None:
    cfg = small_models.config("stablelm", MoeConfig(top_k=2))
    params, given = small_models.params(cfg), batches(cfg)
    found = routing.trace(params, cfg, given)
    expected = by_hand(params, cfg, given)
    for name in ("chosen", "first", "tokens"):
        np.testing.assert_array_equal(getattr(found, name), expected[name])
    np.testing.assert_allclose(found.entropy, expected["entropy"], rtol=1e-5)
    assert found.modality.tolist() == LABELS.tolist() and found.layers == (0, 2)
    assert (found.chosen.sum(-1) == 2 * found.tokens[:, None]).all()
    np.testing.assert_allclose(found.posterior.sum(-1), 1, rtol=1e-6)


def test_a_router_beside_a_dense_model_is_read_where_experts_would_be() -> None:
    """The same router in the layers of a MoE model whose experts add nothing gives the same."""
    mixture = MoeConfig(placement="0")  # the first layer: nothing before it differs
    dense = small_models.config("phi")
    whole = small_models.config("phi", mixture)
    params = small_models.params(whole)
    router = jax.tree.map(lambda a: a[0], params["llm"]["moe"]["router"])
    plain = small_models.params(dense) | {"router": router}
    for part in ("vision", "projector"):
        plain[part] = params[part]
    plain["llm"] |= {k: v for k, v in params["llm"].items() if k not in ("mlp", "moe")}
    given = batches(whole)
    one = routing.trace(params, whole, given)
    two = routing.trace(plain, dense, given, mixture=mixture)
    np.testing.assert_array_equal(one.chosen, two.chosen)
    np.testing.assert_allclose(one.scores, two.scores, atol=1e-5)


def test_dense_models_and_empty_data_have_no_loads() -> None:
    dense = small_models.config("phi")
    params = small_models.params(dense)
    with pytest.raises(ConfigError, match="stage-3 model"):
        routing.trace(params, dense, batches(dense))
    with pytest.raises(ConfigError, match="stage-3 model"):
        routing.trace(params, dense, batches(dense), mixture=MoeConfig())
    for mixture, message in (
        (MoeConfig(), "no samples"),
        (MoeConfig(routing="random"), "does not ask the router"),
    ):
        cfg = small_models.config("phi", mixture)
        with pytest.raises(ConfigError, match=message):
            routing.trace(small_models.params(cfg), cfg, [])


def known() -> Trace:
    """Three samples, one layer, two experts; the first modality uses expert 0, the others 1."""
    first = np.zeros((3, 1, 3, 2), int)
    first[0, 0, 0] = 4, 0
    first[1, 0, 0] = 1, 3
    first[2, 0] = [[0, 4], [2, 0], [0, 0]]
    tokens = first.sum((1, 3))
    posterior = np.array([[0.75, 0.25], [0.5, 0.5], [0.0, 1.0]])
    entropy = np.where(first.sum(-1) > 0, 2.0, 0.0)
    modality = np.array([0, 1, -1])
    return Trace(first, first, entropy, tokens, posterior, posterior, modality, (4,))


def test_report_of_known_counts() -> None:
    report = routing.report(known())
    assert report["samples"] == {"CT": 1, "MRI": 1, "unlabelled": 1, "all": 3}
    assert report["experts"] == ["CT, X-ray", "MRI, Pathology"] and report["layers"] == [4]
    loads = {(r["modality"], r["kind"]): r for r in report["loads"]}
    assert loads["CT", "image"]["share"] == [1, 0]
    assert loads["MRI", "image"]["first_choice"] == [0.25, 0.75]
    assert loads["all", "image"]["share"] == [5 / 12, 7 / 12]
    assert loads["unlabelled", "all"]["share"] == [1 / 3, 2 / 3]
    assert loads["unlabelled", "all"]["entropy_bits"] == pytest.approx(4 / 6)
    assert loads["CT", "text"] == {
        "layer": 4,
        "modality": "CT",
        "kind": "text",
        "tokens": 0,
        "share": None,
        "first_choice": None,
        "entropy_bits": None,
    }
    leaders = {row["modality"]: row["share"] for row in report["leaders"]}
    assert leaders["CT"] == [1, 0] and leaders["all"] == [1 / 3, 2 / 3]
    router = report["router"]
    assert router["labelled"] == 2 and router["accuracy"] == 0.5
    assert router["confusion"] == [[1, 0], [1, 0]]
    assert router["posterior_entropy_bits"]["MRI"] == pytest.approx(1)
    assert router["posterior_entropy_bits"]["unlabelled"] == 0
    json.dumps(report, allow_nan=False)
    assert routing.names(4) == MODALITIES and routing.names(6)[4:] == ("expert 4", "expert 5")


def test_information_is_zero_for_equal_use_and_whole_for_experts_of_their_own() -> None:
    assert routing.information(np.array([[3, 1], [6, 2]])) == pytest.approx(0)
    assert routing.information(np.diag([5, 5, 5, 5])) == pytest.approx(2)
    assert routing.information(np.zeros((4, 4))) == 0
    mixed = routing.information(np.array([[3, 1], [1, 3]]))
    assert mixed == pytest.approx(1 - -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75)))


def test_draws_take_modalities_alike() -> None:
    labels = [0] * 8 + [1] * 2 + [2] * 8 + [-1] * 2
    samples = [Sample(f"q{i}", (), (), "", m, "", "rows.json", i) for i, m in enumerate(labels)]
    drawn = inputs.draw(samples, 9, seed=1)
    counts = np.bincount([s.modality + 1 for s in drawn], minlength=5)
    assert counts.tolist() == [2, 3, 2, 2, 0]
    assert drawn == inputs.draw(samples, 9, seed=1) != inputs.draw(samples, 9, seed=2)
    assert inputs.draw(samples, 0, 0) == samples == inputs.draw(samples, 99, 0)
    assert inputs.find(samples, samples[3].id) == samples[3] == inputs.find(samples, "3")
    with pytest.raises(DataError, match=r"no row has the id '20'.*below 20; ids are like 'q0'"):
        inputs.find(samples, "20")
