"""The knee: bones for MR and X-ray, and the cross-sections for MR as stacks of tissue layers (see
`trunk.py`)."""

from __future__ import annotations

import numpy as np

from medmoe_jax.data.phantom.canvas import Canvas, Layers, smooth


def long_bone(
    c: Canvas, x: float, tip: float, shaft: float, flare: float, up: bool, grow: float = 0.0
) -> np.ndarray:
    """Mask of a bone that is wide at the joint and narrows to its shaft.

    The joint's end is at y = `tip`, the shaft runs on upwards (`up`) or downwards around `x`;
    `shaft` and `flare` are the half widths far from and near to the joint; the surface is moved
    outwards by `grow`.
    """
    along = (np.float32(tip) - c.y if up else c.y - np.float32(tip)) + np.float32(grow)
    width = shaft + (flare - shaft) * np.exp(
        -np.float32(8) * np.square(np.maximum(along - 0.18, 0))
    )
    corner = np.clip(1 - along / np.float32(0.3), 0, 1)
    width = width * np.sqrt(np.sqrt(1 - np.square(np.square(corner)) + 1e-6)) + np.float32(grow)
    beyond = np.abs(c.x - np.float32(x)) - width
    return np.clip(0.5 - beyond / np.float32(c.soft), 0, 1) * (along > 0)


def knee_coronal(c: Canvas, rng: np.random.Generator) -> Layers:
    """Knee, coronal: both condyles of the femur over the tibia, menisci, fibula."""
    notch = c.ellipse(0, 0.02, 0.13, 0.13)
    return [
        *_joint(c, rng, 0.0, 0.68, notch),
        ("tendon", c.ellipse(-0.58, 0.04, 0.13, 0.045, 0.2)),
        ("tendon", c.ellipse(0.58, 0.04, 0.13, 0.045, -0.2)),
        ("tendon", c.ellipse(-0.03, -0.03, 0.035, 0.13, 0.35)),
        ("bone", c.ellipse(0.74, 0.8, 0.12, 0.32)),
        ("marrow", c.ellipse(0.74, 0.8, 0.095, 0.29)),
    ]


def knee_sagittal(c: Canvas, rng: np.random.Generator) -> Layers:
    """Knee, sagittal, the kneecap to the left."""
    return [
        *_joint(c, rng, 0.07, 0.62, np.zeros_like(c.x)),
        ("tendon", c.ellipse(-0.78, -0.75, 0.03, 0.4, -0.12)),
        ("tendon", c.ellipse(-0.72, 0.22, 0.03, 0.4, 0.15)),
        ("bone", c.ellipse(-0.76, -0.2, 0.11, 0.22, -0.1)),
        ("marrow", c.ellipse(-0.76, -0.2, 0.085, 0.195, -0.1)),
        ("tendon", c.ellipse(0.25, 0.03, 0.03, 0.13, 0.8)),
        ("tendon", c.ellipse(-0.34, 0.04, 0.14, 0.04, 0.1)),
        ("tendon", c.ellipse(0.55, 0.04, 0.12, 0.045, -0.2)),
    ]


def _joint(
    c: Canvas, rng: np.random.Generator, x: float, flare: float, notch: np.ndarray
) -> Layers:
    """Soft parts and the two large bones around `x`; `notch` is cut out of the femur."""
    muscle = np.clip(smooth(rng, c.shape, 7) * 2 + 0.7, 0, 1)
    muscle *= np.clip(np.abs(c.y) * 5 - 1.5, 0, 1) * c.ellipse(0, 0, 0.85, 1.6, power=4.0)
    grain = np.clip(0.1 * smooth(rng, c.shape, 34), 0, 0.2)
    near_joint = c.ellipse(0, 0.03, 0.8, 0.2)
    layers: Layers = [
        ("skin", c.ellipse(0, 0, 0.95, 1.65, power=4.0)),
        ("fat", c.ellipse(0, 0, 0.925, 1.6, power=4.0)),
        ("muscle", muscle),
        ("fluid", c.ellipse(0, 0.04, 0.7, 0.1)),
    ]
    for up, tip in ((True, -0.01), (False, 0.09)):
        cut = 1 - notch if up else 1.0
        marrow = long_bone(c, x, tip, 0.36, flare, up, -0.025) * cut
        layers += [
            ("cartilage", long_bone(c, x, tip, 0.36, flare, up, 0.025) * near_joint),
            ("bone", long_bone(c, x, tip, 0.36, flare, up)),
            ("fluid", notch * float(up)),
            ("marrow", marrow),
            ("muscle", marrow * grain),
        ]
    return layers
