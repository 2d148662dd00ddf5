"""The language model: Phi-2 (parallel block) and StableLM-2 (sequential block), dense or with MoE
layers.

Parameters are stacked by role (`layers` for all layers, `mlp` for those with a plain FFN, `moe` for
the others), so a dense and a MoE model differ in `mlp` and `moe` only. The forward pass finds
repeating groups in the placement (for
`sparse`: [MoE, dense] x L/2) and scans over each. Next stop: `moe.py`.

Source: Hugging Face `modeling_phi` and `modeling_stablelm` as the official code uses them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from medmoe_jax.config import ModelConfig
from medmoe_jax.models import layers, moe
from medmoe_jax.models.layers import Array, Params


class Context(NamedTuple):
    """What every layer reads beside its input."""

    positions: Array  # i32[B, T]
    mask: Array  # bool[B, 1, T, S], see layers.attend
    counted: Array  # bool[B, T], tokens that count in the load-balancing loss
    write_at: Array | None = (
        None  # i32[]: place of the first of the T tokens in the cache; None = no cache
    )
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
    """Writes keys and values [B, T, K, H] into a layer's cache {k, v: [B, K, S, H]} at
    `write_at`.
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
) -> tuple[Array, dict[str, Any]]:
    """One layer.

    `ffn` is {"mlp": ...} or {"moe": ...}. Returns the output and what the layer reports.
    """
    llm = cfg.llm
    b, t, _ = x.shape
    h = layers.layer_norm(p["ln1"], x, llm.norm_eps)
    q = layers.linear(p["attn"]["q"], h).reshape(b, t, llm.heads, llm.head_dim)
    k = layers.linear(p["attn"]["k"], h).reshape(b, t, llm.kv_heads, llm.head_dim)
    v = layers.linear(p["attn"]["v"], h).reshape(b, t, llm.kv_heads, llm.head_dim)
    q = layers.rope(q, ctx.positions, llm.rotary_dim, llm.rope_theta)
    k = layers.rope(k, ctx.positions, llm.rotary_dim, llm.rope_theta)
    report: dict[str, Any] = {}
    if cache is not None:
        assert ctx.write_at is not None
        report["cache"] = _cached(cache, k, v, ctx.write_at)
        k, v = (report["cache"][n].astype(x.dtype).swapaxes(1, 2) for n in ("k", "v"))
    attention = layers.linear(p["attn"]["out"], layers.attend(q, k, v, ctx.mask).reshape(x.shape))
    if llm.family == "stablelm":
        x = x + attention
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
    x = x + y if llm.family == "stablelm" else x + attention + y
    if ctx.capture:
        report |= {"hidden": x, "attn_out": attention}
    return x, report


def decode(
    p: Params,
    cfg: ModelConfig,
    x: Array,
    ctx: Context,
    cache: Params | None = None,
    remat: str = "none",
) -> tuple[Array, dict[str, Any]]:
    """Runs all layers and the final norm.

    Args:
      p: parameters as described by `leaves`.
      cfg: sizes and placement.
      x: [B, T, D] merged embeddings.
      ctx: positions, masks and what to report.
      cache: {k, v: [L, B, K, S, H]} or None.
      remat: see `layers.remat`.

    Returns:
      [B, T, D] after the final norm, and a dict of stacked reports: `cache` {k, v: [L, ...]}, `aux`
      f32[Lm] and `router_logits` f32[Lm, B, T, E] in a MoE model, `probe` f32[L, B, T, E] with
      ctx.probe, and with ctx.capture `hidden`, `attn_out` [L, B, T, D], `moe_in`, `moe_out` [Lm, B,
      T, D], `combine` f32[Lm, B, T, E].
    """
    is_moe = tuple(i in cfg.moe_layers for i in range(cfg.llm.layers))
    reports: list[dict[str, Any]] = []
    for start, period, repeats in groups(is_moe):
        kinds = ["moe" if m else "mlp" for m in is_moe[start : start + period]]

        def rows(tree: Any, first: int, each: int, n: int = repeats) -> Any:
            return jax.tree.map(
                lambda a: a[first : first + n * each].reshape(n, each, *a.shape[1:]), tree
            )

        xs: dict[str, Any] = {"layers": rows(p["layers"], start, period)}
        for kind in set(kinds):
            before = sum(1 for m in is_moe[:start] if m == (kind == "moe"))
            xs[kind] = rows(p[kind], before, kinds.count(kind))
        if cache is not None:
            xs["cache"] = rows(cache, start, period)
        if ctx.noise_key is not None:
            key = jax.random.fold_in(ctx.noise_key, start)
            xs["key"] = jax.random.split(key, (repeats, period))

        def group(x: Array, xs: dict[str, Any], kinds: list[str] = kinds) -> tuple[Array, Any]:
            out: list[dict[str, Any]] = []
            for j, kind in enumerate(kinds):
                nth = kinds[:j].count(kind)
                x, report = _block(
                    jax.tree.map(lambda a, j=j: a[j], xs["layers"]),
                    {kind: jax.tree.map(lambda a, nth=nth: a[nth], xs[kind])},
                    cfg,
                    ctx,
                    x,
                    jax.tree.map(lambda a, j=j: a[j], xs["cache"]) if "cache" in xs else None,
                    xs["key"][j] if "key" in xs else None,
                )
                out.append(report)
            return x, _stack(out)

        x, report = jax.lax.scan(layers.remat(group, remat), x, xs)
        reports.append(jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), report))
    x = layers.layer_norm(p["final_ln"], x, cfg.llm.norm_eps)
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


def empty_cache(cfg: ModelConfig, batch: int, length: int, dtype: Any) -> Params:
    """Zeros {k, v: dtype[L, B, K, length, H]}."""
    llm = cfg.llm
    shape = (llm.layers, batch, llm.kv_heads, length, llm.head_dim)
    return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}


class Decoder(nn.Module):
    """Holds the language model's parameters; `decode` is the mathematics."""

    cfg: ModelConfig

    @nn.compact
    def tree(self) -> Params:
        """The parameters as a nested dict, `embed` and `lm_head` (used by `medmoe.py`) included."""
        return {k: self.param(k, layers.initialise, sub) for k, sub in leaves(self.cfg).items()}

    def __call__(self, x: Array, ctx: Context, cache: Params | None = None) -> Any:
        """See `decode`."""
        return decode(self.tree(), self.cfg, x, ctx, cache)
