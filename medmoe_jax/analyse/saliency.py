"""Which patches an answer depends on: three published methods on one footing.

All of them say how much of log p(answer) is owed to each patch, compared with hiding it in the
colour of the padding; positive: the patch speaks for the answer.

* `integrated_gradients` (Sundararajan, Taly and Yan, "Axiomatic Attribution for Deep Networks",
  ICML 2017): the gradient with respect to the pixels, averaged on the straight way from the hidden
  image to the image, times the difference. What the patches get adds up to log p(answer | image) -
  log p(answer | hidden image), up to the error of the sum that stands for the integral, and up to
  the jumps where a token changes its expert on the way: a gradient does not see them.
* `gradient_x_input` (Shrikumar, Greenside and Kundaje, "Learning Important Features Through
  Propagating Activation Differences", ICML 2017, section 2.1): the gradient at the image, times the
  same difference; one backward pass.
* `occlusion` (Zeiler and Fergus, "Visualizing and Understanding Convolutional Networks", ECCV 2014,
  section 4.2): each patch is hidden by itself; a forward pass a patch, no gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from medmoe_jax.analyse.scoring import Scorer

METHODS = ("integrated_gradients", "gradient_x_input", "occlusion")

Gradients = Callable[[np.ndarray], np.ndarray]  # [N, ...] -> the gradient of each row, [N, ...]


def integrated_gradients(
    gradients: Gradients, x: np.ndarray, baseline: np.ndarray, steps: int, at_once: int = 16
) -> np.ndarray:
    """Attribution of a function's value to its inputs.

    Args:
      gradients: of the function, for several inputs at once.
      x: the input, any shape.
      baseline: what stands for "nothing there", same shape.
      steps: points at which the gradient is taken, in the middle of equal parts of the way.
      at_once: points handed to `gradients` together.

    Returns:
      f64 of the shape of x; its sum approaches f(x) - f(baseline).
    """
    total = np.zeros(x.shape)
    middle = (np.arange(steps) + 0.5) / steps
    for start in range(0, steps, at_once):
        along = middle[start : start + at_once].reshape(-1, *(1,) * x.ndim)
        points = baseline[None] + along * (x - baseline)[None]
        total += gradients(points.astype(np.float32)).astype(np.float64).sum(0)
    return total / steps * (x - baseline)


def to_patches(values: np.ndarray, patch: int) -> np.ndarray:
    """Sums over the pixels and colours of each patch: [K, H, W, 3] -> [K, H / patch, W / patch]."""
    k, h, w, _ = values.shape
    return values.reshape(k, h // patch, patch, w // patch, patch, 3).sum((2, 4, 5))


def occlusion(hidden: Callable[[np.ndarray], np.ndarray], candidates: np.ndarray) -> np.ndarray:
    """What hiding each patch by itself takes away.

    Args:
      hidden: bool[N, P], patches that are hidden -> f64[N], log-likelihood of the answer.
      candidates: bool[P]; the others get zero.

    Returns:
      f64[P].
    """
    places = np.flatnonzero(candidates)
    masks = np.zeros((len(places) + 1, len(candidates)), bool)
    masks[np.arange(len(places)), places] = True  # the last row hides nothing
    found = hidden(masks)
    result = np.zeros(len(candidates))
    result[places] = found[-1] - found[:-1]
    return result


def attribute(
    scorer: Scorer, candidates: np.ndarray, method: str = METHODS[0], steps: int = 32
) -> np.ndarray:
    """Attribution of the answer's log-likelihood to patches.

    Args:
      scorer: the question and its answer.
      candidates: bool[K * side * side], patches that show some of the picture; the others (padding)
        get zero.
      method: one of METHODS.
      steps: of integrated gradients.

    Returns:
      f64[K * side * side], natural logarithm.

    Raises:
      ValueError: unknown method.
    """
    if method == "occlusion":
        return occlusion(scorer.hidden, candidates)
    blank = np.broadcast_to(scorer.blank, scorer.pixels.shape)
    if method == "integrated_gradients":
        found = integrated_gradients(scorer.gradients, scorer.pixels, blank, steps)
    elif method == "gradient_x_input":
        found = scorer.gradients(scorer.pixels[None])[0] * (scorer.pixels - blank)
    else:
        raise ValueError(f"method {method!r} is unknown; use one of {', '.join(METHODS)}")
    return np.where(candidates, to_patches(found, scorer.patch).reshape(-1), 0.0)
