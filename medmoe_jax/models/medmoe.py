"""Med-MoE: images + tokens -> merged sequence -> hidden states -> logits. Next stop: `decoder.py`.

The sequence is laid out on the host: every image owns I consecutive places, `image_pos` says which
patch of which image a place holds. So shapes are static and a sample may hold any number of images
anywhere.

Source: official `prepare_inputs_labels_for_multimodal` (padding is a zero embedding).
"""

from __future__ import annotations

from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from medmoe_jax.config import ModelConfig
from medmoe_jax.models import clip, decoder, layers, projector
from medmoe_jax.models.layers import Array, Params


def leaves(cfg: ModelConfig) -> dict[str, Any]:
    """All parameters of a model as `Leaf`s, under `vision`, `projector` and `llm`."""
    return {
        "vision": clip.leaves(cfg.vision),
        "projector": projector.leaves(cfg),
        "llm": decoder.leaves(cfg),
    }


def shapes(cfg: ModelConfig, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Nested dict of `jax.ShapeDtypeStruct`: the parameters without allocating them."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype),
        leaves(cfg),
        is_leaf=lambda x: isinstance(x, layers.Leaf),
    )


def image_tokens(p: Params, cfg: ModelConfig, images: Array, dtype: Any) -> Array:
    """Projected patch features.

    images: [B, K, H, W, 3] (see `clip.features`) -> dtype[B, K, I, D].
    """
    b, k = images.shape[:2]
    x = clip.features(p["vision"], cfg.vision, images.reshape(b * k, *images.shape[2:]), dtype)
    return projector.project(p["projector"], x).reshape(b, k, cfg.vision.patches, cfg.llm.width)


def merge(
    p: Params, tokens: Array, image_pos: Array, mask: Array, image: Array | None, dtype: Any
) -> Array:
    """Embeds text and puts image tokens in their places.

    Args:
      p: all parameters.
      tokens: i32[B, T], any id where an image or padding is.
      image_pos: i32[B, T], place in the row's image tokens, -1 for text and padding.
      mask: bool[B, T], False for padding.
      image: [B, K, I, D] from `image_tokens`, or None where no row has an image.
      dtype: of the result.

    Returns:
      dtype[B, T, D]; padding is zero.
    """
    chex.assert_equal_shape([tokens, image_pos, mask])
    x = jnp.asarray(p["llm"]["embed"]["embedding"])[tokens].astype(dtype)
    if image is not None:
        flat = image.reshape(image.shape[0], -1, image.shape[-1])
        here = jnp.take_along_axis(flat, jnp.maximum(image_pos, 0)[..., None], axis=1)
        x = jnp.where((image_pos >= 0)[..., None], here.astype(dtype), x)
    return jnp.where(mask[..., None], x, jnp.zeros((), dtype))


def forward(
    p: Params,
    cfg: ModelConfig,
    batch: dict[str, Array],
    *,
    dtype: Any = jnp.float32,
    remat: str = "none",
    official_aux: bool = False,
    noise_key: Array | None = None,
    probe: Params | None = None,
    capture: bool = False,
) -> tuple[Array, dict[str, Array]]:
    """The whole model up to the final norm.

    Args:
      p: parameters, see `leaves`.
      cfg: shapes.
      batch: tokens i32[B, T], image_pos i32[B, T], mask bool[B, T] and, unless no row has an image,
        images [B, K, H, W, 3] uint8 or normalised floats. Padding is on the right. Rows that hold
        several samples have segments i32[B, T] (1, 2, ... by sample, 0 for padding) and positions
        i32[B, T] (0, 1, ... in each sample) as well; no sample sees another.
      dtype: of the computation.
      remat: what the backward pass recomputes, see `layers.remat`.
      official_aux: padding counts in the load-balancing loss.
      noise_key: training with `moe.noise`: key of the Gumbel noise.
      probe: a router that reads every layer's FFN input (router phase).
      capture: report every layer's tensors as well.

    Returns:
      [B, T, D] hidden states after the final norm, and the decoder's reports (see
      `decoder.decode`).
    """
    tokens, mask = batch["tokens"], batch["mask"]
    images = batch.get("images")
    image = None if images is None else image_tokens(p, cfg, images, dtype)
    x = merge(p, tokens, batch["image_pos"], mask, image, dtype)
    places = jnp.arange(tokens.shape[1])
    ctx = decoder.Context(
        positions=batch.get("positions", jnp.broadcast_to(places, tokens.shape)),
        segments=batch.get("segments", mask.astype(jnp.int32)),
        lengths=None if "segments" in batch else mask.sum(-1, dtype=jnp.int32),
        counted=jnp.ones_like(mask) if official_aux else mask,
        noise_key=noise_key,
        probe=probe,
        capture=capture,
    )
    hidden, reports = decoder.decode(p["llm"], cfg, x, ctx, remat=remat)
    if capture:
        reports |= {"merged": x} | ({} if image is None else {"image": image})
    return hidden, reports


def logits(p: Params, hidden: Array) -> Array:
    """[..., D] -> f32[..., V]."""
    return layers.linear(p["llm"]["lm_head"], hidden).astype(jnp.float32)


class MedMoE(nn.Module):
    """Holds all parameters. `init` makes them; `apply` gives logits."""

    cfg: ModelConfig

    def setup(self) -> None:
        self.vision = clip.ClipVision(self.cfg.vision)
        self.projector = projector.Projector(self.cfg)
        self.llm = decoder.Decoder(self.cfg)

    def __call__(self, batch: dict[str, Array], dtype: Any = jnp.float32) -> Array:
        """batch as in `forward` -> f32[B, T, V]."""
        parts = {"vision": self.vision, "projector": self.projector, "llm": self.llm}
        p = {name: module.tree() for name, module in parts.items()}
        return logits(p, forward(p, self.cfg, batch, dtype=dtype)[0])
