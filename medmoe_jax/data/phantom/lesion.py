"""Outlines of the lesions, the same for every modality."""

from __future__ import annotations

import numpy as np

from medmoe_jax.data.phantom.canvas import Canvas, smooth
from medmoe_jax.data.phantom.facts import Facts


def blobs(c: Canvas, rng: np.random.Generator, facts: Facts, rough: float) -> list[np.ndarray]:
    """For each lesion float32[h, w]: 0 in its centre, about 1 on its edge; `rough` is how far the
    edge wanders."""
    fields = []
    for lesion in facts.lesions:
        stretch = rng.uniform(0.93, 1.08)
        field = c.radius(
            lesion.x,
            lesion.y,
            lesion.radius * stretch,
            lesion.radius / stretch,
            rng.uniform(0, np.pi),
        )
        fields.append(field + np.float32(rough) * smooth(rng, c.shape, 3 / lesion.radius))
    return fields
