"""Softmax attention: to a cache or an image under any mask, and of a sequence to itself.

Axis legend: `layers.py`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from medmoe_jax.models.layers import Array


def attend(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """Softmax attention with grouped key/value heads, logits and softmax in float32.

    Args:
      q: [B, T, N, H]; k, v: [B, S, K, H] with N a multiple of K.
      mask: bool[B, 1, T, S], True where a query may look; None = everywhere. A query that may
        look nowhere (padding) gets some finite value.

    Returns:
      [B, T, N, H] in the dtype of q.
    """
    b, t, n, h = q.shape
    s, kv = k.shape[1:3]
    # Heads in front and the queries of a group in one axis: plain batched products, which XLA's
    # CPU backend does best.
    q = q.reshape(b, t, kv, n // kv, h).transpose(0, 2, 3, 1, 4).reshape(b, kv, -1, h)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    scores = jnp.einsum("bkrh,bksh->bkrs", q * h**-0.5, k, preferred_element_type=jnp.float32)
    if mask is not None:
        scores = scores.reshape(b, n, t, s)
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min).reshape(b, kv, -1, s)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    out = jnp.einsum("bkrs,bksh->bkrh", weights, v)
    return out.reshape(b, n, t, h).swapaxes(1, 2)


def query_segments(segments: Array) -> Array:
    """The segment that each place looks at: its own, for padding the one before it, as in the
    official code (padding is computed too, and counts in its load-balancing loss). i32[B, T]."""
    return jax.lax.cummax(segments, axis=1)


def attend_causal(q: Array, k: Array, v: Array, segments: Array) -> Array:
    """Attention of a sequence to itself: every place to those of its segment up to itself.

    Args:
      q: [B, T, N, H]; k, v: [B, T, K, H] with N a multiple of K.
      segments: i32[B, T], number of the sample that a place belongs to: ascending, 0 for padding.

    Returns:
      [B, T, N, H] in the dtype of q.
    """
    t = segments.shape[1]
    same = query_segments(segments)[:, :, None] == segments[:, None, :]
    return attend(q, k, v, (jnp.tril(jnp.ones((t, t), bool))[None] & same)[:, None])
