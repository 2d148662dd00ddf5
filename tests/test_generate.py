"""Generation on the device: the cache, padding, the end of an answer and the number of programs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models

from medmoe_jax import generate, sampling
from medmoe_jax.config import MoeConfig
from medmoe_jax.models import decoder, medmoe

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


def greedy(params: Any, batch: Any, eos: int = -1, every: int = NEW) -> generate.Answers:
    """Greedy answers to a right-padded batch, looked at after every `every` ids."""
    ready, left = generate.for_generation(params, CFG), generate.left_padded(batch)
    state, _ = generate.read(ready, CFG, left, dtype=jnp.float32, room=every)
    settings = sampling.knobs(sampling.Sampling(), [0] * len(left["tokens"]))
    *_, (_, done) = generate.answers(
        ready,
        CFG,
        state,
        jnp.int32(eos),
        settings,
        max_new=NEW,
        every=every,
        dtype=jnp.float32,
        keep_logits=True,
    )
    return jax.device_get(done)


@pytest.fixture(scope="module")
def answers(params: Any, batch: Any) -> generate.Answers:
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
        longer["tokens"][row, size : size + NEW] = answers.ids[row, :NEW]
        longer["image_pos"][row, size:] = -1
        longer["mask"][row, size : size + NEW] = size > 0

    @jax.jit
    def logits(p: Any, batch: Any) -> Any:
        return medmoe.logits(p, medmoe.forward(p, CFG, batch)[0])

    scores = np.asarray(logits(params, longer | {"images": batch["images"]}))
    for row, size in enumerate(sizes[:3]):
        want = scores[row, size - 1 : size - 1 + NEW]
        np.testing.assert_allclose(answers.step_logits[row, :NEW], want, atol=1e-4)
        assert answers.ids[row, :NEW].tolist() == want.argmax(-1).tolist()
        shares = want - np.log(np.exp(want).sum(-1, keepdims=True))
        np.testing.assert_allclose(answers.log_probs[row, :NEW], shares.max(-1), atol=1e-4)
    assert answers.lengths.tolist() == [NEW, NEW, NEW, 0]
    assert not answers.ids[3].any() and not answers.log_probs[3].any()


def test_a_row_alone_gets_the_same_answer(params: Any, batch: Any, answers: Any) -> None:
    size = int(batch["mask"][0].sum())
    row = {k: batch[k][:1, :size] for k in ("tokens", "mask", "image_pos")}
    alone = greedy(params, row | {"images": batch["images"][:1, :1]})
    assert alone.ids[0].tolist() == answers.ids[0].tolist()
    assert alone.step_logits is not None
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
    assert ended.ids[0].tolist() == first[:length] + [0] * (len(first) - length)
    for row in (0, 1, 2):
        ids = answers.ids[row].tolist()
        length = ids.index(stop) + 1 if stop in ids[:NEW] else NEW
        assert ended.lengths[row] == length
        assert ended.ids[row, :length].tolist() == ids[:length]
    assert ended.log_probs[0].sum() > answers.log_probs[0].sum()


def left(batch: dict[str, np.ndarray], rows: slice = slice(None)) -> dict[str, np.ndarray]:
    """Some rows, padded on the left."""
    return generate.left_padded({k: v[rows] for k, v in batch.items()})


def test_looking_often_changes_nothing(params: Any, batch: Any, answers: Any) -> None:
    """Also where the cache must grow in between, by many places."""
    often = greedy(params, batch, every=1)
    assert often.ids.tolist() == answers.ids.tolist()
    assert often.step_logits is not None
    np.testing.assert_allclose(often.step_logits, answers.step_logits, atol=1e-4)
    ready = generate.for_generation(params, CFG)
    state, _ = generate.read(ready, CFG, left(batch), dtype=jnp.float32, room=1)
    size = state.seen.shape[1]
    free = size - int(state.end)
    assert generate.with_room(state, free) is state
    wide = generate.with_room(state, free + 100)
    assert wide.seen.shape[1] >= size + 100
    assert all(c.shape[2] == wide.seen.shape[1] for c in jax.tree.leaves(wide.cache))
    wide = generate.extend(ready, CFG, wide, left(batch), jnp.float32)[0]
    narrow = generate.extend(
        ready,
        CFG,
        generate.with_room(
            generate.read(ready, CFG, left(batch), dtype=jnp.float32, room=1)[0],
            batch["mask"].shape[1],
        ),
        left(batch),
        jnp.float32,
    )[0]
    np.testing.assert_allclose(wide.logits[:3], narrow.logits[:3], atol=1e-4)


def test_prompts_in_pieces(params: Any, batch: Any) -> None:
    """A prompt read in two pieces, and one read again after a rewind, give the scores of the whole
    one; a piece may be shorter than another row's, or empty."""
    ready = generate.for_generation(params, CFG)
    whole, _ = generate.read(ready, CFG, left(batch), dtype=jnp.float32, room=1)
    sizes, length = batch["mask"].sum(1), batch["mask"].shape[1]
    texts = (batch["image_pos"] >= 0).argmax(1) + (batch["image_pos"] >= 0).sum(1)
    cuts = np.where(sizes > 0, np.maximum(texts, 2), 0)  # behind the first images
    assert (cuts <= sizes).all() and (cuts[:3] < sizes[:3]).any()
    pieces = []
    for begin, end in ((0 * cuts, cuts), (cuts, sizes)):
        piece = {k: np.zeros_like(batch[k]) for k in ("tokens", "image_pos", "mask")}
        piece["image_pos"] -= 1
        for row in range(4):
            for k in piece:
                part = batch[k][row, begin[row] : end[row]]
                piece[k][row, : len(part)] = part
        pieces.append(generate.left_padded(piece | {"images": batch["images"]}))
    state, _ = generate.read(ready, CFG, pieces[0], dtype=jnp.float32, room=3 * length)
    state, _ = generate.extend(ready, CFG, state, pieces[1], jnp.float32)
    rows = sizes > cuts
    np.testing.assert_allclose(state.logits[rows], whole.logits[rows], atol=1e-4)
    assert state.count.tolist() == sizes.tolist()
    # Nonsense for every row, forgotten again; then a real token, the same for both.
    extra = {
        "tokens": np.full((4, 5), 7, np.int32),
        "image_pos": np.full((4, 5), -1, np.int32),
        "mask": np.ones((4, 5), bool),
    }
    state, _ = generate.extend(ready, CFG, state, extra, jnp.float32)
    state = generate.rewind(state, jnp.int32(5))
    assert state.count.tolist() == sizes.tolist()
    one = {k: v[:, :1] for k, v in extra.items()}
    again, _ = generate.extend(ready, CFG, state, one, jnp.float32)
    straight, _ = generate.extend(ready, CFG, generate.with_room(whole, 1), one, jnp.float32)
    np.testing.assert_allclose(again.logits[rows], straight.logits[rows], atol=1e-4)
    assert again.count.tolist() == straight.count.tolist()


