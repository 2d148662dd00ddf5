"""Beam search: the likeliest of several continuations, kept side by side.

Source: `GenerationMixin._beam_search` of Hugging Face transformers with early_stopping=False; the
answers are the same.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from medmoe_jax import generate, sharding
from medmoe_jax.config import ModelConfig
from medmoe_jax.models.layers import Array, Params
from medmoe_jax.sampling import Sampling, penalised

LOW = -1e9  # score of a beam that does not exist


class Beams(NamedTuple):
    """Continuations of B rows, W of each."""

    ids: Array  # i32[B, W, N]
    log_probs: Array  # f32[B, W, N], by the model's own scores
    scores: Array  # f32[B, W]: sums, or for ended ones sums divided by length ** penalty
    lengths: Array  # i32[B, W]


class Search(NamedTuple):
    """Everything that changes from step to step."""

    state: generate.State  # B * W rows
    running: Beams
    ended: Beams
    step: Array  # i32[], ids of each running beam
    open: Array  # bool[B]: a running beam may still get better than an ended one


def _take(beams: Beams, index: Array) -> Beams:
    """Beams [B, W'] by their number, i32[B, W']."""
    return jax.tree.map(
        lambda a: jnp.take_along_axis(a, index.reshape(index.shape + (1,) * (a.ndim - 2)), axis=1),
        beams,
    )


def _joined(a: Beams, b: Beams) -> Beams:
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y], 1), a, b)


def _best(beams: Beams, n: int) -> Beams:
    """The n with the highest scores, best first."""
    return _take(beams, jax.lax.top_k(beams.scores, n)[1])


def _step(s: Search, eos: Array, limit: Array, how: Array, penalty: Array, width: int) -> Any:
    """Chooses among all continuations by one id.

    Returns the search without new scores, and the ids that the running beams end with, i32[B * W].
    """
    b = len(s.open)
    own = jax.nn.log_softmax(s.state.logits).reshape(b, width, -1)
    vocab = own.shape[-1]
    used = s.state.used
    ranked = own
    if used is not None:
        ranked = penalised(own.reshape(b * width, vocab), used, penalty).reshape(own.shape)
    total = (ranked + s.running.scores[..., None]).reshape(b, -1)
    scores, place = jax.lax.top_k(total, 2 * width)
    parent, token = place // vocab, (place % vocab).astype(jnp.int32)
    parents = _take(s.running, parent)
    chosen = jnp.take_along_axis(own.reshape(b, -1), place, -1)
    length = s.step + 1
    candidates = Beams(
        parents.ids.at[:, :, s.step].set(token),
        parents.log_probs.at[:, :, s.step].set(chosen),
        scores,
        jnp.broadcast_to(length, scores.shape),
    )
    stops = (token == eos) | (length >= limit)
    # Among the candidates only the first W may end, as if no others had been looked at.
    first = (jnp.arange(2 * width) < width)[None]
    may_end = stops & first & s.open[:, None]
    normalised = scores / length.astype(jnp.float32) ** how
    ended = _best(
        _joined(s.ended, candidates._replace(scores=jnp.where(may_end, normalised, LOW))), width
    )
    order = jax.lax.top_k(jnp.where(stops, LOW, scores), width)[1]
    running = _take(candidates, order)
    running = running._replace(scores=jnp.take_along_axis(jnp.where(stops, LOW, scores), order, -1))
    rows = (jnp.arange(b)[:, None] * width + jnp.take_along_axis(parent, order, -1)).reshape(-1)
    last = jnp.take_along_axis(token, order, -1).reshape(-1)
    state = s.state._replace(
        cache=jax.tree.map(lambda a: a[rows], s.state.cache),
        used=None if used is None else used[rows].at[jnp.arange(b * width), last].set(True),
    )
    state = generate.laid_out(state)
    hope = running.scores[:, 0] / length.astype(jnp.float32) ** how
    full = (ended.scores > LOW / 2).all(-1)
    still = s.open & ~(full & (hope <= ended.scores[:, -1])) & (length < limit)
    return Search(state, running, ended, length, still), last


@partial(jax.jit, static_argnames=("cfg", "dtype", "width", "most"))
def _search(
    p: Params,
    cfg: ModelConfig,
    state: generate.State,
    eos: Array,
    limit: Array,
    how: Array,
    penalty: Array,
    *,
    dtype: Any,
    width: int,
    most: int,
) -> Beams:
    """The ended beams of every row; `how` is the exponent of the length."""
    b = len(state.count) // width
    there = state.seen.reshape(b, width, -1).any((1, 2))
    nothing = Beams(
        jnp.zeros((b, width, most), jnp.int32),
        jnp.zeros((b, width, most), jnp.float32),
        jnp.full((b, width), LOW),
        jnp.zeros((b, width), jnp.int32),
    )
    # All beams of a row are equal at first: only one of them may count.
    running = nothing._replace(scores=nothing.scores.at[:, 0].set(0.0))
    start = Search(state, running, nothing, jnp.zeros((), jnp.int32), there)

    def body(carry: tuple[Search, Array]) -> tuple[Search, Array]:
        s, last = carry
        state = generate.follow(p, cfg, s.state, last, jnp.ones_like(last, bool), dtype)
        return _step(s._replace(state=state), eos, limit, how, penalty, width)

    first = _step(start, eos, limit, how, penalty, width)
    done, _ = jax.lax.while_loop(lambda carry: carry[0].open.any(), body, first)
    return jax.tree.map(sharding.constrain, done.ended)


def search(
    p: Params, cfg: ModelConfig, state: generate.State, eos: int, how: Sampling, dtype: Any
) -> list[tuple[list[int], list[float]]]:
    """The best continuation of every row.

    Args:
      p: from `generate.for_generation`.
      cfg: shapes.
      state: after `generate.read`.
      eos: id that ends an answer; negative = none.
      how: beams, length_penalty, repetition_penalty, max_new_tokens.
      dtype: of the computation.

    Returns:
      Ids (the end included) and their log-probabilities; empty for a row without a prompt.
    """
    wide = generate.with_room(generate.repeat(state, how.beams), how.max_new_tokens)
    best = sharding.on_host(
        _search(
            p,
            cfg,
            wide,
            np.int32(eos),
            np.int32(how.max_new_tokens),
            np.float32(how.length_penalty),
            np.float32(how.repetition_penalty),
            dtype=dtype,
            width=how.beams,
            most=generate.bucket(how.max_new_tokens),
        )
    )
    lengths = np.where(sharding.on_host(state.seen).any(-1), best.lengths[:, 0], 0)
    return [
        (best.ids[row, 0, :n].tolist(), best.log_probs[row, 0, :n].tolist())
        for row, n in enumerate(lengths)
    ]
