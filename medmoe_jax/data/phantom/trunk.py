"""Cross-sections of chest and abdomen as stacks of tissue layers, for CT and MR.

A scene is a list of (tissue, mask) pairs in the order of painting; `sections.py` gives the tissues
their values. The canvas that comes in is already bent and shifted a little, which makes plain
ellipses look grown.
"""

from __future__ import annotations

import numpy as np

from medmoe_jax.data.phantom.canvas import Canvas, Layers, smooth


def _shell(c: Canvas, rx: float, ry: float, power: float, fat: float) -> Layers:
    """Skin, fat of the given thickness and muscle of a trunk."""
    q = c.radius(0, 0, rx, ry, power=power)
    unit = min(rx, ry)
    return [
        ("skin", c.inside(q, unit)),
        ("fat", c.inside(q, unit, 0.98)),
        ("muscle", c.inside(q, unit, 0.98 - fat)),
    ]


def _ribs(c: Canvas, rng: np.random.Generator, rx: float, ry: float) -> Layers:
    """Cut ribs along an ellipse: bright pieces of an arc."""
    q = c.radius(0, 0, rx, ry)
    ring = np.clip(1.6 - np.abs(q - 1) * np.float32(36), 0, 1)
    turn = np.arctan2(c.y / np.float32(ry), c.x / np.float32(rx))
    gaps = np.clip(np.sin(turn * rng.integers(9, 12) + np.float32(rng.uniform(0, 6.3))) * 3, 0, 1)
    return [("bone", ring * gaps)]


def _spine(c: Canvas, y: float, size: float) -> Layers:
    """Vertebra with canal and processes, seen from above."""
    return [
        ("bone", c.ellipse(0, y + 1.1 * size, 1.7 * size, 0.22 * size)),
        ("bone", c.ellipse(0, y + 1.6 * size, 0.2 * size, 0.75 * size)),
        ("bone", c.ellipse(0, y, size, 0.8 * size)),
        ("marrow", c.ellipse(0, y, 0.86 * size, 0.66 * size)),
        ("csf", c.ellipse(0, y + 1.02 * size, 0.36 * size, 0.26 * size)),
    ]


def _branches(c: Canvas, rng: np.random.Generator) -> np.ndarray:
    """Cut vessels of a lung: dots, large ones near the middle and fine ones everywhere."""
    near = np.exp(-np.square(c.x) * 9)
    large = np.clip(smooth(rng, c.shape, 22) * 2.2 - 3.3 + 1.2 * near, 0, 1)
    fine = np.clip(smooth(rng, c.shape, 44) * 1.6 - 2.1, 0, 1)
    return np.maximum(0.8 * large, 0.35 * fine)


def lungs_axial(c: Canvas, rng: np.random.Generator) -> Layers:
    """Chest, axial: two lungs, heart, great vessels, ribs, vertebra."""
    left, right = (c.ellipse(s * 0.43, 0.02, 0.37, 0.59, s * 0.1) for s in (-1, 1))
    lung = np.maximum(left, right)
    return [
        *_shell(c, 0.95, 0.76, 2.6, rng.uniform(0.05, 0.1)),
        *_ribs(c, rng, 0.83, 0.64),
        ("bone", c.ellipse(0, -0.62, 0.14, 0.035)),
        ("fat", c.ellipse(0, -0.05, 0.2, 0.5)),
        ("lung", lung),
        ("vessel", lung * _branches(c, rng)),
        ("heart", c.ellipse(0.07, -0.19, 0.22, 0.17, 0.5)),
        ("vessel", c.ellipse(0.13, 0.27, 0.075, 0.075)),
        ("vessel", c.ellipse(-0.1, -0.14, 0.07, 0.08)),
        ("gas", c.ellipse(-0.05, 0.12, 0.045, 0.05)),
        *_spine(c, 0.46, 0.14),
    ]


def lungs_coronal(c: Canvas, rng: np.random.Generator) -> Layers:
    """Chest, coronal: tall lungs over the diaphragm, heart, windpipe, shoulders."""
    dome = np.float32(0.74) + 0.35 * np.square(np.abs(c.x) - np.float32(0.4))
    above = 1 - c.below(dome - 0.05 * (c.x < 0))
    lung = np.maximum(
        c.ellipse(-0.42, 0.1, 0.36, 0.92, 0.08), c.ellipse(0.42, 0.1, 0.36, 0.92, -0.08)
    )
    lung *= above
    side = np.abs(np.abs(c.x) - np.float32(0.83) + 0.12 * np.square(c.y - np.float32(0.1)))
    ribs = np.clip(1.5 - side * 36, 0, 1) * np.clip(np.sin(c.y * 26) * 3 + 0.4, 0, 1)
    layers = [
        ("skin", c.ellipse(0, 0.35, 0.985, 1.4, power=4.0)),
        ("fat", c.ellipse(0, 0.35, 0.965, 1.37, power=4.0)),
        ("muscle", c.ellipse(0, 0.4, 0.91, 1.34, power=4.0)),
        ("air", c.ellipse(-0.95, -1.0, 0.5, 0.3)),
        ("air", c.ellipse(0.95, -1.0, 0.5, 0.3)),
        ("bone", ribs * (c.y > -0.6)),
        ("liver", c.below(dome) * c.ellipse(-0.25, 0.9, 0.62, 0.5)),
        ("spleen", c.below(dome) * c.ellipse(0.6, 1.0, 0.26, 0.3)),
        ("lung", lung),
        ("vessel", lung * _branches(c, rng)),
        ("vessel", c.ellipse(0.06, -0.35, 0.12, 0.3)),
        ("heart", c.ellipse(0.09, 0.44, 0.25, 0.29, 0.4)),
        ("gas", c.ellipse(-0.01, -0.72, 0.05, 0.4)),
    ]
    for s in (-1, 1):
        layers.append(("bone", c.ellipse(s * 0.8, -0.66, 0.12, 0.1)))
        layers.append(("marrow", c.ellipse(s * 0.8, -0.66, 0.09, 0.07)))
        layers.append(("bone", c.ellipse(s * 0.42, -0.86, 0.24, 0.035, s * 0.25)))
    return layers


