"""NIfTI file -> one slice as a picture.

Whatever the order of the voxels in the file, its affine says where the patient's right, front and
top are, and the picture shows them in the same way as a DICOM viewer (radiological convention):
axial and coronal slices have the patient's right on the left of the picture, sagittal ones the
front on the left; the front (axial) or the head (coronal, sagittal) is at the top.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from PIL import Image

from medmoe_jax.config import ViewConfig
from medmoe_jax.data.medical import windows
from medmoe_jax.data.medical.shape import square_pixels
from medmoe_jax.data.problems import DataError
from medmoe_jax.data.size import check_pixels

MAX_VOXELS = 1 << 30  # of a volume


def read(path: Path, view: ViewConfig) -> Image.Image:
    """The chosen slice of the first volume, mode L or RGB.

    Values are those after `scl_slope` and `scl_inter`. A window is one of `windows` (NIfTI does not
    say whether voxels are Hounsfield units: a named one is used as it is asked for); without one,
    the file's `cal_min` and `cal_max`, or the range of the slice. What is no number is black.

    Raises:
      DataError: broken, no picture, too large, or nibabel is not installed.
    """
    try:
        from nibabel import fileholders, nifti1, nifti2
    except ImportError:
        raise DataError(
            f"image {path.name!r} is a NIfTI file; reading it needs nibabel: "
            "pip install 'medmoe_jax[medical]'"
        ) from None
    windows.check_view(view)
    try:
        with path.open("rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path) if zipped else path.open("rb") as stream:
            second = _is_second(stream)
            kind = nifti2.Nifti2Image if second else nifti1.Nifti1Image
            holder = fileholders.FileHolder(fileobj=stream)
            image = kind.from_file_map({"header": holder, "image": holder})
            plane, spacing = _plane(image, view, path.name)
            header = image.header
            shown = float(header["cal_min"]), float(header["cal_max"])
    except DataError:
        raise
    except Exception as error:  # the text of nibabel's errors may repeat what the file holds
        raise DataError(
            f"image {path.name!r} is a broken NIfTI file ({type(error).__name__}); "
            "a pair of .hdr and .img has to be joined to one .nii"
        ) from None
    if plane.ndim == 2 and plane.dtype.names:
        plane = np.stack([plane[name] for name in plane.dtype.names[:3]], -1).astype(np.uint8)
    picture = plane if plane.ndim == 3 else _grey(plane, view.window, shown, path.name)
    return square_pixels(Image.fromarray(picture), spacing, path.name)


def _is_second(stream: BinaryIO | gzip.GzipFile) -> bool:
    """Whether the header is one of NIfTI-2, by its length; the stream is at its start again."""
    head = stream.read(4)
    stream.seek(0)
    return 540 in (int.from_bytes(head, "little"), int.from_bytes(head, "big"))


def _plane(image: Any, view: ViewConfig, name: str) -> tuple[np.ndarray, tuple[float, float]]:
    """Values [H, W] of the slice as it is shown, and the height and width of a voxel in mm."""
    from nibabel.orientations import io_orientation

    shape = (*image.shape, 1, 1)[: max(3, len(image.shape))]
    if len(image.shape) < 2 or 0 in shape:
        raise DataError(f"image {name!r} is no picture: its shape is {list(image.shape)}")
    if np.prod(shape[:3], dtype=float) > MAX_VOXELS:
        raise DataError(
            f"image {name!r} has {' x '.join(map(str, shape[:3]))} voxels; {MAX_VOXELS} are "
            "allowed, cut it"
        )
    affine = image.affine
    orientation = io_orientation(affine if np.isfinite(affine).all() else np.eye(4))
    if np.isnan(orientation).any():  # an axis that lies nowhere
        orientation = np.array([[0, 1], [1, 1], [2, 1]])
    source = [int(np.flatnonzero(orientation[:, 0] == axis)[0]) for axis in range(3)]
    backward = [orientation[source[axis], 1] < 0 for axis in range(3)]
    flat = [axis for axis in range(3) if shape[source[axis]] == 1]
    cut = flat[0] if len(flat) == 1 else windows.AXES.index(view.axis)
    across, down = [axis for axis in range(3) if axis != cut]
    many = shape[source[cut]]
    check_pixels(shape[source[across]], shape[source[down]], name)
    at = windows.choose_slice(view, many, name, "slice")
    place: list[Any] = [slice(None)] * 3 + [0] * (len(shape) - 3)
    place[source[cut]] = many - 1 - at if backward[cut] else at
    data = np.asarray(image.dataobj[tuple(place[: len(image.shape)])])
    if source[across] < source[down]:  # the picture's rows are the axis that points down
        data = data.T
    # The axes of RAS+ grow to the right, to the front and to the head; a picture's grow to the
    # left of the patient and down.
    data = data[:: 1 if backward[down] else -1, :: 1 if backward[across] else -1]
    sizes = [*map(float, image.header.get_zooms()), 1.0, 1.0]
    return data, (sizes[source[down]], sizes[source[across]])


def _grey(plane: np.ndarray, window: str, shown: windows.Window, name: str) -> np.ndarray:
    """uint8[H, W], or [H, W, 3] with the window 'rgb'."""
    if np.iscomplexobj(plane):
        plane = np.abs(plane)
    values = plane.astype(np.float64)
    usable = np.isfinite(values)
    if not usable.any():
        raise DataError(f"image {name!r}: the slice holds no number that is finite")
    if windows.number_in_file(window):
        raise DataError(f"image {name!r} is a NIfTI file; it has one window at most, file:0")
    explicit = windows.given(window)
    if explicit is not None:
        chosen: tuple[windows.Window, ...] = (explicit,)
    else:
        chosen = windows.hounsfield(window)
    if not chosen:
        own = np.isfinite(shown).all() and shown[0] < shown[1]
        chosen = (shown if own else windows.own_range(values, usable),)
    values = np.nan_to_num(values, nan=-np.inf, posinf=np.inf, neginf=-np.inf)
    bands = [windows.to_bytes(windows.between(values, cast(windows.Window, c))) for c in chosen]
    return bands[0] if len(bands) == 1 else np.stack(bands, -1)
