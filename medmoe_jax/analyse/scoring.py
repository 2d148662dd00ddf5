"""The probability of an answer as a function of what is seen of the images, and its gradient."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np

from medmoe_jax import losses, quantize
from medmoe_jax.analyse import inputs
from medmoe_jax.config import ConfigError, ModelConfig
from medmoe_jax.data import images
from medmoe_jax.models import medmoe
from medmoe_jax.models.layers import Array, Params
from medmoe_jax.responder import Responder

CHUNK = 128  # places of a row whose logits exist at once


def _sums(p: Params, cfg: ModelConfig, dtype: Any, text: dict[str, Array], shown: Array) -> Array:
    batch = text | ({"images": shown} if shown.shape[1] else {})
    hidden, _ = medmoe.forward(p, cfg, batch, dtype=dtype)
    head = partial(medmoe.logits, p)
    loss, _ = losses.answer_loss(hidden, head, text["labels"], CHUNK)
    return -loss


_log_probs = partial(jax.jit, static_argnums=(1, 2))(_sums)


@partial(jax.jit, static_argnums=(1, 2))
def _gradients(
    p: Params, cfg: ModelConfig, dtype: Any, text: dict[str, Array], shown: Array
) -> Array:
    # The probability of a row depends on its own images alone, so one sum gives all gradients.
    return jax.grad(lambda x: _sums(p, cfg, dtype, text, x).sum())(shown)


class Scorer:
    """One question with its answer; what varies is what is seen of the images.

    Attributes:
      pixels: f32[K, H, W, 3], the images as the tower takes them, normalised.
      blank: f32[3], colour of what is hidden: that of the padding, nearly zero.
      side: patches along an edge.
    """

    def __init__(self, model: Responder, row: inputs.Row, batch_size: int) -> None:
        """`batch_size` variants are run at once."""
        self._p, self._cfg, self._dtype = model.params, model.config, model.dtype
        batch = inputs.batch([row] * batch_size)
        self._text = {k: batch[k] for k in ("tokens", "image_pos", "mask", "labels")}
        self._size = batch_size
        vision = model.config.vision
        self.side, self.patch = vision.image_size // vision.patch_size, vision.patch_size
        self.pixels = images.normalise(row.pixels, model.spec)
        self.blank = images.normalise(np.array(images.padding(model.spec), np.uint8), model.spec)

    def log_probs(self, shown: np.ndarray) -> np.ndarray:
        """f32[N, K, H, W, 3] -> f64[N], log-likelihood of the answer, natural logarithm."""
        return np.concatenate(
            [np.asarray(_log_probs(*self._fixed, x), float)[:n] for x, n in self._parts(shown)]
        )

    def gradients(self, shown: np.ndarray) -> np.ndarray:
        """f32[N, K, H, W, 3] -> the gradient of each row's log-likelihood, of the same shape.

        Raises:
          ConfigError: the model's weights are quantized.
        """
        if any(map(quantize.is_quantized, jax.tree.leaves(self._p, is_leaf=quantize.is_quantized))):
            raise ConfigError(
                "weights of 8 or 4 bits have no gradient; use the method 'occlusion', or weights "
                "as they were saved"
            )
        return np.concatenate(
            [np.asarray(_gradients(*self._fixed, x))[:n] for x, n in self._parts(shown)]
        )

    def hidden(self, mask: np.ndarray) -> np.ndarray:
        """Log-likelihood with patches hidden: bool[N, K * side * side] -> f64[N]."""
        at_once = [mask[i : i + self._size] for i in range(0, len(mask), self._size)]
        return np.concatenate([self.log_probs(self.without(part)) for part in at_once])

    def without(self, mask: np.ndarray) -> np.ndarray:
        """The images with patches in the colour `blank`: bool[N, K * side * side] -> f32[N, K, H,
        W, 3]."""
        grid = mask.reshape(len(mask), len(self.pixels), self.side, self.side)
        each = np.repeat(np.repeat(grid, self.patch, 2), self.patch, 3)[..., None]
        return np.where(each, self.blank, self.pixels[None])

    @property
    def _fixed(self) -> tuple[Any, ...]:
        return self._p, self._cfg, self._dtype, self._text

    def _parts(self, shown: np.ndarray) -> Any:
        """Batches of the static size, each with the number of rows that count."""
        for start in range(0, len(shown), self._size):
            part = shown[start : start + self._size].astype(np.float32)
            more = self._size - len(part)
            yield np.concatenate([part, np.repeat(part[:1], more, 0)]), len(part)
