"""X-ray projections: thicknesses of tissue add up along the beam, and dense things are bright."""

from __future__ import annotations

import numpy as np

from medmoe_jax.data.phantom.canvas import Canvas, smooth, white
from medmoe_jax.data.phantom.facts import Facts
from medmoe_jax.data.phantom.knee import long_bone
from medmoe_jax.data.phantom.lesion import blobs


def _thickness(q: np.ndarray) -> np.ndarray:
    """Length of the beam in an ellipsoid whose projected radius field is `q`; 1 in the centre."""
    return np.sqrt(np.clip(1 - q * q, 0, None))


def _tube(c: Canvas, cx: float, cy: float, rx: float, ry: float, angle: float = 0.0) -> np.ndarray:
    """A long bone: bright cortex at both rims, less in the middle."""
    q = c.radius(cx, cy, rx, ry, angle, 4.0)
    return c.inside(q, rx) * (0.55 + 0.45 * np.clip((q - 0.72) * 5, 0, 1))


def _lung(c: Canvas, rng: np.random.Generator) -> np.ndarray:
    """Vessel markings, densest near the hilum."""
    web = np.clip(1 - np.abs(smooth(rng, c.shape, 12)) * 1.8, 0, 1) * np.clip(
        smooth(rng, c.shape, 6), 0, 1
    )
    near = np.exp(-np.square(np.abs(c.x) - np.float32(0.18)) * 9 - np.square(c.y) * 3)
    return web * (0.25 + near)


def chest_frontal(c: Canvas, rng: np.random.Generator) -> np.ndarray:
    """Attenuation of a chest from the front, float32[h, w]."""
    across = np.abs(c.x)
    body = _thickness(c.radius(0, 0.35, 1.02, 1.45, power=4.0))
    shoulders = _thickness(c.radius(0, -0.25, 1.25, 0.75))
    neck = c.ellipse(0, -1.0, 0.2, 0.4, power=4.0)
    dome = np.float32(0.70) + 0.5 * np.square(across - np.float32(0.4)) + 0.05 * (c.x > 0)
    lungs = np.maximum(
        c.radius(-0.44, 0.12, 0.37, 0.92, 0.09) < 1, c.radius(0.44, 0.12, 0.37, 0.92, -0.09) < 1
    )
    field = np.minimum(
        c.radius(-0.44, 0.12, 0.39, 0.94, 0.09), c.radius(0.44, 0.12, 0.39, 0.94, -0.09)
    )
    air = np.clip(_thickness(field) * 1.5, 0, 1) * (1 - c.below(dome))
    cage = c.ellipse(0, 0.15, 0.9, 1.02)
    back = np.sin((c.y - 0.30 * across + 0.30 * across * across) * np.float32(37))
    front = np.sin((c.y + 0.42 * across) * np.float32(25) + 1)
    ribs = np.clip(back * 1.6, 0, 1) * (across > 0.08) + 0.55 * np.clip(front * 2 - 0.6, 0, 1) * (
        across > 0.28
    )
    heart = np.maximum(
        c.inside(c.radius(0.15, 0.42, 0.36, 0.31, 0.55), 0.12),
        c.inside(c.radius(-0.05, 0.32, 0.24, 0.3), 0.12),
    )
    middle = np.clip(1.25 - np.abs(c.x - 0.02) * 6.5, 0, 1) * (c.y > -0.9)
    spine = np.clip(1.5 - across * 11, 0, 1) * (0.75 + 0.25 * np.sin(c.y * 30))
    collar = sum(_tube(c, s * 0.46, -0.68, 0.045, 0.4, s * (np.pi / 2 - 0.2)) for s in (-1, 1))
    arms = sum(_tube(c, s * 0.98, -0.3, 0.12, 0.45, s * -0.15) for s in (-1, 1))
    density = 0.42 * np.maximum(body, 0.9 * shoulders) + 0.2 * neck
    density -= 0.33 * air
    density += 0.1 * lungs * _lung(c, rng) * (1 - c.below(dome))
    density += 0.1 * ribs * cage * (1 - 0.6 * c.below(dome))
    density += 0.26 * heart + 0.2 * middle + 0.1 * spine
    density += 0.16 * c.below(dome) * cage
    density += 0.15 * collar + 0.14 * arms
    return density - 0.12 * c.ellipse(-0.01, -0.6, 0.05, 0.38)


