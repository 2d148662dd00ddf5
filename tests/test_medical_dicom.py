"""DICOM files as pictures, against their pixels computed anew from the standard's formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medmoe_jax.config import ViewConfig
from medmoe_jax.data import medical
from medmoe_jax.data.images import open_image

pydicom = pytest.importorskip("pydicom", reason="needs the extra medmoe_jax[medical]")

FILES = Path(pydicom.__path__[0]) / "data" / "test_files"
SOFT = (-150.0, 250.0)  # Hounsfield units: level 50, width 400
SECRET = "Zyxwvut^Quentin"


def grey(path: Path, view: ViewConfig | None = None) -> np.ndarray:
    """The one channel of a picture whose three are equal."""
    picture = open_image(path, view)
    assert picture.mode == "RGB"
    pixels = np.asarray(picture)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


def linear(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """0 to 255, the plain formula."""
    shares = np.array([(v - low) / (high - low) for v in values.ravel().tolist()])
    return np.rint(255 * np.minimum(np.maximum(shares, 0), 1)).reshape(values.shape)


def save(path: Path, pixels: np.ndarray, **tags: Any) -> Path:
    """A DICOM file of stored pixels [H, W], [N, H, W] or [H, W, 3]; a tag that is None is left
    out."""
    ds = pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    ds.SOPClassUID = pydicom.uid.CTImageStorage
    ds.SOPInstanceUID = pydicom.uid.generate_uid()
    ds.PatientName, ds.PatientID, ds.Modality = SECRET, "QZX-4711", "MR"
    colour = pixels.ndim == 3 and pixels.shape[-1] == 3
    frames = pixels.shape[0] if pixels.ndim == 3 and not colour else None
    ds.SamplesPerPixel = 3 if colour else 1
    if colour:
        ds.PlanarConfiguration = 0
    ds.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    ds.Rows, ds.Columns = pixels.shape[1:] if frames else pixels.shape[:2]
    if frames:
        ds.NumberOfFrames = frames
    ds.BitsAllocated = ds.BitsStored = 8 * pixels.dtype.itemsize
    ds.HighBit = ds.BitsStored - 1
    ds.PixelRepresentation = int(pixels.dtype.kind == "i")
    for key, value in tags.items():
        if value is None:
            del ds[key]
        else:
            setattr(ds, key, value)
    ds.PixelData = pixels.tobytes()
    ds["PixelData"].VR = "OB" if pixels.dtype.itemsize == 1 else "OW"
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, ds, enforce_file_format=True)
    return path


def ramp(kind: type = np.int16, start: int = -1000, step: int = 13) -> np.ndarray:
    return (start + step * np.arange(16 * 12).reshape(16, 12)).astype(kind)


def test_the_real_ct() -> None:
    path = FILES / "CT_small.dcm"
    units = np.frombuffer(pydicom.dcmread(path).PixelData, "<i2").reshape(128, 128) - 1024.0
    np.testing.assert_array_equal(grey(path), linear(units, *SOFT))
    lung = grey(path, ViewConfig(window="lung"))
    np.testing.assert_array_equal(lung, linear(units, -1350, 150))
    three = np.asarray(open_image(path, ViewConfig(window="rgb")))
    for channel, window in enumerate([(-1024, 1024), (-135, 215), (0, 80)]):
        np.testing.assert_array_equal(three[..., channel], linear(units, *window))
    assert medical.modality(path) == "CT"


def test_the_real_mr_whatever_its_encoding() -> None:
    path = FILES / "MR_small.dcm"
    values = np.frombuffer(pydicom.dcmread(path).PixelData, "<i2").reshape(64, 64)
    # Window 600 / 1600, LINEAR: from 600 - 0.5 - 799.5 to 600 - 0.5 + 799.5
    expected = linear(values, -200, 1399)
    for name in ("", "_RLE", "_bigendian", "_expb", "_implicit", "_jp2klossless", "_padded"):
        np.testing.assert_array_equal(grey(FILES / f"MR_small{name}.dcm"), expected, name)
    np.testing.assert_array_equal(grey(FILES / "MR_small_jpeg_ls_lossless.dcm"), expected)
    lung = ViewConfig(window="lung")  # Hounsfield units say nothing about an MR image
    np.testing.assert_array_equal(grey(path, lung), expected)
    own = ViewConfig(window="100:900")
    np.testing.assert_array_equal(grey(path, own), linear(values, 100, 900))
    assert medical.modality(path) == "MRI"
