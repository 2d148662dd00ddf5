"""Grey values -> 8 bits: windows of a file, windows in Hounsfield units, or the values' own range.

The named windows are the usual ones of radiology (level and width as in Radiopaedia, "Windowing
(CT)"); departments differ by some tens of units. `rgb` shows three at once, as red, green and blue:
those that Google's MedGemma 1.5 was given for CT.
"""

from __future__ import annotations

import math
import re

import numpy as np

from medmoe_jax.config import ViewConfig
from medmoe_jax.data.problems import DataError

Window = tuple[float, float]  # the values shown black and white


def _around(level: float, width: float) -> Window:
    return level - width / 2, level + width / 2


NAMED: dict[str, Window] = {  # Hounsfield units
    "soft_tissue": _around(50, 400),
    "liver": _around(30, 150),
    "lung": _around(-600, 1500),
    "mediastinum": _around(50, 350),
    "bone": _around(400, 1800),
    "brain": _around(40, 80),
    "stroke": _around(40, 40),
    "temporal_bone": _around(600, 2800),
    "spine": _around(50, 250),
}
RGB = "rgb"
RGB_WINDOWS: tuple[Window, ...] = ((-1024, 1024), (-135, 215), (0, 80))  # all, soft tissue, brain
DEFAULT_CT = NAMED["soft_tissue"]  # of a CT image that brings no window
TAILS = (0.5, 99.5)  # percent of the values between black and white where nothing else is known
AXES = ("sagittal", "coronal", "axial")  # the axis of RAS+ voxels that is cut
_FILE = re.compile(r"file:(\d+)")
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)"
_RANGE = re.compile(rf"({_NUMBER}):({_NUMBER})")


def check_view(view: ViewConfig) -> None:
    """Raises DataError where a view says something that does not exist."""
    if view.window not in ("", RGB, *NAMED) and not _FILE.fullmatch(view.window):
        explicit = given(view.window)
        if explicit is None or explicit[0] >= explicit[1]:
            raise DataError(
                f"the window {view.window!r} is unknown; use {', '.join([RGB, *NAMED])}, LOW:HIGH "
                "with LOW below HIGH, as in -160:240, or file:N for window N of the file, from 0"
            )
    if view.axis not in AXES:
        raise DataError(f"the axis {view.axis!r} is unknown; use one of {', '.join(AXES)}")
    if view.slice < -1:
        raise DataError(f"slice {view.slice} does not exist; count from 0, -1 is the middle one")


def given(window: str) -> Window | None:
    """The numbers of 'LOW:HIGH'; None where the window is no such text."""
    match = _RANGE.fullmatch(window)
    return (float(match[1]), float(match[2])) if match else None


def hounsfield(window: str) -> tuple[Window, ...]:
    """The windows behind a name of this file, three for 'rgb'; none for other texts."""
    return RGB_WINDOWS if window == RGB else (NAMED[window],) if window in NAMED else ()


def number_in_file(window: str) -> int:
    """N of 'file:N', 0 for other texts."""
    match = _FILE.fullmatch(window)
    return int(match[1]) if match else 0


def choose_slice(view: ViewConfig, many: int, name: str, what: str) -> int:
    """The number of the slice or frame to show.

    Raises:
      DataError: the file has none of that number.
    """
    if view.slice >= many:
        raise DataError(
            f"image {name!r} has {many} {what}(s); there is no {what} {view.slice}, the last one "
            f"is {many - 1}"
        )
    return many // 2 if view.slice < 0 else view.slice


def between(values: np.ndarray, window: Window) -> np.ndarray:
    """0 (black) to 1 (white), linear within the window; f64 of the shape of `values`."""
    low, high = window
    return np.clip((values - low) / (high - low), 0, 1)


def from_tags(values: np.ndarray, centre: float, width: float, function: str) -> np.ndarray:
    """0 to 1 by a window of a DICOM file.

    Args:
      values: after rescaling.
      centre: Window Center (0028,1050).
      width: Window Width (0028,1051), above 0; at least 1 with LINEAR.
      function: VOI LUT Function (0028,1056): LINEAR, LINEAR_EXACT or SIGMOID.

    Source: DICOM PS3.3, C.11.2.1.2 and C.11.2.1.3.
    """
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (values - centre) / width, -80, 80)))
    if function == "LINEAR_EXACT":
        return between(values, (centre - width / 2, centre + width / 2))
    if width == 1:  # a threshold
        return (values > centre - 0.5).astype(np.float64)
    half = (width - 1) / 2
    return between(values, (centre - 0.5 - half, centre - 0.5 + half))


def own_range(values: np.ndarray, counted: np.ndarray) -> Window:
    """Nearly the whole range of the values that count, tails left out.

    Args:
      values: any shape.
      counted: bool, same shape; False = padding or no number.
    """
    chosen = values[counted]
    if not chosen.size:
        return 0.0, 1.0
    low, high = (float(v) for v in np.percentile(chosen, TAILS))
    if not low < high:
        low, high = float(chosen.min()), float(chosen.max())
    return (low, high) if low < high else (low, math.nextafter(low, math.inf) + 1)


def to_bytes(shares: np.ndarray) -> np.ndarray:
    """0..1 -> uint8."""
    return np.rint(shares * 255).astype(np.uint8)
