"""How large a picture may be, so that a small file cannot fill the memory."""

from __future__ import annotations

from medmoe_jax.data.problems import DataError

MAX_PIXELS = 89_478_485  # of a file; Pillow's own bound for a decompression bomb


def check_pixels(width: int, height: int, name: str, most: int = MAX_PIXELS) -> None:
    """Raises DataError where a picture has more than `most` pixels."""
    if width * height > most:
        raise DataError(
            f"image {name!r} has {width} x {height} pixels; {most} are allowed, make it smaller"
        )
