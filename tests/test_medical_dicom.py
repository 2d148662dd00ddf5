"""DICOM files as pictures, against their pixels computed anew from the standard's formulas."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medmoe_jax.config import ViewConfig
from medmoe_jax.data import medical
from medmoe_jax.data.images import ImageSpec, load_image, open_image
from medmoe_jax.data.medical import windows
from medmoe_jax.data.problems import DataError

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


def test_rescale_and_windows(tmp_path: Path) -> None:
    stored = ramp()
    units = stored * 2.0 - 24
    tags = {"Modality": "CT", "RescaleSlope": 2, "RescaleIntercept": -24}
    two = {"WindowCenter": [40, -600], "WindowWidth": [401, 1501]}
    path = save(tmp_path / "a.dcm", stored, **tags, **two)
    np.testing.assert_array_equal(grey(path), linear(units, -160.5, 239.5))
    second = grey(path, ViewConfig(window="file:1"))
    np.testing.assert_array_equal(second, linear(units, -1350.5, 149.5))
    with pytest.raises(DataError, match="no window 2"):
        open_image(path, ViewConfig(window="file:2"))
    for name, (low, high) in windows.NAMED.items():
        np.testing.assert_array_equal(grey(path, ViewConfig(window=name)), linear(units, low, high))
    exact = {"WindowCenter": 40, "WindowWidth": 400}
    path = save(tmp_path / "b.dcm", stored, **tags, **exact, VOILUTFunction="LINEAR_EXACT")
    np.testing.assert_array_equal(grey(path), linear(units, -160, 240))
    path = save(tmp_path / "c.dcm", stored, **tags, **exact, VOILUTFunction="SIGMOID")
    expected = np.rint(255 / (1 + np.exp(-4 * (units - 40) / 400)))
    np.testing.assert_array_equal(grey(path), expected)
    path = save(tmp_path / "d.dcm", stored, **tags, WindowCenter=0, WindowWidth=1)
    np.testing.assert_array_equal(grey(path), np.where(units > -0.5, 255, 0))


@pytest.mark.parametrize(
    "absurd",
    [
        {"WindowCenter": 40, "WindowWidth": 0},
        {"WindowCenter": 40, "WindowWidth": -400},
        {"WindowCenter": 90000, "WindowWidth": 10},
        {"WindowCenter": 40},
        {"WindowWidth": 40},
        {},
    ],
)
def test_absurd_windows_count_as_absent(tmp_path: Path, absurd: dict) -> None:
    stored = ramp()
    path = save(tmp_path / "a.dcm", stored, Modality="CT", **absurd)
    np.testing.assert_array_equal(grey(path), linear(stored, *SOFT))
    path = save(tmp_path / "b.dcm", stored, Modality="MR", **absurd)
    low, high = np.percentile(stored, 0.5), np.percentile(stored, 99.5)
    np.testing.assert_array_equal(grey(path), linear(stored, low, high))


def test_tables(tmp_path: Path) -> None:
    """Modality LUT (bytes) and VOI LUT (numbers), with values before and behind the table."""
    stored = np.array([[0, 5, 6, 7], [8, 9, 200, 255]], np.uint8)
    first, second = pydicom.Dataset(), pydicom.Dataset()
    first.add_new("LUTDescriptor", "US", [4, 5, 16])
    first.add_new("LUTData", "OW", np.array([10, 300, 20, 40], "<u2").tobytes())
    second.add_new("LUTDescriptor", "US", [3, 19, 10])
    second.add_new("LUTData", "US", [0, 511, 1023])
    path = save(tmp_path / "a.dcm", stored, ModalityLUTSequence=[first], VOILUTSequence=[second])
    units = np.array([[10, 10, 300, 20], [40, 40, 40, 40]])
    expected = np.array([[{10: 0, 20: 511, 40: 1023, 300: 1023}[u] for u in r] for r in units])
    np.testing.assert_array_equal(grey(path), np.rint(expected * 255 / 1023))


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.uint16, np.int32])
def test_monochrome1_is_turned_round(tmp_path: Path, kind: type) -> None:
    stored = ramp(kind, start=20, step=1)
    window = {"WindowCenter": 100, "WindowWidth": 101}
    plain = grey(save(tmp_path / "a.dcm", stored, **window))
    turned = save(tmp_path / "b.dcm", stored, PhotometricInterpretation="MONOCHROME1", **window)
    np.testing.assert_array_equal(plain, linear(stored, 49.5, 149.5))
    np.testing.assert_array_equal(grey(turned), np.rint(255 - linear(stored, 49.5, 149.5)))


def test_eight_bits_stay_and_padding_does_not_count(tmp_path: Path) -> None:
    stored = ramp(np.uint8, start=20, step=1)
    np.testing.assert_array_equal(grey(save(tmp_path / "a.dcm", stored)), stored)
    wide = ramp(np.uint16, start=1000, step=3)
    wide[0] = 65000
    path = save(tmp_path / "b.dcm", wide, PixelPaddingValue=65000)
    low, high = np.percentile(wide[1:], 0.5), np.percentile(wide[1:], 99.5)
    np.testing.assert_array_equal(grey(path), linear(wide, low, high))
    np.testing.assert_array_equal(grey(save(tmp_path / "c.dcm", wide * 0 + 7)), 0)


def test_frames(tmp_path: Path) -> None:
    stored = np.stack([ramp(np.uint8, start=n, step=1) for n in range(5)])
    path = save(tmp_path / "a.dcm", stored)
    np.testing.assert_array_equal(grey(path), stored[2])
    for n in (0, 4):
        np.testing.assert_array_equal(grey(path, ViewConfig(slice=n)), stored[n])
    with pytest.raises(DataError, match=r"'a\.dcm' has 5 frame\(s\); there is no frame 5"):
        open_image(path, ViewConfig(slice=5))
    # An enhanced file keeps slope and window by frame.
    frames = []
    for n in range(5):
        item, value, window = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
        value.RescaleSlope, value.RescaleIntercept, value.RescaleType = 1, -10 * n, "HU"
        window.WindowCenter, window.WindowWidth = 50, 101
        item.PixelValueTransformationSequence, item.FrameVOILUTSequence = [value], [window]
        frames.append(item)
    path = save(tmp_path / "b.dcm", stored, PerFrameFunctionalGroupsSequence=frames)
    for n in (0, 3):
        found = grey(path, ViewConfig(slice=n))
        np.testing.assert_array_equal(found, linear(stored[n] - 10.0 * n, -0.5, 99.5))


def test_colour(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 6, 3), np.uint8)
    found = np.asarray(open_image(save(tmp_path / "a.dcm", pixels)))
    np.testing.assert_array_equal(found, pixels)
    wide = pixels.astype(np.uint16) * 257
    np.testing.assert_array_equal(np.asarray(open_image(save(tmp_path / "b.dcm", wide))), pixels)
    # Y, Cb, Cr of pure red, by JFIF's table
    red = np.broadcast_to(np.array([76, 85, 255], np.uint8), (8, 6, 3)).copy()
    path = save(tmp_path / "c.dcm", red, PhotometricInterpretation="YBR_FULL")
    assert np.abs(np.asarray(open_image(path)).astype(int) - [254, 0, 0]).max() <= 1
    ds = pydicom.dcmread(FILES / "examples_palette.dcm")
    index = np.frombuffer(ds.PixelData, np.uint8).reshape(ds.Rows, ds.Columns)
    table = np.frombuffer(ds.RedPaletteColorLookupTableData, "<u2")
    found = np.asarray(open_image(FILES / "examples_palette.dcm"))[..., 0]
    np.testing.assert_array_equal(found, np.rint(table[index] / 65535 * 255))


@pytest.mark.parametrize("syntax", ["RLELossless", "JPEG2000Lossless"])
def test_compressed(tmp_path: Path, syntax: str) -> None:
    path = save(tmp_path / "a.dcm", np.tile(ramp(), (5, 6)), WindowCenter=0, WindowWidth=1001)
    expected = grey(path)
    ds = pydicom.dcmread(path)
    ds.compress(getattr(pydicom.uid, syntax))
    ds.save_as(path)
    np.testing.assert_array_equal(grey(path), expected)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("SC_rgb_jpeg_dcmtk.dcm", (100, 100)),
        ("SC_rgb_jpeg_gdcm.dcm", (100, 100)),
        ("SC_rgb_jls_lossy_line.dcm", (100, 100)),
        ("SC_rgb_gdcm_KY.dcm", (100, 100)),
        ("SC_rgb_rle_32bit.dcm", (100, 100)),
        ("SC_rgb_jpeg.dcm", (256, 256)),
        ("examples_ybr_color.dcm", (320, 240)),
        ("image_dfl.dcm", (512, 512)),
        ("JPGExtended.dcm", (256, 1024)),
    ],
)
def test_real_files_of_other_syntaxes(name: str, size: tuple[int, int]) -> None:
    picture = open_image(FILES / name)
    assert picture.size == size and picture.mode == "RGB"
    if name.startswith("SC_rgb_") and size == (100, 100):  # all show the same stripes
        first = np.asarray(picture)[5, 50].astype(int)
        assert np.abs(first - [255, 0, 0]).max() <= 6


def test_pixels_become_square(tmp_path: Path) -> None:
    path = save(tmp_path / "a.dcm", ramp(np.uint8, 0, 1), PixelSpacing=[2.0, 1.0])
    assert open_image(path).size == (12, 32)
    path = save(tmp_path / "b.dcm", ramp(np.uint8, 0, 1), PixelAspectRatio=[1, 3])
    assert open_image(path).size == (36, 16)
    path = save(tmp_path / "c.dcm", ramp(np.uint8, 0, 1), PixelSpacing=[0, 1.0])
    assert open_image(path).size == (12, 16)


def test_recognised_by_content(tmp_path: Path) -> None:
    """Without an ending; without a preamble only by the ending."""
    whole = (FILES / "MR_small.dcm").read_bytes()
    (tmp_path / "IM0001").write_bytes(whole)
    expected = grey(FILES / "MR_small.dcm")
    np.testing.assert_array_equal(grey(tmp_path / "IM0001"), expected)
    (tmp_path / "misnamed.png").write_bytes(whole)
    np.testing.assert_array_equal(grey(tmp_path / "misnamed.png"), expected)
    ds = pydicom.dcmread(FILES / "MR_small_implicit.dcm")
    for name in ("bare.dcm", "bare"):
        bare = pydicom.Dataset()
        bare.update({element.tag: element for element in ds})
        pydicom.dcmwrite(tmp_path / name, bare, implicit_vr=True, little_endian=True)
    np.testing.assert_array_equal(grey(tmp_path / "bare.dcm"), expected)
    with pytest.raises(DataError, match="'bare' cannot be read"):
        open_image(tmp_path / "bare")
    spec = ImageSpec(64, 64, view=ViewConfig(window="0:1000"))
    values = np.frombuffer(ds.PixelData, "<i2").reshape(64, 64)
    found = load_image(tmp_path / "IM0001", spec)
    np.testing.assert_array_equal(found[..., 0], linear(values, 0, 1000))


def test_packed_files_are_told(tmp_path: Path) -> None:
    packed = tmp_path / "a.dcm.gz"
    packed.write_bytes(gzip.compress(save(tmp_path / "a.dcm", ramp()).read_bytes()))
    with pytest.raises(DataError, match=r"'a\.dcm\.gz' is a DICOM file .* gzip; unpack it"):
        open_image(packed)


def test_faults_are_told_without_contents(tmp_path: Path) -> None:
    good = save(tmp_path / "good.dcm", ramp())
    cut = tmp_path / "cut.dcm"
    cut.write_bytes(good.read_bytes()[:-50])
    text = tmp_path / "text.dcm"
    text.write_text(f"{SECRET} " * 40)
    huge = save(tmp_path / "huge.dcm", ramp(), Rows=60000, Columns=60000)
    empty = save(tmp_path / "empty.dcm", ramp())
    ds = pydicom.dcmread(empty)
    del ds.PixelData
    ds.save_as(empty)
    odd = save(tmp_path / "odd.dcm", ramp(), PhotometricInterpretation="HSV")
    for path, message in (
        (cut, "missing, truncated or broken"),
        (text, "DICOM file"),
        (huge, "60000 x 60000 pixels"),
        (empty, "missing, truncated or broken"),
        (odd, "kind HSV"),
        (FILES / "MR_truncated.dcm", "missing, truncated or broken"),
        (FILES / "rtplan.dcm", r"without pixels \(Modality RTPLAN\)"),
        (FILES / "waveform_ecg.dcm", "without pixels"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            open_image(path)
        said = str(caught.value)
        assert "Zyx" not in said and "4711" not in said and caught.value.__cause__ is None
    bomb = tmp_path / "bomb.dcm"
    ds = pydicom.dcmread(good)
    ds.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    ds.save_as(bomb)
    np.testing.assert_array_equal(grey(bomb), grey(good))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("medmoe_jax.data.medical.dicom.MAX_PIXELS", 30)
        with pytest.raises(DataError, match="unpacks to more than 240 bytes"):
            open_image(bomb)


def test_views_that_do_not_exist() -> None:
    for view, message in (
        (ViewConfig(window="lungs"), "window 'lungs' is unknown; use rgb, soft_tissue"),
        (ViewConfig(window="40:-40"), "LOW below HIGH"),
        (ViewConfig(axis="oblique"), "axis 'oblique' is unknown"),
        (ViewConfig(slice=-2), "slice -2"),
    ):
        with pytest.raises(DataError, match=message):
            ImageSpec(8, 8, view=view)


@pytest.mark.parametrize(
    ("tag", "name"),
    [
        ("CT", "CT"),
        ("MR", "MRI"),
        ("CR", "X-ray"),
        ("DX", "X-ray"),
        ("SM", "Pathology"),
        ("US", "ultrasound"),
        ("OT", ""),
        ("", ""),
    ],
)
def test_modality(tmp_path: Path, tag: str, name: str) -> None:
    assert medical.modality(save(tmp_path / "a", ramp(), Modality=tag)) == name


def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(DataError, match=r"needs pydicom: pip install 'medmoe_jax\[medical\]'"):
        open_image(FILES / "CT_small.dcm")
