"""One optimiser step: forward, loss, gradients of what trains, update.

Pure and compiled once per batch shape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import unflatten_dict

from medmoe_jax import lora, losses, optim, sharding
from medmoe_jax.config import ConfigError, ModelConfig, RunConfig
from medmoe_jax.models import layers, medmoe

Array = jax.Array
Flat = dict[str, Any]


class State(NamedTuple):
    """What a training checkpoint holds. Frozen parameters are not part of it."""

    step: Array  # i32[]: optimiser steps done
    train: Flat  # path -> f32 master weights
    opt: Any  # optimiser state


class Loss(NamedTuple):
    """Sums over a (micro-)batch."""

    rows: Array  # f32[B]: sum of token losses of each row
    counts: Array  # i32[B]: labelled tokens of each row
    aux: Array  # f32[]: load-balancing loss summed over layers, without its coefficient


def forward_loss(
    cfg: RunConfig,
    model: ModelConfig,
    flat: Flat,
    batch: dict[str, Array],
    key: Array | None = None,
) -> Loss:
    """Loss of a batch under the run's objective (`answer` or `router`).

    Args:
      cfg: objective, dtype, rematerialisation, loss chunk; in the router phase, which layers are
        read (config.model.moe).
      model: shapes.
      flat: all parameters, path -> array, adapters (`lora`) among them.
      batch: see `models.medmoe.forward`, with labels i32[B, T] and modality i32[B] (i32[B, P]
        where rows hold up to P samples).
      key: in training, of what is random: noise of the second expert choice, if `moe.noise`, and
        dropout of adapters.

    Raises:
      ConfigError: unknown objective.
    """
    noisy = model.moe is not None and model.moe.noise and model.moe.top_k == 2
    dropout_key = None if key is None else jax.random.fold_in(key, 1)
    params = unflatten_dict(lora.active(flat, cfg.lora, dropout_key), sep="/")
    dtype = jnp.dtype(cfg.compute_dtype)
    probe = params["router"] if cfg.objective == "router" else None
    hidden, reports = medmoe.forward(
        params,
        model,
        batch,
        dtype=dtype,
        remat=cfg.remat,
        official_aux=cfg.official_aux,
        noise_key=key if noisy else None,
        probe=probe,
    )
    if cfg.objective == "router":
        assert cfg.model.moe is not None
        logits = reports["probe"][jnp.asarray(cfg.model.moe.layers(model.llm.layers))]
        owner = losses.expert_of(batch["modality"], logits.shape[-1])
        rows, counts = losses.router_loss(
            logits, batch["mask"], owner, cfg.router_level, batch.get("segments")
        )
        return Loss(rows, counts, jnp.zeros(()))
    if cfg.objective != "answer":
        raise ConfigError(f"objective {cfg.objective!r} is unknown; use 'answer' or 'router'")
    rows, counts = losses.answer_loss(
        hidden, lambda h: medmoe.logits(params, h), batch["labels"], cfg.loss_chunk
    )
    return Loss(rows, counts, reports["aux"].sum() if "aux" in reports else jnp.zeros(()))


def dealt(x: Array, parts: int) -> Array:
    """[B, ...] -> [parts, B / parts, ...], row r going to part r % parts.

    Every device holds neighbouring rows, so it keeps its own in every part: none moves. Which rows
    make up a part does not depend on the devices.
    """
    return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)


def differentiated(cfg: RunConfig, train: Flat) -> Flat:
    """What gradients are taken by: the parameters that train, and in place of the decoder's
    matrices their shadows (`layers.Master`) where the run computes in bfloat16."""
    dtype = jnp.dtype(cfg.compute_dtype)
    if dtype != jnp.bfloat16:
        return train
    return {k: jnp.zeros(v.shape, dtype) if lora.is_matrix(k) else v for k, v in train.items()}


def joined(flat: Flat, by: Flat) -> Flat:
    """All parameters `flat` as the model takes them, with `by` of `differentiated` in them."""
    return flat | {
        k: v if v.dtype == flat[k].dtype else layers.Master(flat[k], v) for k, v in by.items()
    }


def make_step(
    cfg: RunConfig,
    model: ModelConfig,
    tx: optax.GradientTransformation,
    start: State | None = None,
) -> Callable[..., tuple[State, dict[str, Array]]]:
    """Compiles (state, frozen, batch, seed) -> (state, metrics); the state's buffers are reused.

    The seed (u32[]) is that of all that is random; left out it is `cfg.seed` and part of the
    program, which another seed then cannot take from the compilation cache.

    With `start`, the state stays where `start` lies on the devices; left to itself, XLA may move a
    small leaf, and then the next step is compiled anew.

    The loss is the mean over all labelled tokens of the step plus aux_coef times the load-balancing
    loss, whatever `optim.accumulate` is (the official code averages micro-batch means instead).

    Metrics: loss, ce, aux, grad_norm (trainable leaves), tokens (labelled), and rows f32[B] (mean
      loss of each row).
    """
    parts = cfg.optim.accumulate
    coef = model.moe.aux_coef if model.moe else 0.0

    def micro(
        given: Flat, flat: Flat, batch: dict[str, Array], key: Array | None
    ) -> tuple[Array, Loss]:
        loss = forward_loss(cfg, model, joined(flat, given), batch, key)
        return loss.rows.sum() + coef * loss.aux * loss.counts.sum(), loss

    def step(
        state: State, frozen: Flat, batch: dict[str, Array], seed: Array | int = cfg.seed
    ) -> tuple[State, dict[str, Array]]:
        pieces = jax.tree.map(lambda x: dealt(x, parts), batch)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step), parts)

        def gradient(part: dict[str, Array], key: Array) -> tuple[Flat, Loss]:
            by = differentiated(cfg, state.train)
            return jax.grad(micro, has_aux=True)(by, state.train | frozen, part, key)

        def accumulate(grads: Flat, piece: tuple[dict[str, Array], Array]) -> tuple[Flat, Loss]:
            new, loss = gradient(*piece)
            return jax.tree.map(jnp.add, grads, new), loss

        if parts == 1:  # no sum to keep, and no loop around the backward pass
            part, key = jax.tree.map(lambda x: x[0], (pieces, keys))
            grads, loss = gradient(part, key)
            loss = jax.tree.map(lambda x: x[None], loss)
        else:
            zeros = jax.tree.map(jnp.zeros_like, state.train)
            grads, loss = jax.lax.scan(accumulate, zeros, (pieces, keys))
        count = jnp.maximum(loss.counts.sum(), 1)
        # Of the sums: the means are never held on their own, they go into the update.
        norm = optim.norm(grads) / count
        grads = jax.tree.map(lambda g: g.astype(jnp.float32) / count, grads)
        train, opt = optim.update(tx, grads, state.opt, state.train, frozen)
        ce = loss.rows.sum() / count
        aux = (loss.aux * loss.counts.sum(-1)).sum() / count
        metrics = {
            "loss": ce + coef * aux,
            "ce": ce,
            "aux": aux,
            "grad_norm": norm,
            "tokens": loss.counts.sum(),
            # Split as the batch is, so that each process holds its own.
            "rows": sharding.constrain(
                (loss.rows / jnp.maximum(loss.counts, 1)).T.reshape(-1), sharding.AXES
            ),
        }
        return State(state.step + 1, train, opt), metrics

    if start is None:
        return jax.jit(step, donate_argnums=0)
    places = jax.tree.map(lambda leaf: leaf.sharding, start)
    return jax.jit(step, donate_argnums=0, out_shardings=(places, None))
