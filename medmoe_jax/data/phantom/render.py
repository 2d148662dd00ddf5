"""From facts to pixels, and the stream of studies: image i of a split depends on the seed and on i
alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from medmoe_jax.config import MODALITIES
from medmoe_jax.data.phantom import facts, head, knee, pathology, sections, trunk, xray
from medmoe_jax.data.phantom.canvas import make_canvas, smooth
from medmoe_jax.data.phantom.facts import Facts

SPLITS = ("train", "test", "pretrain")

# The smallest height and width, as shares of the longer side, that cut no anatomy off.
CROPS = {
    ("lungs", "axial"): (0.84, 1.0),
    ("liver", "axial"): (0.86, 1.0),
    ("brain", "axial"): (1.0, 0.84),
    ("brain", "coronal"): (1.0, 0.9),
    ("lungs", "frontal"): (1.0, 0.92),
    ("knee", "frontal"): (1.0, 0.9),
    ("knee", "coronal"): (1.0, 0.92),
}


def random_state(seed: int, split: str, index: int) -> np.random.Generator:
    """Source of all randomness of one image. Raises ValueError on an unknown split or a negative
    number."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown; use one of {', '.join(SPLITS)}")
    if seed < 0 or index < 0:
        raise ValueError(f"seed {seed} and image number {index} must not be negative")
    return np.random.default_rng([seed, SPLITS.index(split), index])


def draw_facts(seed: int, split: str, index: int) -> Facts:
    """Facts of image `index` without rendering it. Modalities take turns."""
    return facts.draw(random_state(seed, split, index), MODALITIES[index % len(MODALITIES)])


def draw_image(seed: int, split: str, index: int, size: int) -> tuple[np.ndarray, Facts]:
    """Image `index` of a split: uint8[h, w] (CT, MRI, X-ray) or uint8[h, w, 3] (pathology), and its
    facts.

    The longer side has `size` pixels.
    """
    rng = random_state(seed, split, index)
    shown = facts.draw(rng, MODALITIES[index % len(MODALITIES)])
    return render(shown, rng, size), shown


def render(shown: Facts, rng: np.random.Generator, size: int) -> np.ndarray:
    """Draws the facts: uint8[h, w] or uint8[h, w, 3], with random pose, shape, contrast, noise and
    format."""
    crop = CROPS.get((shown.organ, shown.plane), (1.0, 1.0))
    whole = rng.random() < 0.6
    height, width = (round(size * (1.0 if whole else rng.uniform(least, 1.0))) for least in crop)
    c = make_canvas(height, width)
    noise = min(1.0, size / 224)  # a small image is a downscaled one: averaging has removed noise
    if shown.modality == "Pathology":
        return _bytes(pathology.stained(c, rng, shown, noise))
    strength = np.float32(0.013 if shown.organ == "brain" else 0.02)  # a skull hardly varies
    warp = [
        strength * smooth(rng, c.shape, 3) + np.float32(0.004) * smooth(rng, c.shape, 9)
        for _ in range(2)
    ]
    body = c.moved(
        rng.uniform(-0.025, 0.025),
        rng.uniform(-0.025, 0.025),
        rng.uniform(0.95, 1.03),
        rng.uniform(-0.06, 0.06),
        (warp[0], warp[1]),
    )
    scene = (shown.organ, shown.plane)
    if shown.modality == "X-ray":
        project = {
            ("lungs", "frontal"): xray.chest_frontal,
            ("lungs", "lateral"): xray.chest_lateral,
            ("knee", "frontal"): xray.knee_frontal,
            ("knee", "lateral"): xray.knee_lateral,
        }[scene]
        return _bytes(xray.film(c, rng, shown, project(body, rng), noise))
    layers = {
        ("lungs", "axial"): trunk.lungs_axial,
        ("lungs", "coronal"): trunk.lungs_coronal,
        ("liver", "axial"): trunk.liver_axial,
        ("liver", "coronal"): trunk.liver_coronal,
        ("brain", "axial"): head.brain_axial,
        ("brain", "coronal"): head.brain_coronal,
        ("brain", "sagittal"): head.brain_sagittal,
        ("knee", "coronal"): knee.knee_coronal,
        ("knee", "sagittal"): knee.knee_sagittal,
    }[scene](body, rng)
    machine = sections.ct if shown.modality == "CT" else sections.mr
    return _bytes(machine(c, rng, shown, layers, noise))


def _bytes(image: np.ndarray) -> np.ndarray:
    """uint8 of an image in 0..1."""
    return (image * np.float32(255) + np.float32(0.5)).astype(np.uint8)


def generate(
    seed: int, n: int, split: str = "pretrain", size: int = 224, start: int = 0
) -> Iterator[tuple[np.ndarray, Facts]]:
    """Images `start` to `start + n - 1` of a split with their facts, one by one (see `draw_image`).

    The `pretrain` split shares no image with the files that `write` makes. `Facts.ids()` gives
    class numbers.
    """
    for index in range(start, start + n):
        yield draw_image(seed, split, index, size)
