"""Cross-sections of the head as stacks of tissue layers (see `trunk.py`), for CT and MR."""

from __future__ import annotations

import numpy as np

from medmoe_jax.data.phantom.canvas import Canvas, Layers, smooth


def _cortex(c: Canvas, rng: np.random.Generator, q: np.ndarray, unit: float) -> Layers:
    """Brain inside q < 1: grey ribbon with sulci around folded white matter."""
    folds = smooth(rng, c.shape, 15)
    brain = c.inside(q, unit)
    sulci = np.clip(1.1 - np.abs(smooth(rng, c.shape, 13)) * 9, 0, 1)
    sulci *= np.clip((q - 0.7) * 8, 0, 1)
    return [
        ("csf", c.inside(q, unit, 1.05)),
        ("grey", brain),
        ("white", brain * c.inside(q + np.float32(0.1) * folds, unit, 0.83)),
        ("csf", 0.85 * sulci * brain),
    ]


def _skull(c: Canvas, q: np.ndarray, unit: float) -> Layers:
    """Scalp, skull with marrow; the brain's surface is q = 1."""
    return [
        ("skin", c.inside(q, unit, 1.24)),
        ("fat", c.inside(q, unit, 1.215)),
        ("bone", c.inside(q, unit, 1.16)),
        ("marrow", 0.8 * c.inside(q, unit, 1.125) * (1 - c.inside(q, unit, 1.095))),
    ]


def brain_axial(c: Canvas, rng: np.random.Generator) -> Layers:
    """Head, axial at the level of the lateral ventricles."""
    q = c.radius(0, 0, 0.64, 0.765)
    wide = rng.uniform(0.8, 1.25)
    layers = _skull(c, q, 0.64) + _cortex(c, rng, q, 0.64)
    for s in (-1, 1):
        layers += [
            ("grey", c.ellipse(s * 0.24, -0.02, 0.07, 0.17, s * 0.25)),
            ("grey", c.ellipse(s * 0.1, 0.07, 0.085, 0.12, s * -0.3)),
            ("csf", c.ellipse(s * 0.085, -0.17, 0.045 * wide, 0.15, s * -0.3)),
            ("csf", c.ellipse(s * 0.13, 0.23, 0.05 * wide, 0.15, s * 0.35)),
        ]
    midline = np.clip(1.3 - np.abs(c.x) * 90, 0, 1) * (np.abs(c.y) > 0.33) * c.inside(q, 0.64)
    return [*layers, ("csf", 0.8 * midline)]


def brain_coronal(c: Canvas, rng: np.random.Generator) -> Layers:
    """Head, coronal: hemispheres with temporal lobes, ventricles, cerebellum and brain stem,
    neck."""
    q = np.minimum(c.radius(0, -0.16, 0.68, 0.66), c.radius(0, 0.25, 0.63, 0.4))
    layers: Layers = [
        ("skin", c.ellipse(0, 0.75, 0.52, 0.7, power=4.0)),
        ("muscle", c.ellipse(0, 0.75, 0.49, 0.7, power=4.0)),
        *_skull(c, q, 0.6),
        *_cortex(c, rng, q, 0.6),
    ]
    for s in (-1, 1):
        layers += [
            ("csf", c.ellipse(s * 0.5, 0.08, 0.17, 0.018, s * 0.25)),
            ("grey", c.ellipse(s * 0.2, -0.02, 0.09, 0.11)),
            ("csf", c.ellipse(s * 0.1, -0.19, 0.035, 0.12, s * 0.7)),
        ]
    stripes = np.clip(np.sin(c.y * 75) * 1.5 - 0.3, 0, 1)
    cerebellum = c.ellipse(0, 0.55, 0.4, 0.17)
    midline = np.clip(1.3 - np.abs(c.x) * 90, 0, 1) * (c.y < -0.3) * c.inside(q, 0.6)
    return [
        *layers,
        ("csf", c.ellipse(0, 0.0, 0.018, 0.13)),
        ("csf", 0.8 * midline),
        ("csf", c.ellipse(0, 0.53, 0.43, 0.21)),
        ("grey", cerebellum),
        ("csf", 0.6 * cerebellum * stripes),
        ("white", c.ellipse(0, 0.62, 0.12, 0.42)),
    ]


def brain_sagittal(c: Canvas, rng: np.random.Generator) -> Layers:
    """Head, sagittal, the face to the left: corpus callosum, brain stem, cerebellum, cervical
    cord."""
    q = np.minimum(c.radius(0.04, -0.1, 0.76, 0.62), c.radius(0.0, 0.1, 0.74, 0.46))
    bow = c.radius(0.06, -0.02, 0.36, 0.26)
    callosum = np.clip(1.6 - np.abs(bow - 1) * 13, 0, 1) * (1 - c.below(0.05))
    fan = np.clip(np.sin(np.arctan2(c.y - 0.42, c.x - 0.26) * 15) * 1.5 - 0.2, 0, 1)
    discs = np.clip(np.sin(c.y * 42) * 4 - 2.8, 0, 1)
    cerebellum = c.ellipse(0.42, 0.42, 0.24, 0.19, -0.2)
    return [
        ("skin", c.ellipse(-0.42, 0.55, 0.45, 0.6, power=4.0)),
        ("skin", c.ellipse(-0.86, 0.42, 0.1, 0.16, 0.5)),
        ("fat", c.ellipse(-0.42, 0.55, 0.42, 0.57, power=4.0)),
        ("muscle", c.ellipse(-0.38, 0.75, 0.36, 0.34, power=4.0)),
        ("gas", c.ellipse(-0.55, 0.68, 0.2, 0.06)),
        ("skin", c.ellipse(0.35, 0.9, 0.46, 0.6, power=4.0)),
        ("fat", c.ellipse(0.35, 0.9, 0.44, 0.6, power=4.0)),
        ("muscle", c.ellipse(0.35, 0.9, 0.38, 0.58, power=4.0)),
        *_skull(c, q, 0.58),
        *_cortex(c, rng, q, 0.58),
        ("csf", c.ellipse(0.1, -0.03, 0.28, 0.15, power=4.0) * (bow < 0.9)),
        ("grey", c.ellipse(0.08, 0.07, 0.17, 0.1)),
        ("white", callosum),
        ("csf", c.ellipse(0.36, 0.4, 0.32, 0.25, -0.2)),
        ("bone", c.ellipse(0.02, 1.0, 0.1, 0.42, -0.08, power=4.0)),
        ("marrow", c.ellipse(0.02, 1.0, 0.08, 0.4, -0.08, power=4.0)),
        ("cartilage", c.ellipse(0.02, 1.0, 0.1, 0.42, -0.08, power=4.0) * discs),
        ("csf", c.ellipse(0.18, 0.85, 0.08, 0.5, -0.08)),
        ("fat", 0.6 * c.ellipse(0.34, 0.95, 0.06, 0.4, -0.05)),
        ("grey", cerebellum),
        ("white", cerebellum * fan * 0.8),
        ("white", c.ellipse(0.09, 0.27, 0.11, 0.14, -0.3)),
        ("white", c.ellipse(0.16, 0.75, 0.055, 0.55, -0.1)),
    ]
