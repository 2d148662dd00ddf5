"""Short pretraining of a tiny vision tower and a tiny language model, so that a run starts where a
real one starts.

CLIP has seen millions of captioned images and Phi-2 a library of text. Here the tower learns the
facts of phantom images (which no later phase shows it again) and the language model to answer
questions about a report that it reads, without images.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from medmoe_jax import losses
from medmoe_jax.config import ModelConfig, VisionConfig
from medmoe_jax.models import clip, layers, medmoe

Array = jax.Array
SHIFT = 2  # pixels: largest random shift of a training image
POSITION_SCALE = 0.5
LESION_WEIGHT = 4.0  # of a patch with a lesion against one without
PATCH_WEIGHT = 3.0  # of the loss on patches against the mean loss on facts
KERNEL_SCALE = 4.0  # the usual start, 0.02, suits a width of 2048; deviations go with its root
EMBEDDING_SCALE = 25.0  # words as large as what the layers add to them


def _adamw(lr: float, steps: int) -> optax.GradientTransformation:
    warm = max(steps // 20, 1)
    rate = optax.warmup_cosine_decay_schedule(0.0, lr, warm, max(steps, warm + 1), lr / 50)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.01))


def _jitter(images: Array, key: Array) -> Array:
    """Random shift and brightness of uint8[B, H, W, 3]; sides and counts stay what they are."""
    b, size = images.shape[:2]
    where, gain = jax.random.split(key)
    padded = jnp.pad(images, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), mode="edge")
    start = jax.random.randint(where, (b, 2), 0, 2 * SHIFT + 1)
    cut = jax.vmap(lambda image, s: jax.lax.dynamic_slice(image, (s[0], s[1], 0), (size, size, 3)))
    bright = jax.random.uniform(gain, (b, 1, 1, 1), minval=0.85, maxval=1.15)
    return jnp.clip(cut(padded, start).astype(jnp.float32) * bright, 0, 255).astype(jnp.uint8)


def _positions(cfg: VisionConfig) -> Array:
    """f32[I + 1, C]: sines and cosines of row and column, so that places are told apart at once.

    Source: Beyer et al. 2022, "Better plain ViT baselines for ImageNet-1k".
    """
    side = cfg.image_size // cfg.patch_size
    y, x = jnp.meshgrid(jnp.arange(side), jnp.arange(side), indexing="ij")
    frequency = 1.0 / 100.0 ** (jnp.arange(cfg.width // 4) / (cfg.width // 4))
    angles = [v.reshape(-1, 1) * frequency[None] for v in (y, x)]
    grid = jnp.concatenate([f(a) for a in angles for f in (jnp.sin, jnp.cos)], -1)
    return POSITION_SCALE * jnp.concatenate([jnp.zeros((1, cfg.width)), grid])


def vision(
    cfg: VisionConfig,
    images: np.ndarray,
    facts: dict[str, np.ndarray],
    patches: np.ndarray,
    *,
    steps: int,
    batch: int = 32,
    lr: float = 3e-3,
    seed: int = 0,
) -> tuple[dict[str, Any], float]:
    """Trains the tower so that every patch feature tells the facts of the image, and its own
    content.

    Args:
      cfg: the tower.
      images: uint8[N, H, W, 3].
      facts: name -> i32[N] class ids, -1 where a fact does not apply.
      patches: i32[N, I] class ids of what each patch shows, 0 = nothing special.
      steps: of AdamW.
      batch: rows of a step.
      lr: peak learning rate.
      seed: of the start and of the order.

    Returns:
      Parameters of the tower (f32) and the mean accuracy of the facts over the last tenth of the
      steps.
    """
    keys = jax.random.split(jax.random.key(seed), 2)
    names = sorted(facts)
    targets = np.stack([facts[n] for n in names], 1)
    classes = {n: int(facts[n].max()) + 1 for n in names} | {"patch": int(patches.max()) + 1}
    heads = {n: layers.linear_leaves(cfg.width, c, bias=True) for n, c in classes.items()}
    p = layers.initialise(keys[0], {"tower": clip.leaves(cfg), "heads": heads})
    p["tower"]["position_embedding"] = _positions(cfg)
    tx = _adamw(lr, steps)

    def loss_fn(p: Any, x: Array, y: Array, where: Array, key: Array) -> tuple[Array, Array]:
        features = clip.features(p["tower"], cfg, _jitter(x, key), remat="dots")
        total, right, known = jnp.zeros(()), jnp.zeros(()), jnp.zeros(())
        for i, name in enumerate(names):
            logits = layers.linear(p["heads"][name], features)
            target = jnp.where(y[:, i] >= 0, y[:, i], losses.IGNORE)[:, None]
            target = jnp.broadcast_to(target, features.shape[:2])
            loss, labelled = losses.cross_entropy(logits, target)
            total += loss.sum() / jnp.maximum(labelled.sum(), 1)
            right += (labelled & (logits.argmax(-1) == target)).sum()
            known += labelled.sum()
        loss, _ = losses.cross_entropy(layers.linear(p["heads"]["patch"], features), where)
        # Most patches show nothing special: the others weigh more.
        weight = jnp.where(where > 0, LESION_WEIGHT, 1.0)
        return total / len(names) + PATCH_WEIGHT * (
            loss * weight
        ).sum() / weight.sum(), right / known

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(
        p: Any, opt: Any, x: Array, y: Array, where: Array, key: Array
    ) -> tuple[Any, Any, Array]:
        (_, accuracy), grads = jax.value_and_grad(loss_fn, has_aux=True)(p, x, y, where, key)
        updates, opt = tx.update(grads, opt, p)
        return optax.apply_updates(p, updates), opt, accuracy

    opt, history = tx.init(p), []
    rng = np.random.default_rng(seed)
    for i in range(steps):
        rows = rng.integers(len(images), size=batch)
        key = jax.random.fold_in(keys[1], i)
        p, opt, accuracy = step(p, opt, images[rows], targets[rows], patches[rows], key)
        history.append(accuracy)
    return jax.device_get(p["tower"]), float(np.mean(history[-max(steps // 10, 1) :]))


def _language_start(cfg: ModelConfig, key: Array) -> dict[str, Any]:
    """The language model's parameters (f32), spread as a narrow model needs them."""
    p = layers.initialise(key, medmoe.leaves(cfg)["llm"])

    def one(path: Any, leaf: Array) -> Array:
        kind = path[-1].key
        if kind == "embedding":
            return EMBEDDING_SCALE * leaf
        return leaf if kind != "kernel" or path[0].key == "lm_head" else KERNEL_SCALE * leaf

    return jax.tree_util.tree_map_with_path(one, p)


