"""Greedy decoding with a KV cache: prompts in, token ids out, the loop on the device.

Prompts of a batch end at the same place (padding is on the left), so that all rows write one cache
position a step; positions count real tokens only. A row therefore gets what it gets alone.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from medmoe_jax.config import ModelConfig
from medmoe_jax.models import decoder, medmoe
from medmoe_jax.models.layers import Array, Params


class Generated(NamedTuple):
    """Answers of a batch."""

    ids: Array  # i32[B, max_new]: EOS included, 0 behind it
    lengths: Array  # i32[B]: number of ids
    log_probs: Array  # f32[B]: sum of the log-probabilities of the ids
    first_logits: Array  # f32[B, V]: scores of the first id
    step_logits: Array | None  # f32[B, max_new, V]: scores of every id, if asked for


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


@partial(jax.jit, static_argnames=("cfg", "max_new", "dtype", "keep_logits"))
def greedy(
    p: Params,
    cfg: ModelConfig,
    batch: dict[str, Array],
    eos: Array,
    *,
    max_new: int,
    dtype: Any,
    keep_logits: bool = False,
) -> Generated:
    """Most likely continuation, token by token.

    Args:
      p: parameters.
      cfg: shapes.
      batch: as for `models.medmoe.forward`, but padded on the left (`left_padded`).
      eos: i32[]: id that ends an answer; negative = none.
      max_new: most ids an answer may have.
      dtype: of the computation and of the cache.
      keep_logits: also return the scores of every step, which take max_new * V numbers a row.

    Returns:
      Generated; the loop stops early when every row has ended.
    """
    tokens, valid = batch["tokens"], batch["mask"]
    b, t = tokens.shape
    size = t + max_new
    images = batch.get("images")
    image = None if images is None else medmoe.image_tokens(p, cfg, images, dtype)
    lengths = valid.sum(-1)
    seen = jnp.pad(valid, ((0, 0), (0, max_new)))

    def run(
        x: Array, positions: Array, mask: Array, write_at: Any, cache: Params
    ) -> tuple[Array, Params]:
        ctx = decoder.Context(positions, mask, jnp.ones(x.shape[:2], bool), jnp.asarray(write_at))
        hidden, reports = decoder.decode(p["llm"], cfg, x, ctx, cache)
        return medmoe.logits(p, hidden[:, -1]), reports["cache"]

    x = medmoe.merge(p, tokens, batch["image_pos"], valid, image, dtype)
    reach = jnp.arange(size)[None, :] <= jnp.arange(t)[:, None]
    logits, cache = run(
        x,
        jnp.maximum(jnp.cumsum(valid, -1) - 1, 0),
        (seen[:, None] & reach[None])[:, None],
        0,
        decoder.empty_cache(cfg, b, size, dtype),
    )

    def body(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        i, logits, cache, ids, steps, counts, total, done = carry
        token = logits.argmax(-1).astype(jnp.int32)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], -1)[:, 0]
        ids = ids.at[:, i].set(jnp.where(done, 0, token))
        if steps is not None:
            steps = steps.at[:, i].set(logits)
        counts = counts + ~done
        total = total + jnp.where(done, 0.0, chosen)
        done = done | (token == eos)
        x = p["llm"]["embed"]["embedding"][token][:, None].astype(dtype)
        sees = seen | ((jnp.arange(size) >= t) & (jnp.arange(size) <= t + i))[None]
        logits, cache = run(x, (lengths + i)[:, None], sees[:, None, None], t + i, cache)
        return i + 1, logits, cache, ids, steps, counts, total, done

    start = (
        jnp.zeros((), jnp.int32),
        logits,
        cache,
        jnp.zeros((b, max_new), jnp.int32),
        jnp.zeros((b, max_new, logits.shape[-1]), jnp.float32) if keep_logits else None,
        jnp.zeros(b, jnp.int32),
        jnp.zeros(b, jnp.float32),
        ~valid.any(-1),
    )
    end = jax.lax.while_loop(lambda c: (c[0] < max_new) & ~c[-1].all(), body, start)
    _, _, _, ids, steps, counts, total, _ = end
    return Generated(ids, counts, total, logits, steps)
