"""CT and MR: tissue layers become grey values, with the noise and the artefacts of the machine.

CT values are Hounsfield units shown through a window; MR values are relative signals of spin-echo
images, in which water is dark (T1) or bright (T2).
"""

from __future__ import annotations

import numpy as np

from medmoe_jax.data.phantom.canvas import Canvas, Layers, mix, smooth, white
from medmoe_jax.data.phantom.facts import Facts
from medmoe_jax.data.phantom.lesion import blobs

HOUNSFIELD = {
    "air": -1000,
    "skin": 10,
    "fat": -95,
    "muscle": 55,
    "bone": 650,
    "marrow": 210,
    "lung": -840,
    "vessel": 170,
    "heart": 160,
    "liver": 108,
    "spleen": 118,
    "kidney": 150,
    "bowel": 35,
    "stomach": 60,
    "gas": -930,
    "csf": 4,
    "grey": 40,
    "white": 29,
    "tendon": 80,
    "cartilage": 60,
    "fluid": 5,
}
T1 = {
    "air": 0.0,
    "skin": 0.55,
    "fat": 0.74,
    "muscle": 0.36,
    "bone": 0.05,
    "marrow": 0.52,
    "lung": 0.04,
    "vessel": 0.1,
    "heart": 0.2,
    "liver": 0.52,
    "spleen": 0.4,
    "kidney": 0.45,
    "bowel": 0.42,
    "stomach": 0.36,
    "gas": 0.02,
    "csf": 0.12,
    "grey": 0.45,
    "white": 0.63,
    "tendon": 0.06,
    "cartilage": 0.42,
    "fluid": 0.15,
}
T2 = {
    "air": 0.0,
    "skin": 0.3,
    "fat": 0.55,
    "muscle": 0.2,
    "bone": 0.04,
    "marrow": 0.36,
    "lung": 0.03,
    "vessel": 0.05,
    "heart": 0.15,
    "liver": 0.3,
    "spleen": 0.48,
    "kidney": 0.56,
    "bowel": 0.42,
    "stomach": 0.5,
    "gas": 0.02,
    "csf": 0.97,
    "grey": 0.5,
    "white": 0.36,
    "tendon": 0.05,
    "cartilage": 0.6,
    "fluid": 0.97,
}


def ct(
    c: Canvas, rng: np.random.Generator, facts: Facts, layers: Layers, noise: float
) -> np.ndarray:
    """Windowed CT slice, float32[h, w] in 0..1. `noise` scales the pixel noise (1 at 224
    pixels)."""
    image = np.full(c.shape, HOUNSFIELD["air"], np.float32)
    enhancement = rng.uniform(0.8, 1.2)
    for tissue, mask in layers:
        value = HOUNSFIELD[tissue]
        if tissue in ("vessel", "heart", "liver", "spleen", "kidney"):
            value *= enhancement
        mix(image, mask, value)
    texture = smooth(rng, c.shape, 30)
    for field, lesion in zip(blobs(c, rng, facts, 0.07), facts.lesions, strict=True):
        body = c.inside(field, lesion.radius)
        if facts.organ == "lungs":  # calcified
            mix(image, body, 290 + 40 * texture)
        elif facts.organ == "liver":  # a richly perfused mass
            mix(image, 0.7 * c.inside(field, lesion.radius, 1.12), 70)
            mix(image, body, 235 + 16 * texture)
        else:  # fresh blood with oedema around it
            mix(image, 0.8 * c.inside(field, lesion.radius, 1.15), 14)
            mix(image, body, 80 + 4 * texture)
    level, width = {
        "lungs": (-320, 1650) if rng.random() < 0.5 else (30, 520),
        "liver": (70, 360),
        "brain": (38, 84),
    }[facts.organ]
    level += 0.05 * width * rng.uniform(-1, 1)
    width *= rng.uniform(0.9, 1.1)
    # Noise as a share of the window: what a reader sees does not grow with the window.
    grain = white(rng, c.shape)
    grain[1:] += 0.6 * grain[:-1]
    grain[:, 1:] += 0.6 * grain[:, :-1]
    angle = rng.uniform(0, np.pi)
    along = c.x * np.float32(np.sin(angle)) - c.y * np.float32(np.cos(angle))
    across = along * np.float32(rng.uniform(40, 80)) + 2 * smooth(rng, c.shape, 3)
    streak = np.sin(across) * np.exp(-np.square(along) * 6)
    image = (image - np.float32(level)) / np.float32(width) + 0.5
    image += np.float32(rng.uniform(0.018, 0.038) * noise) * grain
    image += np.float32(rng.uniform(0.0, 0.02)) * streak
    return np.clip(image, 0, 1)


def mr(
    c: Canvas, rng: np.random.Generator, facts: Facts, layers: Layers, noise: float
) -> np.ndarray:
    """MR slice, float32[h, w] in 0..1, with a bias field and Rician noise. `noise` as in `ct`."""
    table = T1 if facts.weighting == "T1" else T2
    image = np.zeros(c.shape, np.float32)
    for tissue, mask in layers:
        mix(image, mask, table[tissue] * rng.uniform(0.94, 1.06))
    texture = smooth(rng, c.shape, 26)
    image *= 1 + np.float32(0.03) * texture
    for field, lesion in zip(blobs(c, rng, facts, 0.08), facts.lesions, strict=True):
        body = c.inside(field, lesion.radius)
        if facts.weighting == "T2":
            mix(image, 0.6 * c.inside(field, lesion.radius, 1.12), 0.65)
        else:
            mix(image, 0.6 * c.inside(field, lesion.radius, 1.12), 0.25)
        # Bright in both: full of water (T2), or enhanced by contrast medium (T1).
        mix(image, body, 0.97 + 0.07 * texture)
    bias = smooth(rng, c.shape, 1.6)
    image *= 1 + np.float32(rng.uniform(0.04, 0.12)) * bias
    sigma = np.float32(rng.uniform(0.02, 0.045) * noise)
    image += sigma * white(rng, c.shape)
    image = np.hypot(image, sigma * white(rng, c.shape))
    return np.clip(image * np.float32(rng.uniform(0.88, 1.05)), 0, 1)
