"""Several samples in a row: the model, the losses and a training step see what they saw before."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models
from flax.traverse_util import flatten_dict
from jax.flatten_util import ravel_pytree

from medmoe_jax import losses, optim, step
from medmoe_jax.config import ModelConfig, MoeConfig, OptimConfig, RunConfig
from medmoe_jax.data import merge

pytestmark = pytest.mark.usefixtures("quick_compile")

IMAGES = (1, 0, 2, 1, 2, 0, 3)  # of each sample
PLACES = ((2, 0, 1), (6,), (3, 4, 5))  # the samples of each packed row
TOP1 = MoeConfig(experts=3, top_k=1, aux_coef=0.1)
TOP2 = MoeConfig(experts=3, top_k=2, aux_coef=0.1)


def samples(cfg: ModelConfig) -> tuple[list[merge.Merged], list[np.ndarray], np.ndarray]:
    """Text, images and modality of each sample; some learn from their first place on."""
    rng = np.random.default_rng(0)
    texts, pictures = [], []
    edge = cfg.vision.image_size
    for number, count in enumerate(IMAGES):
        ids = rng.integers(1, cfg.llm.vocab, 5 + number + count)
        ids[1 + rng.permutation(len(ids) - 1)[:count]] = -200
        labels = np.where((ids > 0) & (rng.random(len(ids)) < 0.7), ids, -100)
        labels[0] = ids[0]
        texts.append(merge.expand(ids.tolist(), labels.tolist(), cfg.vision.patches))
        pictures.append(rng.standard_normal((count, edge, edge, 3)).astype(np.float32))
    return texts, pictures, np.array([0, 1, -1, 2, 0, 1, 2], np.int32)


def batches(cfg: ModelConfig) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The same samples, one a row and packed."""
    texts, pictures, modality = samples(cfg)
    edge = cfg.vision.image_size

    def images(rows: list[list[np.ndarray]]) -> np.ndarray:
        joined = [np.concatenate(row) for row in rows]
        made = np.zeros((len(rows), max(map(len, joined)), edge, edge, 3), np.float32)
        for row, pixels in zip(made, joined, strict=True):
            row[: len(pixels)] = pixels
        return made

    apart = merge.pad_rows(texts, max(len(text.tokens) for text in texts))
    apart |= {"images": images([[p] for p in pictures]), "modality": modality}
    rows = [[texts[i] for i in row] for row in PLACES]
    packed = merge.pack_rows(rows, max(sum(len(t.tokens) for t in row) for row in rows) + 3)
    packed["images"] = images([[pictures[i] for i in row] for row in PLACES])
    packed["modality"] = np.full((len(PLACES), 4), -1, np.int32)
    for row, those in zip(packed["modality"], PLACES, strict=True):
        row[: len(those)] = modality[list(those)]
    return apart, packed


def run_config(cfg: ModelConfig, **changes: Any) -> RunConfig:
    base = RunConfig(
        model=cfg,
        train=("llm/(?!moe/router).*", "projector/.*"),
        compute_dtype="float32",
        frozen_dtype="float32",
        remat="none",
        loss_chunk=7,
        optim=OptimConfig(lr=1e-3, schedule="constant", warmup=0.0, batch_size=1),
    )
    return dataclasses.replace(base, **changes)


@pytest.mark.parametrize(
    ("family", "moe"),
    [("phi", None), ("stablelm", None), ("phi", TOP1), ("stablelm", TOP2)],
)
def test_loss_and_gradients_are_those_of_samples_apart(family: str, moe: MoeConfig | None) -> None:
    cfg = small_models.config(family, moe, layers=2)
    run = run_config(cfg)
    flat = {k: jnp.asarray(v) for k, v in flatten_dict(small_models.params(cfg), sep="/").items()}

    @jax.jit
    def loss(flat: Any, batch: Any) -> Any:
        found = step.forward_loss(run, cfg, flat, batch)
        return (found.rows.sum() / found.counts.sum() + 0.1 * found.aux), found

    both = [jax.value_and_grad(loss, has_aux=True)(flat, batch) for batch in batches(cfg)]
    ((value, apart), gradient), ((other, packed), gradients) = both
    assert int(apart.counts.sum()) == int(packed.counts.sum()) > 20
    for row, those in zip(packed.rows, PLACES, strict=True):
        np.testing.assert_allclose(row, apart.rows[jnp.asarray(those)].sum(), rtol=1e-5)
    np.testing.assert_allclose(other, value, rtol=1e-5)
    np.testing.assert_allclose(packed.aux, apart.aux, rtol=1e-5)
    for path in gradient:
        np.testing.assert_allclose(gradients[path], gradient[path], atol=1e-5, err_msg=path)


