"""Generation on the device: a running batch with its KV cache, extended by prompts and by answers.

Rows of a batch write the same place of the cache in a step, so prompts end at the same place
(padding is on the left); positions count real tokens only, and padding is never looked at. A row
therefore gets what it gets alone. All shapes are static: one program for each length of prompt,
size of cache and number of rows. Above it: `model.py`.

On a mesh (`jax.set_mesh`) the cache lies with the rows over `data` and with the heads over the
other axes; what the host reads is on every device, so that every process can.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from medmoe_jax import losses, sharding
from medmoe_jax.config import ModelConfig
from medmoe_jax.models import decoder, medmoe
from medmoe_jax.models.layers import Array, Params
from medmoe_jax.sampling import Knobs, choose


class State(NamedTuple):
    """Conversations so far."""

    cache: decoder.Cache  # S places for each layer
    seen: Array  # bool[B, S]: places that hold a real token
    count: Array  # i32[B]: number of real tokens, the next position
    end: Array  # i32[]: next free place, the same for all rows
    logits: Array  # f32[B, V]: scores of the next token
    used: Array | None  # bool[B, V]: ids of the text so far, for the repetition penalty


class Answers(NamedTuple):
    """Answers in progress. The last id of a row is not in the cache yet."""

    ids: Array  # i32[B, N]: the end included, 0 behind it
    log_probs: Array  # f32[B, N]: of each id, by the model's own scores
    lengths: Array  # i32[B]: number of ids
    step: Array  # i32[]: ids of the longest row
    done: Array  # bool[B]
    step_logits: Array | None  # f32[B, N, V]: the scores each id was chosen by, if asked for


def left_padded(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A right-padded batch with its padding moved to the left (host arrays; images stay as they
    are).
    """
    t = batch["mask"].shape[1]
    shift = t - batch["mask"].sum(-1)
    index = (np.arange(t)[None] - shift[:, None]) % t
    moved = {
        k: np.take_along_axis(batch[k], index, axis=1) for k in ("tokens", "image_pos", "mask")
    }
    return moved | ({"images": batch["images"]} if "images" in batch else {})


def for_generation(p: Params, cfg: ModelConfig, ways: int = 1) -> Params:
    """All parameters with the language model unstacked (see `decoder.unstack`), as every function
    here takes them."""
    return {**p, "llm": decoder.unstack(p["llm"], cfg, ways)}


def laid_out(state: State, place: Callable[..., Any] = sharding.constrain) -> State:
    """The state as it lies on a mesh: `place` puts an array where its axes are split over the given
    ones of the mesh. The default is for compiled functions."""
    return State(
        jax.tree.map(lambda a: place(a, "data", sharding.BOTH), state.cache),
        place(state.seen),
        place(state.count),
        place(state.end),
        place(state.logits, "data", sharding.BOTH),
        None if state.used is None else place(state.used),
    )


@partial(jax.jit, static_argnames=("cfg", "rows", "size", "dtype", "penalised"))
def empty(cfg: ModelConfig, rows: int, size: int, dtype: Any, penalised: bool = False) -> State:
    """Nothing said yet; a cache with `size` places."""
    return laid_out(
        State(
            decoder.empty_cache(cfg, rows, size, dtype),
            jnp.zeros((rows, size), bool),
            jnp.zeros(rows, jnp.int32),
            jnp.zeros((), jnp.int32),
            jnp.zeros((rows, cfg.llm.vocab), jnp.float32),
            jnp.zeros((rows, cfg.llm.vocab), bool) if penalised else None,
        )
    )


@partial(jax.jit, static_argnames=("size",))
def grow(state: State, size: int) -> State:
    """The same conversations with `size` places in the cache, no fewer than before."""
    more = size - state.seen.shape[1]
    return state._replace(
        cache=jax.tree.map(lambda a: jnp.pad(a, ((0, 0), (0, 0), (0, more), (0, 0))), state.cache),
        seen=jnp.pad(state.seen, ((0, 0), (0, more))),
    )


@jax.jit
def rewind(state: State, places: Array) -> State:
    """The conversations without the last `places` (i32[]) places, which must all have been real
    tokens; the scores of the next token are not those any more."""
    end = state.end - places
    kept = state.seen & (jnp.arange(state.seen.shape[1]) < end)[None]
    return state._replace(seen=kept, count=state.count - places, end=end)


@partial(jax.jit, static_argnames=("times",))
def repeat(state: State, times: int) -> State:
    """Every row `times` times in a row."""
    rows = jax.tree.map(lambda a: jnp.repeat(a, times, 0), state._replace(end=None))
    return laid_out(rows._replace(end=state.end))


