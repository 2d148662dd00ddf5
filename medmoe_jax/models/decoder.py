"""The language model: Phi-2 (parallel block) and StableLM-2 (sequential block), dense or with MoE
layers.

Parameters are stacked by role (`layers` for all layers, `mlp` for those with a plain FFN, `moe` for
the others), so a dense and a MoE model differ in `mlp` and `moe` only. The forward pass finds
repeating groups in the placement (for `sparse`: [MoE, dense] x L/2) and scans over each. For
generation `unstack` makes one tree a layer, and the layers are run one after the other with a
cache. Next stop: `moe.py`.

Source: Hugging Face `modeling_phi` and `modeling_stablelm` as the official code uses them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from medmoe_jax.config import ModelConfig
from medmoe_jax.models import attention, experts, layers, moe
from medmoe_jax.models.layers import Array, Params

Cache = tuple[Params, ...]


class Context(NamedTuple):
    """What every layer reads beside its input."""

    positions: Array  # i32[B, T]
    segments: Array  # i32[B, T], number of the sample that a token belongs to, 0 for padding
    counted: Array  # bool[B, T], tokens that count in the load-balancing loss
    lengths: Array | None = None  # i32[B], see `attention.attend_causal`
    mask: Array | None = None  # bool[B, 1, T, S] over the cache; None: over these tokens, causal
    write_at: Array | None = (
        None  # i32[]: place of the first of the T tokens in the cache; None = no cache
    )
    last_only: bool = False  # the caller reads the output of the last of the T tokens only
    noise_key: Array | None = None  # Gumbel noise on the second choice
    probe: Params | None = None  # a router to apply to every layer's FFN input (router phase)
    capture: bool = False  # also return each layer's tensors (`convert check`)


def leaves(cfg: ModelConfig) -> dict[str, Any]:
    """All parameters of the language model as `Leaf`s."""
    llm, stack = cfg.llm, (cfg.llm.layers,)
    d, kv = llm.width, llm.kv_heads * llm.head_dim
    phi = llm.family == "phi"
    block: dict[str, Any] = {
        "ln1": layers.norm_leaves(d, stack),
        "attn": {
            "q": layers.linear_leaves(d, d, bias=phi or llm.qkv_bias, stack=stack),
            "k": layers.linear_leaves(d, kv, bias=phi or llm.qkv_bias, stack=stack),
            "v": layers.linear_leaves(d, kv, bias=phi or llm.qkv_bias, stack=stack),
            "out": layers.linear_leaves(d, d, bias=phi, stack=stack),
        },
    }
    if not phi:
        block["ln2"] = layers.norm_leaves(d, stack)
    tree: dict[str, Any] = {
        "embed": {"embedding": layers.Leaf((llm.vocab, d))},
        "layers": block,
        "final_ln": layers.norm_leaves(d),
        "lm_head": layers.linear_leaves(d, llm.vocab, bias=llm.lm_head_bias),
    }
    if cfg.dense_layers:
        tree["mlp"] = layers.mlp_leaves(llm.family, d, llm.ffn, (len(cfg.dense_layers),))
    if cfg.moe:
        tree["moe"] = moe.leaves(llm, cfg.moe, (len(cfg.moe_layers),))
    return tree


def groups(is_moe: tuple[bool, ...]) -> list[tuple[int, int, int]]:
    """Cuts a placement into repeating groups.

    Args:
      is_moe: for each layer, whether it is a MoE layer.

    Returns:
      (first layer, period, repeats) in order, covering every layer once; at each place the group
      that covers most.
    """
    found, start, n = [], 0, len(is_moe)
    while start < n:
        best = (1, 1)
        for period in range(1, (n - start) // 2 + 1):
            pattern = is_moe[start : start + period]
            repeats = 1
            while is_moe[start + repeats * period : start + (repeats + 1) * period] == pattern:
                repeats += 1
            if repeats > 1 and period * repeats > best[0] * best[1]:
                best = (period, repeats)
        found.append((start, *best))
        start += best[0] * best[1]
    return found


def _cached(cache: Params, k: Array, v: Array, write_at: Array) -> Params:
    """Writes keys and values [B, T, K, H] into a layer's cache {k, v: [B, K, S, H]} at `write_at`.

    This layout of the cache makes decoding on a CPU twice as fast as [B, S, K, H].
    """
    new = {"k": k.swapaxes(1, 2), "v": v.swapaxes(1, 2)}
    return {
        name: jax.lax.dynamic_update_slice(
            cache[name], new[name].astype(cache[name].dtype), (0, 0, write_at, 0)
        )
        for name in ("k", "v")
    }


def _block(
    p: Params,
    ffn: Params,
    cfg: ModelConfig,
    ctx: Context,
    x: Array,
    cache: Params | None,
    key: Array | None,
    last_only: bool = False,
) -> tuple[Array, dict[str, Any]]:
    """One layer.

    `ffn` is {"mlp": ...} or {"moe": ...}. With `last_only`, the output of the last token alone is
    computed. Returns the output and what the layer reports.
    """
    llm = cfg.llm
    b, t, _ = x.shape
    h = layers.layer_norm(p["ln1"], x, llm.norm_eps)
    k = layers.linear(p["attn"]["k"], h).reshape(b, t, llm.kv_heads, llm.head_dim)
    v = layers.linear(p["attn"]["v"], h).reshape(b, t, llm.kv_heads, llm.head_dim)
    k = layers.rope(k, ctx.positions, llm.rotary_dim, llm.rope_theta)
    positions, mask = ctx.positions, ctx.mask
    if last_only:
        if mask is None:
            mask = (ctx.segments == ctx.segments[:, -1:])[:, None, None]
        else:
            mask = mask[:, :, -1:]
        x, h, positions = x[:, -1:], h[:, -1:], positions[:, -1:]
    q = layers.linear(p["attn"]["q"], h).reshape(b, -1, llm.heads, llm.head_dim)
    q = layers.rope(q, positions, llm.rotary_dim, llm.rope_theta)
    report: dict[str, Any] = {}
    if cache is not None:
        assert ctx.write_at is not None
        report["cache"] = _cached(cache, k, v, ctx.write_at)
        if ctx.mask is not None:
            k, v = (report["cache"][n].astype(x.dtype).swapaxes(1, 2) for n in ("k", "v"))
    if mask is None:
        heads = attention.attend_causal(q, k, v, ctx.segments, ctx.lengths)
    else:
        heads = attention.attend(q, k, v, mask)
    attended = layers.linear(p["attn"]["out"], heads.reshape(x.shape))
    if llm.family == "stablelm":
        x = x + attended
        h = layers.layer_norm(p["ln2"], x, llm.norm_eps)
    if ctx.probe is not None:
        report["probe"] = moe.router_logits(ctx.probe, jax.lax.stop_gradient(h))
    if "moe" in ffn:
        assert cfg.moe is not None
        y, routing = moe.moe_layer(ffn["moe"], cfg.moe, h, ctx.counted, key)
        report["aux"] = routing.aux
        report["router_logits"] = routing.logits
        if ctx.capture:
            report |= {"moe_in": h, "moe_out": y, "combine": moe.combine_weights(routing)}
    else:
        y = layers.mlp(ffn["mlp"], h)
    x = x + y if llm.family == "stablelm" else x + attended + y
    if ctx.capture:
        report |= {"hidden": x, "attn_out": attended}
    return x, report


def decode(
    p: Params,
    cfg: ModelConfig,
    x: Array,
    ctx: Context,
    cache: Cache | None = None,
    remat: str = "none",
) -> tuple[Array, dict[str, Any]]:
    """Runs all layers and the final norm.

    Args:
      p: parameters as described by `leaves`, or what `unstack` makes of them.
      cfg: sizes and placement.
      x: [B, T, D] merged embeddings.
      ctx: positions, masks and what to report.
      cache: a layer's {k, v: [B, K, S, H]} for each layer, or None; needs unstacked parameters.
      remat: see `layers.remat`; for stacked parameters.

    Returns:
      [B, T, D] after the final norm ([B, 1, D] with ctx.last_only and unstacked parameters, unless
      the last layer is a MoE layer, whose routing is reported), and a dict of stacked reports:
      `aux` f32[Lm] and `router_logits` f32[Lm, B, T, E] in a MoE model, `probe` f32[L, B, T, E]
      with ctx.probe, and with ctx.capture `hidden`, `attn_out` [L, B, T, D], `moe_in`, `moe_out`
      [Lm, B, T, D], `combine` f32[Lm, B, T, E]; `cache` as given, one dict a layer.

    Raises:
      ValueError: a cache with stacked parameters.
    """
    if "blocks" in p:
        x, reports = _run_blocks(p, cfg, x, ctx, cache)
    elif cache is not None:
        raise ValueError("a cache needs parameters made by decoder.unstack")
    else:
        x, reports = _scan_groups(p, cfg, x, ctx, remat)
    return layers.layer_norm(p["final_ln"], x, cfg.llm.norm_eps), reports


def unstack(p: Params, cfg: ModelConfig, ways: int = 1) -> Params:
    """The stacked parameters of the language model as one tree a layer, for generation.

    Slicing a layer out of stacked weights copies it in every step on some platforms (a CPU decodes
    six times slower). Of host arrays views are taken, of device arrays copies.

    Args:
      p: as described by `leaves`.
      cfg: sizes and placement.
      ways: devices that experts are split over, a divisor of E.

    Returns:
      `blocks`, a tuple of {"layers": ..., "mlp" or "moe": ...} whose experts are a tuple of trees,
      and `embed`, `final_ln`, `lm_head` as they were. Over several `ways` a device owns E / ways
      neighbouring experts, and tree i holds the i-th of every device, [ways, ...].
    """
    blocks, before = [], {"mlp": 0, "moe": 0}
    for i in range(cfg.llm.layers):
        kind = "moe" if i in cfg.moe_layers else "mlp"
        ffn = jax.tree.map(lambda a, n=before[kind]: a[n], p[kind])
        before[kind] += 1
        if kind == "moe":
            assert cfg.moe is not None
            each = experts.separate(ffn["experts"], cfg.moe.experts, ways)
            ffn = ffn | {"experts": each}
        blocks.append({"layers": jax.tree.map(lambda a, i=i: a[i], p["layers"]), kind: ffn})
    return {"blocks": tuple(blocks)} | {k: p[k] for k in ("embed", "final_ln", "lm_head")}


def _run_blocks(
    p: Params, cfg: ModelConfig, x: Array, ctx: Context, cache: Cache | None
) -> tuple[Array, dict[str, Any]]:
    """The layers of unstacked parameters in order."""
    reports: list[dict[str, Any]] = []
    caches: list[Params] = []
    for i, block in enumerate(p["blocks"]):
        ffn = {k: v for k, v in block.items() if k != "layers"}
        key = None if ctx.noise_key is None else jax.random.fold_in(ctx.noise_key, i)
        mine = None if cache is None else cache[i]
        # Nobody reads what the last layer says of earlier tokens, but every routing is reported.
        last = ctx.last_only and i == cfg.llm.layers - 1 and "moe" not in ffn
        x, report = _block(block["layers"], ffn, cfg, ctx, x, mine, key, last)
        if cache is not None:
            caches.append(report.pop("cache"))
        reports.append(report)
    return x, _stack(reports) | ({} if cache is None else {"cache": tuple(caches)})


def _scan_groups(
    p: Params, cfg: ModelConfig, x: Array, ctx: Context, remat: str
) -> tuple[Array, dict[str, Any]]:
    """The layers of stacked parameters, a scan for each repeating group."""
    is_moe = tuple(i in cfg.moe_layers for i in range(cfg.llm.layers))
    reports: list[dict[str, Any]] = []
    for start, period, repeats in groups(is_moe):
        kinds = ["moe" if m else "mlp" for m in is_moe[start : start + period]]

        def rows(tree: Any, first: int, each: int, n: int = repeats) -> Any:
            # Without an axis for one layer a round, for which XLA copies the weights on a CPU.
            parts = (each,) if each > 1 else ()
            return jax.tree.map(
                lambda a: a[first : first + n * each].reshape(n, *parts, *a.shape[1:]), tree
            )

        xs: dict[str, Any] = {"layers": rows(p["layers"], start, period)}
        for kind in set(kinds):
            before = sum(1 for m in is_moe[:start] if m == (kind == "moe"))
            xs[kind] = rows(p[kind], before, kinds.count(kind))
        if ctx.noise_key is not None:
            key = jax.random.fold_in(ctx.noise_key, start)
            xs["key"] = jax.random.split(key, (repeats, period))

        def group(x: Array, xs: dict[str, Any], kinds: list[str] = kinds) -> tuple[Array, Any]:
            out: list[dict[str, Any]] = []
            for j, kind in enumerate(kinds):
                nth, layer, ffn = kinds[:j].count(kind), xs["layers"], xs[kind]
                if len(kinds) > 1:
                    layer = jax.tree.map(lambda a, j=j: a[j], layer)
                if kinds.count(kind) > 1:
                    ffn = jax.tree.map(lambda a, nth=nth: a[nth], ffn)
                x, report = _block(
                    layer,
                    {kind: ffn},
                    cfg,
                    ctx,
                    x,
                    None,
                    xs["key"][j] if "key" in xs else None,
                )
                out.append(report)
            return x, _stack(out)

        x, report = jax.lax.scan(layers.remat(group, remat), x, xs)
        reports.append(jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), report))
    return x, _join(reports)


def _merge_reports(reports: list[dict[str, Any]], combine: Any) -> dict[str, Any]:
    """Joins the reports of layers in order; a key is joined over the layers that have it."""
    keys = sorted({key for report in reports for key in report})
    return {
        key: jax.tree.map(lambda *a: combine(a), *[r[key] for r in reports if key in r])
        for key in keys
    }


def _stack(reports: list[dict[str, Any]]) -> dict[str, Any]:
    return _merge_reports(reports, jnp.stack)


def _join(reports: list[dict[str, Any]]) -> dict[str, Any]:
    return _merge_reports(reports, jnp.concatenate)


def empty_cache(cfg: ModelConfig, batch: int, length: int, dtype: Any) -> Cache:
    """Zeros {k, v: dtype[B, K, length, H]} for each layer."""
    llm = cfg.llm
    shape = (batch, llm.kv_heads, length, llm.head_dim)
    return tuple(
        {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)} for _ in range(llm.layers)
    )


class Decoder(nn.Module):
    """Holds the language model's parameters; `decode` is the mathematics."""

    cfg: ModelConfig

    @nn.compact
    def tree(self) -> Params:
        """The parameters as a nested dict, `embed` and `lm_head` (used by `medmoe.py`) included."""
        return {k: self.param(k, layers.initialise, sub) for k, sub in leaves(self.cfg).items()}

    def __call__(self, x: Array, ctx: Context) -> Any:
        """See `decode`."""
        return decode(self.tree(), self.cfg, x, ctx)
