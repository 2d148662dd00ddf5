"""DICOM and NIfTI files: recognised by their content, shown as 8-bit pictures.

What a picture shows is `config.ViewConfig`; docs/medical-files.md describes it to users. Nothing of
a patient is read: of a DICOM file only the tags that describe pixels are asked for, and messages
never repeat a value of the file or what a library says about one.
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

from PIL import Image

from medmoe_jax.config import ViewConfig
from medmoe_jax.data.medical import dicom, nifti
from medmoe_jax.data.problems import DataError

DICOM, NIFTI = "DICOM", "NIfTI"
DICOM_NAMES = (".dcm", ".dicom", ".ima")  # files without the 128 bytes before 'DICM' need one
NIFTI_NAMES = (".nii", ".nii.gz")
_PREAMBLE = 128
_NIFTI_1, _NIFTI_2 = 344, 4  # where the magic bytes of the two versions lie
_HEAD = 352  # bytes


def kind(path: Path) -> str:
    """DICOM, NIFTI, or '' for other files; the content decides, names where it is silent.

    Raises:
      DataError: the file cannot be read, or is a DICOM file within an archive.
    """
    try:
        with path.open("rb") as stream:
            head = stream.read(_HEAD)
    except OSError as error:
        raise DataError(f"image {path.name!r} cannot be read: {error.strerror}") from error
    zipped = head[:2] == b"\x1f\x8b"
    if zipped:
        try:
            with gzip.open(path) as stream:
                head = stream.read(_HEAD)
        except (OSError, EOFError, zlib.error):
            pass  # a broken archive: its name decides, and reading it will tell
    if head[_PREAMBLE : _PREAMBLE + 4] == b"DICM":
        if zipped:
            raise DataError(
                f"image {path.name!r} is a DICOM file that was packed by gzip; unpack it"
            )
        return DICOM
    if head[_NIFTI_1 : _NIFTI_1 + 4] in (b"n+1\0", b"ni1\0") or head[_NIFTI_2:8] == b"n+2\0":
        return NIFTI
    name = path.name.lower()
    return DICOM if name.endswith(DICOM_NAMES) else NIFTI if name.endswith(NIFTI_NAMES) else ""


def open_medical(path: Path, found: str, view: ViewConfig) -> Image.Image:
    """The picture of a file of kind `found`, mode L or RGB.

    Raises:
      DataError: the file is broken or holds no picture, the extra is not installed, or the view
        does not exist.
    """
    return dicom.read(path, view) if found == DICOM else nifti.read(path, view)


def modality(path: Path) -> str:
    """What the file says its modality is: a name of `config.MODALITIES`, another name such as
    'ultrasound', or '' where it does not say (NIfTI and ordinary pictures never do)."""
    return dicom.modality(path) if kind(path) == DICOM else ""