def _run(
    p: Params,
    cfg: ModelConfig,
    state: State,
    x: Array,
    valid: Array,
    *,
    fresh: bool = False,
    last_only: bool = False,
) -> tuple[Array, State, dict[str, Any]]:
    """Embeddings [B, T, D] behind what was said (nothing, if `fresh`): hidden states (of the last
    token at least), the state without new scores, and the decoder's reports."""
    t, size = x.shape[1], state.seen.shape[1]
    seen = jax.lax.dynamic_update_slice(state.seen, valid, (0, state.end))
    reach = jnp.arange(size)[None, :] <= state.end + jnp.arange(t)[:, None]
    ctx = decoder.Context(
        positions=state.count[:, None] + jnp.maximum(jnp.cumsum(valid, -1) - 1, 0),
        segments=valid.astype(jnp.int32),
        counted=valid,
        mask=None if fresh else (seen[:, None] & reach[None])[:, None],
        write_at=state.end,
        last_only=last_only,
    )
    hidden, reports = decoder.decode(p["llm"], cfg, x, ctx, state.cache)
    state = state._replace(
        cache=reports["cache"], seen=seen, count=state.count + valid.sum(-1), end=state.end + t
    )
    return hidden, laid_out(state), reports


def _embed(p: Params, cfg: ModelConfig, batch: dict[str, Any], dtype: Any) -> Array:
    images = batch.get("images")
    image = None if images is None else medmoe.image_tokens(p, cfg, images, dtype)
    return medmoe.merge(p, batch["tokens"], batch["image_pos"], batch["mask"], image, dtype)


@partial(jax.jit, static_argnames=("cfg", "dtype", "fresh"), donate_argnames=("state",))
def extend(
    p: Params,
    cfg: ModelConfig,
    state: State,
    batch: dict[str, Any],
    dtype: Any,
    fresh: bool = False,
) -> tuple[State, Array | None]:
    """Reads prompts behind what was said.

    Args:
      p: from `for_generation`.
      cfg: shapes.
      state: with T free places in its cache at least; it is used up.
      batch: as for `models.medmoe.forward`, but padded on the left (`left_padded`).
      dtype: of the computation.
      fresh: nothing was said yet (`empty`); the prompts then look at themselves only.

    Returns:
      The state with the scores of the next token, and the router's modality posterior of these
      tokens, f32[B, E] (None in a dense model).
    """
    valid = batch["mask"]
    x = _embed(p, cfg, batch, dtype)
    hidden, state, reports = _run(p, cfg, state, x, valid, fresh=fresh, last_only=True)
    used = state.used
    if used is not None:
        words = valid & (batch["image_pos"] < 0)
        used = used.at[jnp.arange(len(used))[:, None], batch["tokens"]].max(words)
    state = state._replace(logits=medmoe.logits(p, hidden[:, -1]), used=used)
    routed = reports.get("router_logits")
    posterior = None if routed is None else sharding.constrain(losses.posterior(routed, valid))
    return laid_out(state), posterior


def follow(
    p: Params, cfg: ModelConfig, state: State, token: Array, valid: Array, dtype: Any
) -> State:
    """The state behind one more token of each row, i32[B]; rows that are not valid (bool[B]) keep
    what they know. Part of a jitted loop."""
    x = p["llm"]["embed"]["embedding"][token][:, None].astype(dtype)
    hidden, state, _ = _run(p, cfg, state, x, valid[:, None])
    return state._replace(logits=medmoe.logits(p, hidden[:, -1]))


@partial(jax.jit, static_argnames=("cfg", "dtype"))
def score(
    p: Params, cfg: ModelConfig, state: State, batch: dict[str, Any], dtype: Any
) -> tuple[Array, Array]:
    """Log-likelihood of given continuations of the conversations.

    Args:
      p: as for `extend`, like `cfg` and `dtype`.
      cfg: shapes.
      state: with T free places in its cache at least; it can be used again.
      batch: tokens i32[B, T], image_pos i32[B, T] (-1), mask bool[B, T], padded on the right.
      dtype: of the computation.

    Returns:
      f32[B] sums over a row's tokens, and i32[B] their number.
    """
    hidden, _, _ = _run(p, cfg, state, _embed(p, cfg, batch, dtype), batch["mask"])
    later = medmoe.logits(p, hidden[:, :-1])
    scores = jnp.concatenate([state.logits[:, None], later], 1)
    targets = jnp.where(batch["mask"], batch["tokens"], losses.IGNORE)
    loss, counted = losses.cross_entropy(scores, targets)
    return sharding.constrain(-loss.sum(-1)), sharding.constrain(counted.sum(-1))


def _record(
    state: State, answers: Answers, eos: Array, knobs: Knobs, draw: bool
) -> tuple[State, Answers]:
    """Chooses the next token of every row that is not done and writes it down."""
    i, rows = answers.step, jnp.arange(len(answers.done))
    token = choose(state.logits, knobs, i, state.used, draw)
    log_prob = jax.nn.log_softmax(state.logits)[rows, token]
    done = answers.done
    steps = answers.step_logits
    used = state.used
    found = Answers(
        answers.ids.at[:, i].set(jnp.where(done, 0, token)),
        answers.log_probs.at[:, i].set(jnp.where(done, 0.0, log_prob)),
        answers.lengths + ~done,
        i + 1,
        done | (token == eos),
        None if steps is None else steps.at[:, i].set(state.logits),
    )
    state = state._replace(used=None if used is None else used.at[rows, token].set(True))
    return laid_out(state), jax.tree.map(sharding.constrain, found)


