"""The choice of a token, against the processors of Hugging Face transformers."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medmoe_jax import sampling
from medmoe_jax.config import ConfigError
from medmoe_jax.sampling import Sampling

ROWS, VOCAB = 4, 37

choose = jax.jit(sampling.choose, static_argnames="draw")
restricted = jax.jit(sampling.restricted)
penalised = jax.jit(sampling.penalised)


@pytest.fixture(scope="module")
def scores() -> np.ndarray:
    """f32[ROWS, VOCAB], flat, ordinary and peaked rows."""
    rng = np.random.default_rng(0)
    spread = np.array([[0.1], [1.0], [4.0], [30.0]])
    return (spread * rng.standard_normal((ROWS, VOCAB))).astype(np.float32)


def test_repetition_penalty(scores: np.ndarray) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    ids = np.random.default_rng(1).integers(0, VOCAB, (ROWS, 12))
    used = np.zeros((ROWS, VOCAB), bool)
    used[np.arange(ROWS)[:, None], ids] = True
    for penalty in (0.5, 1.0, 1.3, 4.0):
        processor = transformers.RepetitionPenaltyLogitsProcessor(penalty)
        want = processor(torch.tensor(ids), torch.tensor(scores.copy())).numpy()
        got = penalised(scores, used, jnp.float32(penalty))
        np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_top_k_and_top_p(scores: np.ndarray, temperature: float) -> None:
    """All three in their usual order; a tiny top_p leaves one token, a top_k above V all."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    for top_k in (0, 1, 5, VOCAB - 1, VOCAB, VOCAB + 9):
        for top_p in (1e-6, 0.3, 0.9, 0.999, 1.0):
            want = torch.tensor(scores / np.float32(temperature))
            if top_k:
                want = transformers.TopKLogitsWarper(top_k)(torch.zeros(0), want)
            if top_p < 1:
                want = transformers.TopPLogitsWarper(top_p)(torch.zeros(0), want)
            got = restricted(scores / np.float32(temperature), jnp.int32(top_k), jnp.float32(top_p))
            np.testing.assert_allclose(got, want.numpy(), rtol=1e-6, err_msg=f"{top_k} {top_p}")
            assert (got > -np.inf).any(-1).all()


def test_ties() -> None:
    """Tokens as likely as the last one that is kept stay."""
    scores = jnp.log(jnp.array([[0.3, 0.2, 0.2, 0.2, 0.1]]))
    for top_k, top_p, kept in ((2, 1.0, 4), (1, 1.0, 1), (0, 0.4, 4), (0, 0.25, 1), (0, 0.95, 5)):
        got = restricted(scores, jnp.int32(top_k), jnp.float32(top_p))
        assert np.isfinite(got).sum() == kept, (top_k, top_p)
    equal = restricted(jnp.zeros((1, 6)), jnp.int32(3), jnp.float32(0.1))
    assert np.isfinite(equal).all()


def knobs(how: Sampling, rows: int) -> sampling.Knobs:
    return sampling.knobs(how, range(rows))


def test_draws_follow_the_distribution() -> None:
    """Frequencies over 4000 rows, each with its own seed, are those of the restricted softmax."""
    rows = 4000
    scores = np.log(np.array([0.4, 0.3, 0.15, 0.1, 0.05]), dtype=np.float32)
    wide = jnp.broadcast_to(jnp.asarray(scores), (rows, 5))
    for how, shares in (
        (Sampling(temperature=1.0), np.exp(scores)),
        (Sampling(temperature=2.0), np.exp(scores / 2)),
        (Sampling(temperature=1.0, top_k=2), np.array([0.4, 0.3, 0, 0, 0])),
        (Sampling(temperature=1.0, top_p=0.75), np.array([0.4, 0.3, 0.15, 0, 0])),
    ):
        shares = shares / shares.sum()
        for step in (0, 7):
            ids = choose(wide, knobs(how, rows), jnp.int32(step), None, draw=True)
            found = np.bincount(ids, minlength=5) / rows
            # Four standard deviations of a frequency.
            assert (abs(found - shares) <= 4 * np.sqrt(shares / rows)).all(), (how, found)


def test_a_row_draws_by_its_own_seed(scores: np.ndarray) -> None:
    how = Sampling(temperature=1.0, seed=5)
    flat = jnp.zeros((64, VOCAB))

    def drawn(logits: Any, seeds: Any, step: int = 0, how: Sampling = how) -> list[int]:
        got = choose(logits, sampling.knobs(how, seeds), jnp.int32(step), None, draw=True)
        return got.tolist()

    together = drawn(flat, range(64))
    assert together == drawn(flat, range(64))
    assert len(set(together)) > 20
    assert drawn(flat, range(63, -1, -1)) == together[::-1]
    assert drawn(flat[:3], [9, 0, 41]) == [together[9], together[0], together[41]]
    assert drawn(flat, range(64), step=1) != together
    assert drawn(flat, range(64), how=Sampling(temperature=1.0, seed=6)) != together
    assert drawn(flat[:2], [2**32 + 1, 1])[0] == together[1]
    assert drawn(scores, [0] * ROWS, how=Sampling(temperature=1e-30)) == scores.argmax(-1).tolist()
    tiny = Sampling(temperature=1e-60)  # zero in float32
    assert drawn(scores, [0] * ROWS, how=tiny) == scores.argmax(-1).tolist()


def test_greedy_takes_the_first_of_the_likeliest(scores: np.ndarray) -> None:
    settings = knobs(Sampling(repetition_penalty=3.0), ROWS)
    got = choose(scores, settings, jnp.int32(0), None, draw=False)
    assert got.tolist() == scores.argmax(-1).tolist() and got.dtype == jnp.int32
    tied = jnp.array([[0.0, 2.0, 2.0], [1.0, 1.0, 0.0]])
    two = knobs(Sampling(), 2)
    assert choose(tied, two, jnp.int32(0), None, draw=False).tolist() == [1, 0]
    used = np.zeros((ROWS, VOCAB), bool)
    used[np.arange(ROWS), scores.argmax(-1)] = True
    punished = choose(scores, settings, jnp.int32(0), used, draw=False)
    want = np.where(used, np.where(scores > 0, scores / 3, scores * 3), scores).argmax(-1)
    assert punished.tolist() == want.tolist() and punished.tolist() != got.tolist()


def test_no_value_needs_a_program_of_its_own(scores: np.ndarray) -> None:
    traces = []

    @jax.jit
    def counted(logits: Any, settings: Any, step: Any) -> Any:
        traces.append(1)
        return sampling.choose(logits, settings, step, None, True)

    for how in (Sampling(temperature=0.5), Sampling(temperature=1.5, top_k=3, top_p=0.5, seed=8)):
        for step in range(3):
            counted(scores, knobs(how, ROWS), jnp.int32(step))
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1, must be 0 or more"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"beams": 0}, "beams"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"stop": ("x", "")}, "stop"),
        ({"beams": 2, "temperature": 1.0}, "does not draw"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling(**settings)