def liver_axial(c: Canvas, rng: np.random.Generator) -> Layers:
    """Upper abdomen, axial: liver, stomach, spleen, vessels, vertebra."""
    tree = np.clip(1.2 - np.abs(smooth(rng, c.shape, 7)) * 14, 0, 1)
    liver = np.maximum(
        c.ellipse(-0.44, 0.02, 0.45, 0.6, 0.1), c.ellipse(-0.05, -0.24, 0.36, 0.26, 0.15)
    )
    stomach = c.ellipse(0.48, -0.27, 0.36, 0.31, -0.2)
    return [
        *_shell(c, 0.97, 0.77, 2.6, rng.uniform(0.05, 0.12)),
        *_ribs(c, rng, 0.87, 0.675),
        ("fat", c.ellipse(0, 0.0, 0.82, 0.62)),
        ("liver", liver),
        ("vessel", 0.7 * liver * tree),
        ("muscle", stomach),
        ("stomach", c.ellipse(0.48, -0.27, 0.325, 0.275, -0.2)),
        ("gas", stomach * (1 - c.below(-0.47))),
        ("spleen", c.ellipse(0.55, 0.26, 0.28, 0.32, -0.35)),
        ("vessel", c.ellipse(0.09, 0.2, 0.075, 0.075)),
        ("vessel", c.ellipse(-0.12, 0.16, 0.07, 0.055)),
        *_spine(c, 0.42, 0.15),
    ]


def liver_coronal(c: Canvas, rng: np.random.Generator) -> Layers:
    """Abdomen, coronal: liver and spleen under the lung bases, kidneys, bowel, spine, pelvis."""
    side = np.abs(np.abs(c.x) - 0.86)
    dome = np.float32(-0.76) + 0.5 * np.square(np.abs(c.x) - np.float32(0.42))
    wall = c.ellipse(0, 0, 0.84, 1.3, power=4.0)
    loops = np.clip(smooth(rng, c.shape, 9) * 2 + 0.4, 0, 1)
    layers = [
        ("skin", c.ellipse(0, 0, 0.97, 1.6, power=4.0)),
        ("fat", c.ellipse(0, 0, 0.95, 1.57, power=4.0)),
        ("muscle", c.ellipse(0, 0, 0.89, 1.4, power=4.0)),
        (
            "bone",
            np.clip(1.4 - side * 38, 0, 1) * np.clip(np.sin(c.y * 24) * 3, 0, 1) * (c.y < 0.1),
        ),
        ("fat", wall),
        ("bowel", wall * loops * c.below(0.0)),
        ("lung", wall * (1 - c.below(dome))),
        ("liver", c.below(dome) * c.ellipse(-0.42, -0.4, 0.42, 0.52, 0.2)),
        ("liver", c.below(dome) * c.ellipse(-0.1, -0.55, 0.34, 0.22, -0.2)),
        ("stomach", c.below(dome) * c.ellipse(0.32, -0.5, 0.28, 0.28, 0.3)),
        ("spleen", c.below(dome) * c.ellipse(0.62, -0.42, 0.23, 0.36, -0.15)),
        ("kidney", c.ellipse(-0.45, 0.33, 0.23, 0.33, 0.15)),
        ("kidney", c.ellipse(0.46, 0.3, 0.23, 0.33, -0.15)),
        ("fat", c.ellipse(-0.33, 0.33, 0.07, 0.14)),
        ("fat", c.ellipse(0.34, 0.3, 0.07, 0.14)),
        ("bone", c.ellipse(0, 0, 0.12, 1.3, power=4.0)),
        ("marrow", c.ellipse(0, 0, 0.1, 1.3, power=4.0)),
        (
            "cartilage",
            c.ellipse(0, 0, 0.12, 1.3, power=4.0) * np.clip(np.sin(c.y * 19 + 0.7) * 5 - 3.9, 0, 1),
        ),
    ]
    for s in (-1, 1):
        layers.append(("muscle", c.ellipse(s * 0.2, 0.55, 0.1, 0.5, s * -0.12)))
        layers.append(("bone", c.ellipse(s * 0.66, 0.93, 0.1, 0.24, s * 0.6)))
        layers.append(("marrow", c.ellipse(s * 0.66, 0.93, 0.075, 0.21, s * 0.6)))
    return layers