@partial(jax.jit, static_argnames=("most", "draw", "keep_logits"))
def begin(
    state: State, eos: Array, knobs: Knobs, *, most: int, draw: bool, keep_logits: bool = False
) -> tuple[State, Answers]:
    """Chooses the first token of every answer; rows without a token of prompt are done.

    Args:
      state: after `extend`.
      eos: i32[]: id that ends an answer; negative = none.
      knobs: settings of the choice.
      most: N, ids that an answer has room for.
      draw: sample; else take the likeliest.
      keep_logits: keep the scores of every step, which takes N * V numbers a row.
    """
    b, v = state.logits.shape
    nothing = Answers(
        jnp.zeros((b, most), jnp.int32),
        jnp.zeros((b, most), jnp.float32),
        jnp.zeros(b, jnp.int32),
        jnp.zeros((), jnp.int32),
        ~state.seen.any(-1),
        jnp.zeros((b, most, v), jnp.float32) if keep_logits else None,
    )
    return _record(state, nothing, eos, knobs, draw)


@partial(jax.jit, static_argnames=("cfg", "dtype", "draw"), donate_argnames=("state", "answers"))
def advance(
    p: Params,
    cfg: ModelConfig,
    state: State,
    answers: Answers,
    eos: Array,
    knobs: Knobs,
    limit: Array,
    *,
    dtype: Any,
    draw: bool,
) -> tuple[State, Answers]:
    """Continues the answers until each has ended or has `limit` ids (i32[], at most N).

    The cache needs a place for each new id but the last; state and answers are used up. Other
    arguments as before.
    """

    def body(carry: tuple[State, Answers]) -> tuple[State, Answers]:
        state, answers = carry
        token = answers.ids[:, answers.step - 1]
        state = follow(p, cfg, state, token, ~answers.done, dtype)
        return _record(state, answers, eos, knobs, draw)

    def going(carry: tuple[State, Answers]) -> Array:
        return (carry[1].step < limit) & ~carry[1].done.all()

    return jax.lax.while_loop(going, body, (state, answers))


def bucket(n: int) -> int:
    """The static size for `n` places: multiples of 32, further apart for long ones (a quarter
    more at most beyond 256), so that few programs are compiled."""
    step = max(32, 1 << max((n - 1).bit_length() - 3, 0))
    return -(-n // step) * step


def with_room(state: State, places: int) -> State:
    """The state with so many free places behind what was said, its cache grown if need be."""
    needed = int(state.end) + places
    return state if needed <= state.seen.shape[1] else grow(state, bucket(needed))


def read(
    p: Params,
    cfg: ModelConfig,
    batch: dict[str, Any],
    *,
    dtype: Any,
    room: int,
    penalised: bool = False,
) -> tuple[State, Array | None]:
    """A new conversation: the prompts of `batch` (left-padded), with places for `room` more ids.

    Returns what `extend` returns.
    """
    rows, t = batch["tokens"].shape
    state = empty(cfg, rows, bucket(t + room), dtype, penalised)
    return extend(p, cfg, state, batch, dtype, fresh=True)


def answers(
    p: Params,
    cfg: ModelConfig,
    state: State,
    eos: Any,
    knobs: Knobs,
    *,
    max_new: int,
    every: int,
    dtype: Any,
    draw: bool = False,
    keep_logits: bool = False,
) -> Iterator[tuple[State, Answers]]:
    """Answers to the prompts in `state`, looked at after every `every` ids.

    Args:
      p: as in `advance`, like `cfg` and `dtype`.
      cfg: shapes.
      state: after `extend` or `read`.
      eos: as in `begin`, like `knobs`, `draw` and `keep_logits`.
      knobs: settings that the device reads.
      max_new: most ids of an answer.
      every: ids between two looks; the device runs alone in between.
      dtype: of the computation.
      draw: whether ids are drawn; else the likeliest is taken.
      keep_logits: whether the logits of each id are kept.

    Yields:
      The state (without the last id of each row in its cache) and the answers so far; the last pair
      is complete. A pair must not be used once the next one was asked for.
    """
    state, found = begin(
        state, eos, knobs, most=bucket(max_new), draw=draw, keep_logits=keep_logits
    )
    n = 1
    yield state, found
    while n < max_new and not bool(found.done.all()):
        limit = min(n + every, max_new)
        state = with_room(state, limit - n)
        limits = np.int32(limit)
        state, found = advance(p, cfg, state, found, eos, knobs, limits, dtype=dtype, draw=draw)
        n = int(found.step)
        yield state, found
