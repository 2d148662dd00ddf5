"""Greedy decoding: the cache, padding on the left and the end of an answer change nothing."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models

from medmoe_jax import generate
from medmoe_jax.config import MoeConfig
from medmoe_jax.models import medmoe

pytestmark = pytest.mark.usefixtures("quick_compile")

CFG = small_models.config("stablelm", MoeConfig(experts=3, top_k=2), layers=4)
NEW = 5


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    """Random parameters of CFG."""
    return small_models.params(CFG, seed=1)


@pytest.fixture(scope="module")
def batch() -> dict[str, np.ndarray]:
    """Prompts of unlike length with one, no and two images, and a row of padding."""
    batch = small_models.batch(CFG, (1, 0, 2))
    arrays = {k: batch[k] for k in small_models.ON_DEVICE}
    return {k: np.concatenate([v, np.zeros_like(v[:1])]) for k, v in arrays.items()}


def greedy(params: Any, batch: Any, eos: int = -1, keep_logits: bool = True) -> generate.Generated:
    left = generate.left_padded(batch)
    stop, dtype = jnp.int32(eos), jnp.float32
    done = generate.greedy(
        params, CFG, left, stop, max_new=NEW, dtype=dtype, keep_logits=keep_logits
    )
    return jax.device_get(done)


@pytest.fixture(scope="module")
def answers(params: Any, batch: Any) -> generate.Generated:
    """Free generation."""
    return greedy(params, batch)


def test_padding_moves_to_the_left(batch: Any) -> None:
    left = generate.left_padded(batch)
    assert left["images"] is batch["images"]
    for row in range(4):
        size = int(batch["mask"][row].sum())
        assert not left["mask"][row, : len(left["mask"][row]) - size].any()
        for key in ("tokens", "image_pos"):
            moved = left[key][row, len(left[key][row]) - size :]
            assert moved.tolist() == batch[key][row, :size].tolist()


def test_cache_equals_the_full_forward(params: Any, batch: Any, answers: Any) -> None:
    """The scores of every step are those of the whole sequence at once, without padding between."""
    sizes = batch["mask"].sum(1)
    longer = {k: np.pad(batch[k], ((0, 0), (0, NEW))) for k in ("tokens", "mask", "image_pos")}
    for row, size in enumerate(sizes):
        longer["tokens"][row, size : size + NEW] = answers.ids[row]
        longer["image_pos"][row, size:] = -1
        longer["mask"][row, size : size + NEW] = size > 0

    @jax.jit
    def logits(p: Any, batch: Any) -> Any:
        return medmoe.logits(p, medmoe.forward(p, CFG, batch)[0])

    scores = np.asarray(logits(params, longer | {"images": batch["images"]}))
    for row, size in enumerate(sizes[:3]):
        want = scores[row, size - 1 : size - 1 + NEW]
        np.testing.assert_allclose(answers.step_logits[row], want, atol=1e-4)
        assert answers.ids[row].tolist() == want.argmax(-1).tolist()
        shares = want - np.log(np.exp(want).sum(-1, keepdims=True))
        assert answers.log_probs[row] == pytest.approx(shares.max(-1).sum(), abs=1e-4)
        np.testing.assert_allclose(answers.first_logits[row], want[0], atol=1e-4)
    assert answers.lengths.tolist() == [NEW, NEW, NEW, 0]
    assert not answers.ids[3].any() and answers.log_probs[3] == 0


def test_a_row_alone_gets_the_same_answer(params: Any, batch: Any, answers: Any) -> None:
    size = int(batch["mask"][0].sum())
    row = {k: batch[k][:1, :size] for k in ("tokens", "mask", "image_pos")}
    alone = greedy(params, row | {"images": batch["images"][:1, :1]})
    assert alone.ids[0].tolist() == answers.ids[0].tolist()
    np.testing.assert_allclose(alone.step_logits[0], answers.step_logits[0], atol=1e-4)
    # text alone needs no images at all
    size = int(batch["mask"][1].sum())
    text = greedy(params, {k: batch[k][1:2, :size] for k in ("tokens", "mask", "image_pos")})
    assert text.ids[0].tolist() == answers.ids[1].tolist()


def test_end_of_an_answer(params: Any, batch: Any, answers: Any) -> None:
    """The id that ends an answer is part of it; behind it are zeros; other rows go on."""
    first = answers.ids[0].tolist()
    stop = first[2]
    length = first.index(stop) + 1
    ended = greedy(params, batch, stop)
    assert ended.ids[0].tolist() == first[:length] + [0] * (NEW - length)
    for row in (0, 1, 2):
        ids = answers.ids[row].tolist()
        length = ids.index(stop) + 1 if stop in ids else NEW
        assert ended.lengths[row] == length
        assert ended.ids[row, :length].tolist() == ids[:length]
    assert ended.log_probs[0] > answers.log_probs[0]