def chest_lateral(c: Canvas, rng: np.random.Generator) -> np.ndarray:
    """Attenuation of a chest from the side, the breastbone to the left, float32[h, w]."""
    body = _thickness(c.radius(0.0, 0.3, 0.93, 1.5, power=4.0))
    dome = np.float32(0.68) + 0.5 * np.square(c.x + np.float32(0.15)) - 0.1 * c.x
    field = np.minimum(c.radius(0.03, 0.1, 0.72, 0.95), c.radius(-0.1, 0.2, 0.6, 0.7))
    air = np.clip(_thickness(field) * 1.4, 0, 1) * (1 - c.below(dome))
    ribs = np.clip(np.sin((c.y - 0.55 * c.x + 0.25 * c.x * c.x) * np.float32(27)) * 1.8 - 0.2, 0, 1)
    spine_x = c.x - np.float32(0.62) - 0.1 * np.square(c.y)
    spine = np.clip(1.5 - np.abs(spine_x) * 9, 0, 1)
    discs = 0.7 + 0.3 * np.clip(np.sin(c.y * 25) * 3, -1, 1)
    breastbone = np.clip(1.5 - np.abs(c.x + 0.74 - 0.12 * c.y) * 32, 0, 1) * (c.y < 0.35)
    heart = _thickness(c.radius(-0.27, 0.46, 0.46, 0.33, 0.5))
    density = 0.45 * body - 0.34 * air
    density += 0.12 * air * _lung(c, rng)
    density += 0.075 * ribs * c.ellipse(0, 0.1, 0.8, 1.0)
    density += 0.26 * spine * discs * (np.abs(c.x) < 0.95)
    density += 0.12 * breastbone + 0.22 * heart + 0.2 * c.below(dome) * (body > 0)
    density += 0.2 * np.clip(_thickness(c.radius(0.1, -1.0, 0.55, 0.38)), 0, 1)
    return density - 0.1 * c.ellipse(0.08, -0.6, 0.06, 0.4, -0.1)


def knee_frontal(c: Canvas, rng: np.random.Generator) -> np.ndarray:
    """Attenuation of a knee from the front, float32[h, w]."""
    femur = long_bone(c, 0, -0.04, 0.36, 0.66, True) * (1 - 0.6 * c.ellipse(0, -0.02, 0.13, 0.12))
    kneecap = 0.05 * c.inside(c.radius(0, -0.38, 0.24, 0.26), 0.08)
    plateau = np.clip(1.3 - np.abs(c.y - 0.11) * 32, 0, 1) * (np.abs(c.x) < 0.62)
    density = _leg(c, rng, femur, long_bone(c, 0, 0.06, 0.36, 0.68, False), 0.0)
    return density + kneecap + 0.06 * plateau + 0.14 * _tube(c, 0.76, 0.8, 0.09, 0.45)


def knee_lateral(c: Canvas, rng: np.random.Generator) -> np.ndarray:
    """Attenuation of a knee from the side, the kneecap to the left, float32[h, w]."""
    femur = long_bone(c, 0.07, -0.03, 0.36, 0.62, True)
    density = _leg(c, rng, femur, long_bone(c, 0.07, 0.07, 0.36, 0.6, False), 0.07)
    # The second condyle lies a little off the first one.
    density += 0.05 * long_bone(c, 0.12, -0.06, 0.3, 0.55, True)
    density += 0.24 * c.ellipse(-0.76, -0.2, 0.1, 0.21, -0.12)
    return density + 0.1 * _tube(c, 0.62, 0.8, 0.09, 0.45, 0.08)


def _leg(
    c: Canvas, rng: np.random.Generator, femur: np.ndarray, tibia: np.ndarray, x: float
) -> np.ndarray:
    """Attenuation of flesh and of two bones around `x`, with bright cortex along the shafts."""
    flesh = _thickness(c.radius(0, 0, 0.95, 2.2, power=4.0))
    shafts = _cortex(c, x, np.abs(c.y) - 0.45)
    bone = np.maximum(femur, tibia)
    stripes = np.sin(c.x * np.float32(70) + 3 * smooth(rng, c.shape, 8))
    spongy = 0.016 * (stripes + smooth(rng, c.shape, 30))
    density = 0.24 * flesh * (1 - 0.1 * np.clip(smooth(rng, c.shape, 4), -1, 1))
    return density + bone * (0.24 + 0.12 * shafts + spongy)


def _cortex(c: Canvas, x: float, along: np.ndarray) -> np.ndarray:
    """1 near the rims of a shaft of half width 0.36, rising from 0 where `along` < 0."""
    rim = np.clip(1.4 - np.abs(np.abs(c.x - np.float32(x)) - 0.32) * 22, 0, 1)
    return rim * np.clip(along * 5, 0, 1)


def film(
    c: Canvas, rng: np.random.Generator, facts: Facts, density: np.ndarray, noise: float
) -> np.ndarray:
    """Exposed film with the lesions, float32[h, w] in 0..1. `noise` scales the pixel noise (1 at
    224 pixels).

    Lesions are dense: a round shadow in a lung, a sclerotic focus in a bone.
    """
    strength = 0.42 if facts.organ == "lungs" else 0.4
    for field in blobs(c, rng, facts, 0.045):
        density = density + np.float32(strength) * np.clip(_thickness(field) * 1.3, 0, 1)
    slope = 0.06 * (c.x * rng.uniform(-1, 1) + c.y * rng.uniform(-1, 1))
    exposure = rng.uniform(1.9, 2.4)
    image = 1 - np.exp(-np.float32(exposure) * np.clip(density + 0.02, 0, None))
    image = (image + slope) * np.float32(rng.uniform(0.95, 1.1))
    image += np.float32(rng.uniform(0.01, 0.025) * noise) * white(rng, c.shape)
    return np.clip(image, 0, 1)
