"""Patches back on the picture: what the picture's pixels do to the square decides."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from medmoe_jax.analyse import geometry
from medmoe_jax.data import images
from medmoe_jax.data.images import ImageSpec

SIDE = 4


@pytest.mark.parametrize("aspect", ["pad", "square"])
@pytest.mark.parametrize("size", [(96, 48), (40, 100), (64, 64), (33, 70), (201, 128)])
@pytest.mark.parametrize(("resize", "crop"), [(32, 32), (48, 32), (24, 32)])
def test_points_are_where_the_pixels_go(
    aspect: str, size: tuple[int, int], resize: int, crop: int
) -> None:
    """The middle of a bright spot of the picture is the middle of the bright spot in the square."""
    spec = ImageSpec(resize, crop, aspect, mean=(0.0,) * 3)
    width, height = size
    where = images.placement(width, height, spec)
    rng = np.random.default_rng(0)
    for _ in range(5):
        corner = rng.integers(0, np.array(size) - 20)
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[corner[1] : corner[1] + 20, corner[0] : corner[0] + 20] = 255
        square = images.fit(Image.fromarray(pixels), spec)[..., 0].astype(float)
        middle = where.to_square(corner + 10.0)
        reach = 10 * np.asarray(where.resized) / np.asarray(where.padded) + 2
        if (middle - reach < 0).any() or (middle + reach > crop).any():
            continue  # cut off
        y, x = np.indices(square.shape) + 0.5
        found = np.array([(square * x).sum(), (square * y).sum()]) / square.sum()
        np.testing.assert_allclose(found, middle, atol=0.35)
        np.testing.assert_allclose(where.to_picture(middle), corner + 10.0)


@pytest.mark.parametrize("aspect", ["pad", "square"])
@pytest.mark.parametrize("size", [(96, 48), (40, 100), (64, 64)])
def test_overlay_marks_the_pixels_that_matter(aspect: str, size: tuple[int, int]) -> None:
    """A function that looks at one patch only: the pixels of the picture that change it are those
    that the overlay marks."""
    spec, (width, height) = ImageSpec(32, 32, aspect), size
    where = images.placement(width, height, spec)
    there = geometry.shows_picture(where, width, height, SIDE)
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
    whole = images.fit(Image.fromarray(pixels), spec).astype(int)
    for row, column in np.argwhere(there):
        values = np.zeros((SIDE, SIDE))
        values[row, column] = 1.0
        marked = geometry.on_picture(values, where, width, height)
        assert marked.shape == (height, width)
        other = pixels.copy()
        other[marked == 1] = 255 - other[marked == 1]
        change = np.abs(images.fit(Image.fromarray(other), spec).astype(int) - whole).sum(-1)
        each = change.reshape(SIDE, 8, SIDE, 8).sum((1, 3))
        # Bicubic resizing lets a little of it into the neighbours.
        assert each[row, column] > 0.8 * each.sum() > 0


def test_padding_and_what_was_cut_off() -> None:
    wide = ImageSpec(32, 32, "pad")
    where = images.placement(96, 48, wide)
    there = geometry.shows_picture(where, 96, 48, SIDE)
    assert there.tolist() == [[False] * 4, [True] * 4, [True] * 4, [False] * 4]
    values = np.arange(16.0).reshape(4, 4)
    shown = geometry.on_picture(values, where, 96, 48)
    assert np.isfinite(shown).all() and set(np.unique(shown)) == set(range(4, 12))
    assert (shown[:24, :24] == 4).all() and (shown[24:, 72:] == 11).all()

    cropped = images.placement(96, 48, ImageSpec(32, 32, "square"))
    assert geometry.shows_picture(cropped, 96, 48, SIDE).all()
    shown = geometry.on_picture(values, cropped, 96, 48)
    assert np.isnan(shown[:, :24]).all() and np.isnan(shown[:, 72:]).all()
    assert (shown[:12, 24:36] == 0).all() and (shown[36:, 60:72] == 15).all()
