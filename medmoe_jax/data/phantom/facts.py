"""What a phantom study shows: the facts that are drawn first and then rendered, asked about and
captioned.

Sides and quadrants are those of the *image* ("left" = the viewer's left), never of the patient, so
that the answer can be seen without knowing a viewing convention. "Upper" and "lower" are the halves
of the image as well. Reading path: facts -> canvas -> trunk, head, knee -> sections, xray,
pathology -> render -> questions -> balance -> write.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from medmoe_jax.config import MODALITIES

PLANES = ("axial", "coronal", "sagittal", "frontal", "lateral")
ORGANS = ("lungs", "liver", "brain", "knee", "colon", "muscle", "fat")
COUNTS = ("zero", "one", "two", "three")
SIZES = ("small", "large")
SIDES = ("left", "right", "both")
QUADRANTS = ("upper left", "upper right", "lower left", "lower right")
WEIGHTINGS = ("T1", "T2")
DENSITIES = ("sparse", "dense")

# Most organs appear in two modalities and most planes too, so that no fact gives another one away.
SCENES = {
    "CT": (
        ("lungs", "axial"),
        ("lungs", "coronal"),
        ("liver", "axial"),
        ("liver", "coronal"),
        ("brain", "axial"),
        ("brain", "sagittal"),
    ),
    "MRI": (
        ("brain", "axial"),
        ("brain", "coronal"),
        ("brain", "sagittal"),
        ("liver", "axial"),
        ("liver", "coronal"),
        ("knee", "coronal"),
        ("knee", "sagittal"),
    ),
    "X-ray": (("lungs", "frontal"), ("lungs", "lateral"), ("knee", "frontal"), ("knee", "lateral")),
    "Pathology": (("colon", ""), ("muscle", ""), ("fat", "")),
}
COUNT_PROBABILITIES = (0.28, 0.32, 0.2, 0.2)
# Radius of a lesion in half image sides = its diameter as a share of the longer side. A patch of a
# 112-pixel image with 14-pixel patches is 0.125: small lesions fill 1.2 to 1.4 patches across,
# large ones 2.2 to 2.4.
RADII = {"small": (0.15, 0.175), "large": (0.275, 0.3)}
# Centre and half extents of the place for a lesion within the quadrant at the lower right, in half
# image sides.
HOST = (0.39, 0.345, 0.33, 0.32)
HOSTS = {
    ("lungs", "axial"): (0.42, 0.33, 0.33, 0.31),
    ("lungs", "coronal"): (0.41, 0.36, 0.32, 0.34),
    ("lungs", "frontal"): (0.42, 0.35, 0.33, 0.33),
    ("lungs", "lateral"): (0.37, 0.35, 0.30, 0.33),
    ("liver", "axial"): (0.46, 0.33, 0.32, 0.31),
    ("liver", "coronal"): (0.43, 0.37, 0.31, 0.34),
    ("brain", "axial"): (0.325, 0.32, 0.24, 0.25),
    ("brain", "coronal"): (0.33, 0.31, 0.24, 0.25),
    ("brain", "sagittal"): (0.355, 0.315, 0.25, 0.24),
    ("colon", ""): (0.48, 0.48, 0.43, 0.43),
    ("muscle", ""): (0.48, 0.48, 0.43, 0.43),
    ("fat", ""): (0.48, 0.48, 0.43, 0.43),
}


@dataclass(frozen=True)
class Lesion:
    """One lesion. `x` (rightwards) and `y` (downwards) of the centre and `radius` are in half
    longer image sides, from the image centre; `quadrant` is one of QUADRANTS."""

    x: float
    y: float
    radius: float
    quadrant: str


@dataclass(frozen=True)
class Facts:
    """Everything that questions and captions may say about an image. Empty text: does not apply."""

    modality: str
    organ: str
    plane: str  # "" in pathology
    weighting: str  # MRI only
    density: str  # of the nuclei; pathology only
    size: str  # of all lesions of the image; "" without lesions
    lesions: tuple[Lesion, ...]

    @property
    def present(self) -> str:
        """ "yes" where there is at least one lesion, else "no"."""
        return "yes" if self.lesions else "no"

    @property
    def count(self) -> str:
        """Number of lesions as a word of COUNTS."""
        return COUNTS[len(self.lesions)]

    @property
    def quadrants(self) -> tuple[str, ...]:
        """Quadrants that hold a lesion, in the order of QUADRANTS."""
        held = {lesion.quadrant for lesion in self.lesions}
        return tuple(q for q in QUADRANTS if q in held)

    @property
    def side(self) -> str:
        """Side of the image on which all lesions lie: a word of SIDES, or "" without lesions."""
        sides = {quadrant.split()[1] for quadrant in self.quadrants}
        return "both" if len(sides) == 2 else "".join(sides)

    def ids(self) -> dict[str, int]:
        """Class index of every fact; -1 where it does not apply. Quadrants are four 0/1 entries of
        their own."""
        named = {
            "modality": (self.modality, MODALITIES),
            "organ": (self.organ, ORGANS),
            "plane": (self.plane, PLANES),
            "weighting": (self.weighting, WEIGHTINGS),
            "density": (self.density, DENSITIES),
            "present": (self.present, ("no", "yes")),
            "count": (self.count, COUNTS),
            "size": (self.size, SIZES),
            "side": (self.side, SIDES),
        }
        ids = {key: table.index(name) if name else -1 for key, (name, table) in named.items()}
        return ids | {q.replace(" ", "_"): int(q in self.quadrants) for q in QUADRANTS}


def lesion_map(facts: Facts, grid: int) -> np.ndarray:
    """Which patches of the image, padded to a square, have their centre in a lesion (or, for a
    small lesion between patches, near it).

    Args:
      facts: of the image.
      grid: patches along a side.

    Returns:
      int64[grid, grid], row by row from the top: 0 no lesion, else 1 + index of its size in SIZES.
    """
    places = (np.arange(grid) + 0.5) * 2 / grid - 1
    kinds = np.zeros((grid, grid), np.int64)
    for lesion in facts.lesions:
        distance = np.hypot(places[None, :] - lesion.x, places[:, None] - lesion.y)
        kinds[distance < max(lesion.radius, 1.42 / grid)] = 1 + SIZES.index(facts.size)
    return kinds


def draw(rng: np.random.Generator, modality: str) -> Facts:
    """Draws the facts of one image of `modality`; every fact is independent of the others where
    both apply."""
    scenes = SCENES[modality]
    organ, plane = scenes[rng.integers(len(scenes))]
    count = int(rng.choice(4, p=COUNT_PROBABILITIES))
    size = SIZES[rng.integers(2)]
    cx, cy, ex, ey = HOSTS.get((organ, plane), HOST)
    lesions = []
    for index in rng.permutation(4)[:count]:
        quadrant = QUADRANTS[index]
        radius = rng.uniform(*RADII[size])
        # The radius is taken off the extents: a lesion stays inside its place, off the middle and
        # off the others.
        x = cx + rng.uniform(-1, 1) * max(ex - radius, 0.0)
        y = cy + rng.uniform(-1, 1) * max(ey - radius, 0.0)
        sign_x = -1 if quadrant.endswith("left") else 1
        sign_y = -1 if quadrant.startswith("upper") else 1
        lesions.append(Lesion(float(sign_x * x), float(sign_y * y), float(radius), quadrant))
    return Facts(
        modality=modality,
        organ=organ,
        plane=plane,
        weighting=WEIGHTINGS[rng.integers(2)] if modality == "MRI" else "",
        density=DENSITIES[rng.integers(2)] if modality == "Pathology" else "",
        size=size if count else "",
        lesions=tuple(lesions),
    )