def language(
    cfg: ModelConfig,
    tokens: np.ndarray,
    weights: np.ndarray,
    *,
    steps: int,
    batch: int = 16,
    lr: float = 2e-3,
    seed: int = 0,
) -> tuple[dict[str, Any], float]:
    """Trains a dense language model on token ids, weighted next-token loss.

    Args:
      cfg: shapes; the vision part is not used.
      tokens: i32[N, T], a document a row.
      weights: f32[N, T] of each token in the loss, 0 for padding.
      steps: of AdamW.
      batch: rows of a step.
      lr: peak learning rate.
      seed: of the start and of the order.

    Returns:
      Parameters of the language model (f32) and the mean loss over the last tenth of the steps.
    """
    p = _language_start(cfg, jax.random.key(seed))
    tx = _adamw(lr, steps)

    def loss_fn(p: Any, x: Array, weight: Array) -> Array:
        whole = {"llm": p}
        inputs = {"tokens": x, "image_pos": jnp.full_like(x, -1), "mask": weight > 0}
        hidden, _ = medmoe.forward(whole, cfg, inputs, remat="dots")
        logits = medmoe.logits(whole, hidden[:, :-1])
        return (losses.cross_entropy(logits, x[:, 1:])[0] * weight[:, 1:]).sum() / weight.sum()

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(p: Any, opt: Any, x: Array, weight: Array) -> tuple[Any, Any, Array]:
        loss, grads = jax.value_and_grad(loss_fn)(p, x, weight)
        updates, opt = tx.update(grads, opt, p)
        return optax.apply_updates(p, updates), opt, loss

    opt, history = tx.init(p), []
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        rows = rng.integers(len(tokens), size=batch)
        p, opt, loss = step(p, opt, tokens[rows], weights[rows])
        history.append(loss)
    return jax.device_get(p), float(np.mean(history[-max(steps // 10, 1) :]))
