"""Softmax attention: to a cache or an image under any mask, and of a sequence to itself.

`attend_causal` takes the kernel of the platform that the program is compiled for: splash attention
on a TPU, cuDNN's flash attention on a GPU. Both hold no scores of all pairs. Axis legend:
`layers.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from medmoe_jax.models import fallback
from medmoe_jax.models.layers import ATTENTION, Array

SHORT = 256  # places up to which a TPU's scores are small and XLA's form is as good
BLOCKS = (512, 256, 128)  # places of a block of splash attention; longer ones are faster
PLAIN = "attention holds the scores of all pairs"  # what `plain` costs, for the log
LANES = 128  # the length is a multiple of this many places, padded if need be


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


def attend_causal(
    q: Array, k: Array, v: Array, segments: Array, lengths: Array | None = None
) -> Array:
    """Attention of a sequence to itself: every place to those of its segment up to itself.

    Args:
      q: [B, T, N, H]; k, v: [B, T, K, H] with N a multiple of K.
      segments: i32[B, T], number of the sample that a place belongs to: ascending, 0 for padding.
      lengths: i32[B], where every row is known to be one sample with padding behind it: its places.
        It says what `segments` say, in a form that is cheaper on a GPU.

    Returns:
      [B, T, N, H] in the dtype of q.
    """
    kernels = {}
    if reason := _no_splash(q):
        fallback.say("tpu", f"{PLAIN}: {reason}")
    elif q.shape[1] > SHORT:
        kernels["tpu"] = splash
    on_gpu = partial(cudnn, lengths=lengths)
    if reason := _no_cudnn(on_gpu, q, k, v, segments):
        fallback.say("gpu", f"{PLAIN}: {reason}")
    else:
        kernels["cuda"] = on_gpu
    return jax.lax.platform_dependent(q, k, v, segments, default=plain, **kernels)


def plain(q: Array, k: Array, v: Array, segments: Array) -> Array:
    """`attend_causal` with the scores of all pairs in memory: right everywhere."""
    t = segments.shape[1]
    mask = jnp.tril(jnp.ones((t, t), bool))[None] & _same(segments)
    return checkpoint_name(attend(q, k, v, mask[:, None]), ATTENTION)


def _same(segments: Array) -> Array:
    """bool[B, T, T]: whether a place looks at the segment of another."""
    return query_segments(segments)[:, :, None] == segments[:, None, :]


def cudnn(
    q: Array,
    k: Array,
    v: Array,
    segments: Array,
    lengths: Array | None = None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Array:
    """`attend_causal` on an NVIDIA GPU. Without lengths the segments become a bias [B, 1, T, T] for
    all heads, with which it takes 1.6 times as long. "xla" computes the same anywhere."""
    run = partial(jax.nn.dot_product_attention, is_causal=True, implementation=implementation)
    if lengths is None:
        return run(q, k, v, mask=_same(segments)[:, None])
    # A row of padding looks at its first place: at nothing, it would be no number.
    return run(q, k, v, key_value_seq_lengths=jnp.maximum(lengths, 1))


def splash(q: Array, k: Array, v: Array, segments: Array, interpret: bool = False) -> Array:
    """`attend_causal` on a TPU. Every device runs the kernel on its own rows: XLA cannot split
    it."""
    mesh = jax.sharding.get_abstract_mesh()
    run = partial(_splash_rows, interpret=interpret)
    if mesh.size <= 1:
        return run(q, k, v, segments)
    rows = jax.P(mesh.axis_names)
    split = jax.shard_map(run, in_specs=(rows,) * 4, out_specs=rows, check_vma=False)
    return split(q, k, v, segments)


def _splash_rows(q: Array, k: Array, v: Array, segments: Array, interpret: bool) -> Array:
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    t, n, h = q.shape[1:]
    length = -(-t // LANES) * LANES
    # Behind the end: queries look at the last segment, and no query looks at the keys.
    more = ((0, 0), (0, length - t))
    looks = jnp.pad(query_segments(segments), more, mode="edge")
    segments = jnp.pad(segments, more, constant_values=-1)
    q, k, v = (jnp.pad(a.swapaxes(1, 2), ((0, 0), *more, (0, 0))) for a in (q, k, v))
    block = next(size for size in BLOCKS if length % size == 0)
    one = kernels.make_splash_mha_single_device(
        kernels.MultiHeadMask([kernels.CausalMask((length, length))] * n),
        block_sizes=kernels.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        residual_checkpoint_name=ATTENTION,
        interpret=interpret,
    )
    each: Any = jax.vmap(one)
    out = each(q * h**-0.5, k, v, kernels.SegmentIds(looks, segments))
    return out[:, :, :t].swapaxes(1, 2)


def _no_splash(q: Array) -> str:
    """Why `splash` cannot be used; "" if it can."""
    mesh = jax.sharding.get_abstract_mesh()
    if len(q) % max(mesh.size, 1):
        return f"{mesh.size} devices do not divide {len(q)} rows"
    return ""


def _no_cudnn(run: Callable[..., Array], q: Array, k: Array, v: Array, segments: Array) -> str:
    """Why `run`, which is `cudnn`, cannot be used; "" if it can. It can be traced only where cuDNN
    is installed."""
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN's flash attention is for 16-bit numbers, not for {q.dtype}"
    if q.shape[1] % 2:
        return f"cuDNN's flash attention is for an even number of places, not for {q.shape[1]}"
    try:
        jax.eval_shape(run, q, k, v, segments)
    except (RuntimeError, NotImplementedError) as error:
        return str(error)
    return ""
