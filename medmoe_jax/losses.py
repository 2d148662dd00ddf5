"""Losses as sums, so that accumulation and several devices give the mean over all labelled tokens
of a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

Array = jax.Array
IGNORE = -100


def shifted(labels: Array) -> Array:
    """labels[B, T] -> the label each position predicts: one to the left, IGNORE at the end."""
    return jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE)


def cross_entropy(logits: Array, targets: Array) -> tuple[Array, Array]:
    """-log softmax(logits)[target] where target is not IGNORE, else 0.

    f32[..., V], i32[...] -> f32[...], bool[...].
    """
    labelled = targets != IGNORE
    chosen = jnp.take_along_axis(logits, jnp.where(labelled, targets, 0)[..., None], -1)[..., 0]
    return jnp.where(labelled, jax.nn.logsumexp(logits, -1) - chosen, 0.0), labelled


def answer_loss(
    hidden: Array, head: Callable[[Array], Array], labels: Array, chunk: int = 0
) -> tuple[Array, Array]:
    """Next-token loss of every row (paper equations 1, 2, 5), logits held for `chunk` positions at
    a time.

    Args:
      hidden: [B, T, D] after the final norm.
      head: maps [..., D] to f32[..., V].
      labels: i32[B, T], IGNORE where there is nothing to learn; not shifted.
      chunk: positions of each row whose logits exist at once, also in the backward pass; 0 = all.

    Returns:
      f32[B] sums of token losses and i32[B] numbers of labelled tokens.
    """
    chex.assert_equal_shape_prefix([hidden, labels], 2)
    targets = shifted(labels)
    b, t = targets.shape
    counts = (targets != IGNORE).sum(-1)
    if not chunk or chunk >= t:
        return cross_entropy(head(hidden), targets)[0].sum(-1), counts
    pad = -t % chunk
    hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, pad)), constant_values=IGNORE)

    @jax.checkpoint
    def one(total: Array, piece: tuple[Array, Array]) -> tuple[Array, None]:
        h, y = piece
        return total + cross_entropy(head(h), y)[0].sum(-1), None

    n = (t + pad) // chunk
    pieces = (
        hidden.reshape(b, n, chunk, -1).swapaxes(0, 1),
        targets.reshape(b, n, chunk).swapaxes(0, 1),
    )
    total, _ = jax.lax.scan(one, jnp.zeros(b, jnp.float32), pieces)
    return total, counts


def expert_of(modality: Any, n_experts: int) -> Any:
    """The expert that a modality belongs to (array of ints; -1 = unknown stays): its own, or one
    that it shares where there are fewer experts than modalities, those of equal rest together."""
    return modality % n_experts * (modality >= 0) - (modality < 0)


def router_loss(
    logits: Array,
    mask: Array,
    modality: Array,
    level: str,
    segments: Array | None = None,
) -> tuple[Array, Array]:
    """Cross-entropy of the router on the modality label (paper equation 3).

    Args:
      logits: f32[Lm, B, T, E], the router's scores at the input of every MoE layer.
      mask: bool[B, T], real tokens.
      modality: i32[B], the label; rows with -1 do not count. With segments i32[B, P], that of each
        sample of a row.
      level: `token` labels every token, as the router is applied; `sample` labels the mean score of
        a sample.
      segments: i32[B, T], which sample of its row a token belongs to, from 1; None: a row is one.

    Returns:
      f32[B] sums of losses and i32[B] numbers of labelled items.
    """
    n_layers, b, t, _ = logits.shape
    segments = mask.astype(jnp.int32) if segments is None else segments
    modality = modality.reshape(b, -1)
    if level == "token":
        label = jnp.take_along_axis(modality, jnp.maximum(segments - 1, 0), axis=1)
        targets = jnp.where((segments > 0) & (label >= 0), label, IGNORE)
        loss, labelled = cross_entropy(logits, jnp.broadcast_to(targets, (n_layers, b, t)))
        total, count = loss.sum((0, 2)), labelled.sum((0, 2))
    elif level == "sample":
        samples = jnp.arange(1, modality.shape[1] + 1)[None, None]
        own = (segments[..., None] == samples).astype(jnp.float32)  # [B, T, P]
        tokens = jnp.maximum(own.sum(1), 1)[..., None]
        mean = jnp.einsum("lbte,btp->bpe", logits, own, precision=jax.lax.Precision.HIGHEST)
        mean = mean / (n_layers * tokens)
        loss, labelled = cross_entropy(mean, jnp.where(modality >= 0, modality, IGNORE))
        total, count = loss.sum(-1), labelled.sum(-1)
    else:
        raise ValueError(f"router_level {level!r} is unknown; use 'token' or 'sample'")
    return total, count


def posterior(logits: Array, mask: Array) -> Array:
    """Modality posterior of each sample: f32[Lm, B, T, E], bool[B, T] -> f32[B, E], rows sum to
    one.

    The mean over layers and real tokens of the log-probabilities, normalised: a token that says
    nothing changes nothing.
    """
    log_probs = jax.nn.log_softmax(logits, -1) * mask[None, ..., None]
    mean = log_probs.sum((0, 2)) / (logits.shape[0] * jnp.maximum(mask.sum(-1), 1)[:, None])
    return jax.nn.softmax(mean, -1)
