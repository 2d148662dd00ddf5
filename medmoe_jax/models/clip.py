"""CLIP vision tower: images -> patch features of the selected layer, class token dropped.

Source: Radford et al. 2021; layer selection as in the official `CLIPVisionTower.feature_select`
(`hidden_states[-2]`, `patch`): no post layer norm is applied, and layers above the selected one are
not computed.
"""

from __future__ import annotations

from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from medmoe_jax.config import VisionConfig
from medmoe_jax.models import attention, layers
from medmoe_jax.models.layers import Array, Leaf, Params


def leaves(cfg: VisionConfig) -> dict[str, Any]:
    """All parameters of the tower, unused upper layers and post norm included, as `Leaf`s."""
    c, stack = cfg.width, (cfg.layers,)
    return {
        "class_embedding": Leaf((c,)),
        "position_embedding": Leaf((cfg.patches + 1, c)),
        "patch_embedding": {"kernel": Leaf((cfg.patch_size, cfg.patch_size, 3, c))},
        "pre_ln": layers.norm_leaves(c),
        "post_ln": layers.norm_leaves(c),
        "layers": {
            "ln1": layers.norm_leaves(c, stack),
            "ln2": layers.norm_leaves(c, stack),
            "attn": {
                n: layers.linear_leaves(c, c, bias=True, stack=stack)
                for n in ("q", "k", "v", "out")
            },
            "fc1": layers.linear_leaves(c, cfg.ffn, bias=True, stack=stack),
            "fc2": layers.linear_leaves(cfg.ffn, c, bias=True, stack=stack),
        },
    }


def normalise(cfg: VisionConfig, images: Array, dtype: Any) -> Array:
    """uint8[..., H, W, 3] -> (x / 255 - mean) / std in `dtype`; float images are taken as
    normalised.
    """
    if images.dtype != jnp.uint8:
        return images.astype(dtype)
    shape = (1,) * (images.ndim - 1) + (3,)
    mean, std = (jnp.asarray(v, jnp.float32).reshape(shape) for v in (cfg.mean, cfg.std))
    return ((images.astype(jnp.float32) / 255.0 - mean) / std).astype(dtype)


def features(
    p: Params, cfg: VisionConfig, images: Array, dtype: Any = jnp.float32, remat: str = "none"
) -> Array:
    """Patch features of images.

    Args:
      p: parameters as described by `leaves`.
      cfg: sizes.
      images: uint8[M, H, W, 3] pixels, or floats already normalised; H = W = cfg.image_size.
      dtype: of the computation.
      remat: what a backward pass recomputes, see `layers.remat` (no phase trains the tower).

    Returns:
      dtype[M, I, C], patches in row-major order.
    """
    chex.assert_shape(images, (None, cfg.image_size, cfg.image_size, 3))
    x = normalise(cfg, images, dtype)
    m, side, patch = x.shape[0], cfg.image_size // cfg.patch_size, cfg.patch_size
    x = x.reshape(m, side, patch, side, patch, 3).transpose(0, 1, 3, 2, 4, 5)
    kernel = p["patch_embedding"]["kernel"].astype(dtype).reshape(-1, cfg.width)
    x = x.reshape(m, side * side, -1) @ kernel
    first = jnp.broadcast_to(p["class_embedding"].astype(dtype), (m, 1, cfg.width))
    x = jnp.concatenate([first, x], axis=1) + p["position_embedding"].astype(dtype)[None]
    x = layers.layer_norm(p["pre_ln"], x, cfg.norm_eps)
    activation = {"quick_gelu": layers.quick_gelu, "gelu": layers.gelu}[cfg.activation]

    def block(x: Array, lp: Params) -> tuple[Array, None]:
        h = layers.layer_norm(lp["ln1"], x, cfg.norm_eps)
        q, k, v = (
            layers.linear(lp["attn"][n], h).reshape(m, -1, cfg.heads, cfg.width // cfg.heads)
            for n in ("q", "k", "v")
        )
        x = x + layers.linear(lp["attn"]["out"], attention.attend(q, k, v, None).reshape(x.shape))
        h = layers.layer_norm(lp["ln2"], x, cfg.norm_eps)
        return x + layers.linear(lp["fc2"], activation(layers.linear(lp["fc1"], h))), None

    used = jax.tree.map(lambda a: a[: cfg.layers_run], p["layers"])
    x, _ = jax.lax.scan(layers.remat(block, remat), x, used)
    return x[:, 1:]


class ClipVision(nn.Module):
    """Holds the tower's parameters; `features` is the mathematics."""

    cfg: VisionConfig

    @nn.compact
    def tree(self) -> Params:
        """The parameters as a nested dict."""
        return {k: self.param(k, layers.initialise, sub) for k, sub in leaves(self.cfg).items()}

    def __call__(self, images: Array, dtype: Any = jnp.float32) -> Array:
        """uint8 or float [M, H, W, 3] -> dtype[M, I, C]."""
        return features(self.tree(), self.cfg, images, dtype)
