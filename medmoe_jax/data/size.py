"""How large a picture may be, so that a small file cannot fill the memory."""

from __future__ import annotations

from medmoe_jax.data.problems import DataError

MAX_PIXELS = 89_478_485  # of a file; Pillow's own bound for a decompression bomb


def check_pixels(width: int, height: int, name: str) -> None:
    """Raises DataError where a picture has more than MAX_PIXELS pixels."""
    if width * height > MAX_PIXELS:
        raise DataError(
            f"image {name!r} has {width} x {height} pixels; {MAX_PIXELS} are allowed, make it "
            "smaller"
        )