def test_score_is_the_full_forward(params: Any, batch: Any) -> None:
    """Sums of log-probabilities of given continuations, of unlike length, none in one row."""
    ready = generate.for_generation(params, CFG)
    state, _ = generate.read(ready, CFG, left(batch), dtype=jnp.float32, room=4)
    rng = np.random.default_rng(2)
    lengths, sizes = (4, 0, 2, 3), batch["mask"].sum(1)
    later = {
        "tokens": rng.integers(1, CFG.llm.vocab, (4, 4)).astype(np.int32),
        "image_pos": np.full((4, 4), -1, np.int32),
        "mask": np.arange(4)[None] < np.array(lengths)[:, None],
    }
    sums, counts = generate.score(ready, CFG, state, later, jnp.float32)
    assert counts.tolist() == list(lengths) and sums[1] == 0
    again, _ = generate.score(ready, CFG, state, later, jnp.float32)
    assert again.tolist() == sums.tolist()
    longer: dict[str, Any] = {
        k: np.pad(batch[k], ((0, 0), (0, 4))) for k in ("tokens", "mask", "image_pos")
    }
    for row in (0, 2):
        here = slice(sizes[row], sizes[row] + lengths[row])
        longer["tokens"][row, here] = later["tokens"][row, : lengths[row]]
        longer["image_pos"][row, here] = -1
        longer["mask"][row, here] = True
    hidden, _ = medmoe.forward(params, CFG, longer | {"images": batch["images"]})
    shares = jax.nn.log_softmax(medmoe.logits(params, hidden))
    for row in (0, 2):
        places = np.arange(sizes[row] - 1, sizes[row] - 1 + lengths[row])
        want = shares[row, places, later["tokens"][row, : lengths[row]]].sum()
        np.testing.assert_allclose(sums[row], want, atol=1e-4)


@pytest.mark.parametrize("n", [1, 31, 32, 33, 255, 256, 257, 288, 320, 321, 1000, 1024, 5000])
def test_sizes(n: int) -> None:
    """Large enough, not much too large, and sizes of their own."""
    size = generate.bucket(n)
    assert n <= size <= max(n + 31, 1.25 * n)
    assert generate.bucket(size) == size


def test_few_sizes() -> None:
    assert len({generate.bucket(n) for n in range(1, 2049)}) <= 21


def test_one_program_for_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts and answers of any length within the sizes, other knobs and other ends compile
    nothing; a larger prompt compiles one prefill and one decoding loop."""
    cfg = small_models.config("phi", layers=1, kv_heads=4)  # no other test's programs
    ready = generate.for_generation(small_models.params(cfg), cfg)
    traced: list[tuple[int, int]] = []
    real = decoder.decode

    def counting(p: Any, cfg: Any, x: Any, ctx: Any, cache: Any) -> Any:
        traced.append((x.shape[1], cache[0]["k"].shape[2]))
        return real(p, cfg, x, ctx, cache)

    monkeypatch.setattr(decoder, "decode", counting)

    def ask(length: int, eos: int, how: sampling.Sampling, draw: bool = False) -> None:
        rows = small_models.batch(cfg, (0, 0), text=length - 1, length=generate.bucket(length))
        batch = {k: rows[k] for k in ("tokens", "image_pos", "mask")}
        state, _ = generate.read(
            ready, cfg, generate.left_padded(batch), dtype=jnp.float32, room=how.max_new_tokens
        )
        settings = sampling.knobs(how, range(2))
        *_, (_, found) = generate.answers(
            ready,
            cfg,
            state,
            jnp.int32(eos),
            settings,
            max_new=how.max_new_tokens,
            every=3,
            dtype=jnp.float32,
            draw=draw,
        )
        assert found.lengths.max() <= how.max_new_tokens

    for length, eos, new in ((5, -1, 7), (9, 3, 9), (30, 1, 20), (32, -1, 12)):
        ask(length, eos, sampling.Sampling(max_new_tokens=new))
    assert traced == [(32, 64), (1, 64)]
    for length in (33, 50):
        ask(length, -1, sampling.Sampling(max_new_tokens=8))
    assert traced[2:] == [(64, 96), (1, 96)]
    for temperature, top_k in ((0.5, 0), (1.5, 4)):
        how = sampling.Sampling(temperature=temperature, top_k=top_k, max_new_tokens=10)
        ask(20, 2, how, draw=True)
    assert traced[4:] == [(1, 64)]  # drawing is a loop of its own; the prefill was there
