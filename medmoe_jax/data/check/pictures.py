"""Every image is opened once: what is wrong with it, and the hashes that tell it from others."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from medmoe_jax.config import ViewConfig
from medmoe_jax.data import images, medical
from medmoe_jax.data.medical.identity import identifying
from medmoe_jax.data.problems import DataError

SMALLEST = 16  # pixels of the shorter edge; below it there is little to see
LONGEST = 20  # ratio of the edges
THUMB = 32  # pixels
ENDINGS = images.SUFFIXES | {
    medical.DICOM: medical.DICOM_NAMES,
    medical.NIFTI: (".nii", ".gz"),
}


@dataclass(frozen=True)
class Facts:
    """What is known about an image file.

    Attributes:
      fault: why it cannot be used; '' if it can. Nothing below is known otherwise.
      remarks: (kind, text) of what is worth a look.
      exact: hash of the decoded pixels, so that a copy in another lossless format is the same.
      difference: 64 bits: whether the picture gets brighter from column to column (dHash).
      thumb: uint8[THUMB, THUMB], grey.
      modality: that a DICOM file names; '' otherwise.
    """

    fault: str = ""
    remarks: tuple[tuple[str, str], ...] = ()
    exact: str = ""
    difference: int = 0
    thumb: np.ndarray | None = None
    modality: str = ""


def look(path: Path, spec: images.ImageSpec) -> Facts:
    """Opens one image file."""
    try:
        picture = images.open_image(path, spec.view)
        width, height = picture.size
        images.check_fit(width, height, spec)
        found = medical.kind(path)
        remarks = []
        if wrong := _wrong_ending(path, found):
            remarks.append(("wrong extension", wrong))
        if min(width, height) < SMALLEST or max(width, height) > LONGEST * min(width, height):
            remarks.append(("odd size", f"image {path.name!r} has {width} x {height} pixels"))
        tags = identifying(path) if found == medical.DICOM else ()
        if tags:
            text = f"image {path.name!r} has the DICOM tags {', '.join(tags)}"
            remarks.append(("tags of a patient", text))
        grey = picture.convert("L")
        return Facts(
            "",
            tuple(remarks),
            _exact(picture),
            _difference(grey),
            np.asarray(grey.resize((THUMB, THUMB), Image.Resampling.BOX)),
            medical.modality(path) if found == medical.DICOM else "",
        )
    except DataError as error:
        text = str(error)
        return Facts(text if path.name in text else f"image {path.name!r}: {text}")


def look_at_all(
    paths: Sequence[Path], view: ViewConfig | None = None, progress: bool = True
) -> dict[Path, Facts]:
    """`look` for many files, in threads: decoding leaves Python's lock."""
    spec = images.ImageSpec(336, 336, view=view or ViewConfig())
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        stream = pool.map(lambda path: look(path, spec), paths)
        bar = tqdm(stream, "images", len(paths), disable=not progress, dynamic_ncols=True)
        return dict(zip(paths, bar, strict=True))


def _wrong_ending(path: Path, found: str) -> str:
    """What is wrong with the ending of a file's name; files without one say nothing wrong."""
    ending = path.suffix.lower()
    if not ending or not any(ending in endings for endings in ENDINGS.values()):
        return ""
    if not found:
        with Image.open(path, formats=images.FORMATS) as image:
            found = str(image.format)
    found = "JPEG" if found == "MPO" else found
    if ending in ENDINGS.get(found, (ending,)):
        return ""
    return f"image {path.name!r} is a {found} file"


def _exact(picture: Image.Image) -> str:
    size = f"{picture.width}x{picture.height}".encode()
    return hashlib.sha256(size + picture.tobytes()).hexdigest()


def _difference(grey: Image.Image) -> int:
    small = np.asarray(grey.resize((9, 8), Image.Resampling.LANCZOS), np.int16)
    return int.from_bytes(np.packbits(small[:, 1:] > small[:, :-1]).tobytes(), "big")