def test_one_step_gives_the_same_weights() -> None:
    cfg = small_models.config("phi", TOP2, layers=2)
    run = run_config(cfg)
    # The key's bias moves every score of a query alike: its gradient is rounding, which a small eps
    # would blow up.
    run.optim = dataclasses.replace(run.optim, clip_norm=1.0, eps=1e-3)
    after = []
    for batch in batches(cfg):
        flat = {k: jnp.array(v) for k, v in flatten_dict(small_models.params(cfg), sep="/").items()}
        train, frozen = optim.split(flat, label := optim.labels(list(flat), run.train))
        tx = optim.make(run.optim, 10, label)
        state = step.State(jnp.zeros((), jnp.int32), train, tx.init(train | frozen))
        state, metrics = step.make_step(run, cfg, tx)(state, frozen, batch)
        after.append((metrics["loss"], metrics["grad_norm"], ravel_pytree(state.train)[0]))
    for one, two in zip(*after, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)


@pytest.mark.parametrize("level", ["token", "sample"])
def test_router_learns_from_each_sample(level: str) -> None:
    cfg = small_models.config("phi", layers=2)
    run = run_config(dataclasses.replace(cfg, moe=TOP1), objective="router", router_level=level)
    params = small_models.params(cfg)
    rng = np.random.default_rng(1)
    params["router"] = {
        "fc1": {
            "kernel": rng.standard_normal((cfg.llm.width, 3)).astype(np.float32),
            "bias": np.zeros(3, np.float32),
        }
    }
    flat = {k: jnp.asarray(v) for k, v in flatten_dict(params, sep="/").items()}
    loss = jax.jit(lambda batch: step.forward_loss(run, cfg, flat, batch))
    apart, packed = (loss(batch) for batch in batches(cfg))
    for row, count, those in zip(packed.rows, packed.counts, PLACES, strict=True):
        np.testing.assert_allclose(row, apart.rows[jnp.asarray(those)].sum(), rtol=1e-5)
        assert int(count) == int(apart.counts[jnp.asarray(those)].sum())
    assert int(apart.counts[2]) == 0  # it has no label


def test_end_of_a_sample_learns_nothing_of_the_next() -> None:
    first = merge.expand([5, 6], [5, 6], 4)
    second = merge.expand([7, -200, 8], [7, -100, 8], 4)
    batch = merge.pack_rows([[first, second], [], [second, second]], 15)
    assert losses.shifted(jnp.asarray(batch["labels"])).tolist() == [
        [6, -100, *[-100] * 4, 8, *[-100] * 8],
        [-100] * 15,
        [-100] * 4 + [8] + [-100] * 5 + [8] + [-100] * 4,
    ]
    assert second.labels[0] == 7  # what was given is as it was
    assert batch["segments"].tolist() == [
        [1] * 2 + [2] * 6 + [0] * 7,
        [0] * 15,
        [1] * 6 + [2] * 6 + [0] * 3,
    ]
    assert batch["positions"].tolist() == [
        [0, 1, *range(13)],
        [*range(15)],
        [*range(6), *range(9)],
    ]
    assert batch["image_pos"].tolist() == [
        [-1] * 3 + [0, 1, 2, 3] + [-1] * 8,
        [-1] * 15,
        [-1, 0, 1, 2, 3, -1, -1, 4, 5, 6, 7] + [-1] * 4,
    ]
