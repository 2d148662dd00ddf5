"""Microscopy of stained tissue: amounts of haematoxylin (nuclei) and eosin (the rest) absorb white
light."""

from __future__ import annotations

import numpy as np

from medmoe_jax.data.phantom.canvas import Canvas, make_cells, mix, smooth, white
from medmoe_jax.data.phantom.facts import Facts
from medmoe_jax.data.phantom.lesion import blobs

# Optical densities of red, green, blue for one unit of stain.
HAEMATOXYLIN = (0.72, 0.85, 0.32)
EOSIN = (0.08, 0.62, 0.25)


def _nuclei(
    rng: np.random.Generator,
    x: np.ndarray,
    y: np.ndarray,
    spacing: float,
    share: float,
    radius: float,
) -> np.ndarray:
    """float32[h, w] amount of haematoxylin of elliptic nuclei on a jittered lattice; `share` of the
    places are filled.

    `radius` is in lattice spacings. Sizes, directions and tints vary from nucleus to nucleus.
    """
    cells = make_cells(rng, x, y, spacing, 0.7)
    turn = rng.uniform(0, np.pi, cells.count)
    stretch = rng.uniform(1.0, 1.5, cells.count)
    size = radius * rng.uniform(0.75, 1.25, cells.count)
    tint = rng.uniform(0.65, 1.15, cells.count) * (rng.random(cells.count) < share)
    c, s = np.cos(turn), np.sin(turn)
    # One gather a coefficient of the inverse axes, instead of one a parameter and arithmetic a
    # pixel.
    table = np.stack([c * stretch / size, s * stretch / size, -s / size, c / size, tint])
    a, b, d, e, tint_here = table.astype(np.float32)[:, cells.index]
    q = np.hypot(a * cells.offset_x + b * cells.offset_y, d * cells.offset_x + e * cells.offset_y)
    body = np.clip((1.15 - q) * 4, 0, 1)
    return tint_here * body * (0.75 + 0.25 * q)


def _colon(c: Canvas, rng: np.random.Generator, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Crypts: a pale opening, pale goblet cells, a ring of nuclei; stroma between them."""
    crypts = make_cells(rng, c.x, c.y, 0.52, 0.45)
    size = rng.uniform(0.36, 0.46, crypts.count).astype(np.float32)
    q = crypts.nearest / size[crypts.index] + np.float32(0.06) * smooth(rng, c.shape, 14)
    gland = np.clip((1.0 - q) * 12, 0, 1)
    eosin = np.float32(0.75) + 0.12 * smooth(rng, c.shape, 24)
    nuclei = _nuclei(rng, c.x, c.y, 0.06, share, 0.34)
    haematoxylin = nuclei * np.clip((q - 1.02) * 10, 0, 1)
    goblets = make_cells(rng, c.x, c.y, 0.075, 0.6)
    mix(eosin, gland, 0.22 + 0.5 * np.clip((goblets.nearest - 0.35) * 3, 0, 1))
    mix(eosin, np.clip((0.3 - q) * 14, 0, 1), 0.06)
    ring = np.clip(1.25 - np.abs(q - 0.86) * 9, 0, 1)
    rim = _nuclei(rng, c.x, c.y, 0.05, 0.95, 0.42)
    return np.maximum(haematoxylin, 0.85 * ring * rim) + 0.07 * gland, eosin


def _muscle(c: Canvas, rng: np.random.Generator, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Long parallel fibres with pale gaps, fine cross-striation and thin nuclei along them."""
    angle = rng.uniform(-0.5, 0.5) + (np.pi / 2 if rng.random() < 0.5 else 0)
    s, t = np.float32(np.sin(angle)), np.float32(np.cos(angle))
    along, across = t * c.x + s * c.y, t * c.y - s * c.x
    across = across + np.float32(0.05) * smooth(rng, c.shape, 3)
    phase = across * np.float32(rng.uniform(19, 26)) + 0.5 * smooth(rng, c.shape, 4)
    gap = np.clip((np.abs(np.sin(phase)) - 0.04) * 5, 0, 1)
    eosin = 0.95 + 0.1 * np.sin(phase * 2 + 1) + 0.07 * smooth(rng, c.shape, 12)
    eosin += 0.05 * np.sin(along * np.float32(150))
    eosin = np.float32(0.15) + gap * (eosin - 0.15)
    nuclei = _nuclei(rng, along / 2.6, across, 0.062, share, 0.27)
    return nuclei * np.clip(1.3 - gap * 0.25, 0, 1), eosin


def _fat(c: Canvas, rng: np.random.Generator, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Empty round fat cells with thin walls; nuclei sit in the walls."""
    cells = make_cells(rng, c.x, c.y, rng.uniform(0.22, 0.27), 0.65)
    gap = cells.second - cells.nearest
    wall = np.clip(1.4 - gap * 8, 0, 1)
    corner = np.clip((cells.nearest - 0.5) * 6, 0, 1) * np.clip(1.6 - gap * 4, 0, 1)
    tissue = np.maximum(wall, corner)
    eosin = 0.03 + tissue * (0.72 + 0.1 * smooth(rng, c.shape, 30))
    nuclei = _nuclei(rng, c.x, c.y, 0.055, share, 0.36)
    return nuclei * np.clip(tissue * 2.5 - 0.5, 0, 1), eosin


def stained(c: Canvas, rng: np.random.Generator, facts: Facts, noise: float) -> np.ndarray:
    """Micrograph with the lesions (nests of crowded dark nuclei), float32[h, w, 3] in 0..1.

    `noise` scales the pixel noise (1 at 224 pixels).
    """
    share = 0.12 if facts.density == "sparse" else 0.85
    tissue = {"colon": _colon, "muscle": _muscle, "fat": _fat}[facts.organ]
    zoom = np.float32(rng.uniform(0.9, 1.12))
    bent = Canvas(
        c.x * zoom + np.float32(rng.uniform(0, 1)) + 0.03 * smooth(rng, c.shape, 4),
        c.y * zoom + np.float32(rng.uniform(0, 1)) + 0.03 * smooth(rng, c.shape, 4),
        c.soft,
    )
    haematoxylin, eosin = tissue(bent, rng, share)
    nests = blobs(c, rng, facts, 0.09)
    if nests:
        crowd = _nuclei(rng, bent.x, bent.y, 0.055, 1.0, 0.5)
        for field, lesion in zip(nests, facts.lesions, strict=True):
            nest = c.inside(field, lesion.radius)
            mix(haematoxylin, nest, 0.5 + 0.85 * crowd)
            mix(eosin, nest, 0.55)
    haematoxylin *= np.float32(rng.uniform(0.85, 1.15))
    eosin *= np.float32(rng.uniform(0.8, 1.2))
    image = np.empty((*c.shape, 3), np.float32)
    for channel in range(3):
        h = HAEMATOXYLIN[channel] * rng.uniform(0.93, 1.07)
        e = EOSIN[channel] * rng.uniform(0.9, 1.1)
        absorbed = np.float32(h) * haematoxylin + np.float32(e) * eosin
        grain = np.float32(0.012 * noise) * white(rng, c.shape)
        image[:, :, channel] = np.float32(0.965) * np.exp(-absorbed) + grain
    return np.clip(image, 0, 1)
