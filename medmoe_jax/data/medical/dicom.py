"""DICOM file -> one frame as a picture, as a viewer shows it.

The steps are those of the standard: stored values, Modality LUT (rescale slope and intercept), VOI
LUT (window), MONOCHROME1 turned round. Only the tags in `_TAGS` are read at all; none of them is
about the patient.
"""

from __future__ import annotations

import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from medmoe_jax.config import MODALITIES, ViewConfig
from medmoe_jax.data.medical import windows
from medmoe_jax.data.medical.shape import square_pixels
from medmoe_jax.data.problems import DataError
from medmoe_jax.data.size import MAX_PIXELS, check_pixels

CT, MRI, XRAY, PATHOLOGY = MODALITIES
MODALITY_TAGS = {  # Modality (0008,0060) -> its name
    "CT": CT,
    "MR": MRI,
    **dict.fromkeys(("CR", "DX", "RG", "RF", "XA", "MG", "PX", "IO"), XRAY),
    "SM": PATHOLOGY,
    "GM": PATHOLOGY,
    "US": "ultrasound",
    "IVUS": "ultrasound",
    "PT": "PET",
    "NM": "nuclear medicine",
    "ES": "endoscopy",
    "OP": "eye photography",
    "OPT": "optical tomography",
    "XC": "photography",
}  # others, such as OT or SEG, say nothing about how the image was made
GREY = ("MONOCHROME1", "MONOCHROME2")
_PALETTE = "PALETTE COLOR"
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_DEFLATED = "1.2.840.10008.1.2.1.99"  # the transfer syntax that is zlib
_LUT = ("Descriptor", "Data")
_TAGS = [
    *("Modality", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration"),
    *("NumberOfFrames", "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit"),
    *("PixelRepresentation", "PixelPaddingValue", "PixelSpacing", "ImagerPixelSpacing"),
    *("PixelAspectRatio", "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence"),
    *("WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence"),
    *(f"{c}PaletteColorLookupTable{what}" for c in ("Red", "Green", "Blue") for what in _LUT),
    *(f"Segmented{c}PaletteColorLookupTableData" for c in ("Red", "Green", "Blue")),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
]
_PIXELLESS = ("SR", "KO", "PR", "ECG", "RTSTRUCT", "RTPLAN", "REG", "DOC", "AU", "HD")
_PIXELS = ["PixelData", "FloatPixelData", "DoubleFloatPixelData"]
_QUIET = threading.Lock()  # the filters of `warnings` belong to the whole process


@contextmanager
def quiet() -> Iterator[None]:
    """Silences pydicom, whose warnings repeat values of the file."""
    with _QUIET, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def read(path: Path, view: ViewConfig) -> Image.Image:
    """The chosen frame, mode L or RGB.

    A window that the view names in Hounsfield units is for CT; images whose Modality tag says
    something else keep their own window. Without a window in the view, the first one of the file is
    used; without one in the file, CT is shown in the soft-tissue window, images of at most 8 bits
    as they are, and others over the range of their values. A window of the file that shows nothing
    (a width of 0, or no pixel between black and white) counts as absent.

    Raises:
      DataError: no DICOM file, no picture in it, broken, too large, of a transfer syntax that
        cannot be decoded, or pydicom is not installed.
    """
    windows.check_view(view)
    with quiet():
        return _picture(path, view)


def _picture(path: Path, view: ViewConfig) -> Image.Image:
    ds = header(path)
    rows, columns = (int(_number(ds, key, 0)) for key in ("Rows", "Columns"))
    if rows < 1 or columns < 1:
        raise DataError(
            f"image {path.name!r} is a DICOM file without pixels"
            + (f" (Modality {ds.Modality})" if text(ds, "Modality") in _PIXELLESS else "")
        )
    check_pixels(columns, rows, path.name)
    many = max(1, int(_number(ds, "NumberOfFrames", 1)))
    frame = windows.choose_slice(view, many, path.name, "frame")
    stored = _stored(path, ds, frame if many > 1 else None)
    stored = stored[0] if stored.ndim > 2 and stored.shape[0] == 1 and rows > 1 else stored
    meaning = text(ds, "PhotometricInterpretation")
    if stored.shape == (rows, columns) and meaning in GREY:
        picture = _grey(stored, ds, frame, view, path.name)
    elif stored.shape == (rows, columns) and meaning == _PALETTE:
        picture = _palette(stored, ds, path.name)
    elif stored.shape == (rows, columns, 3) and meaning in _COLOUR:
        bits = int(_number(ds, "BitsStored", 8 * stored.dtype.itemsize))
        picture = windows.to_bytes(np.clip(stored / (2.0**bits - 1), 0, 1))
    else:
        raise DataError(
            f"image {path.name!r}: pixels of the kind {meaning or '(none)'} with shape "
            f"{list(stored.shape)} are not known; save it as MONOCHROME2 or RGB"
        )
    return square_pixels(Image.fromarray(picture), _spacing(ds, frame), path.name)


def modality(path: Path) -> str:
    """The name of the Modality tag in MODALITY_TAGS, '' where it says nothing.

    Raises:
      DataError: no DICOM file, or pydicom is not installed.
    """
    with quiet():
        return MODALITY_TAGS.get(text(header(path), "Modality"), "")


def _library(path: Path) -> Any:
    try:
        import pydicom
        import pydicom.pixels
    except ImportError:
        raise DataError(
            f"image {path.name!r} is a DICOM file; reading it needs pydicom: "
            "pip install 'medmoe_jax[medical]'"
        ) from None
    return pydicom


def header(path: Path, more: list[str] | None = None, pixels: bool = False) -> Any:
    """Data set with the tags of this file that are in `_TAGS` or `more`, and its pixels on demand.

    Raises:
      DataError: no DICOM file, or pydicom is not installed.
    """
    pydicom = _library(path)
    try:
        _check_deflated(path, pydicom)
        ds = pydicom.dcmread(
            path,
            force=True,  # `medical.kind` has looked at the content or the name
            stop_before_pixels=not pixels,
            specific_tags=[*_TAGS, *(more or ()), *(_PIXELS if pixels else ())],
        )
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"image {path.name!r} is a broken DICOM file ({type(error).__name__})"
        ) from None
    if not ds:
        raise DataError(f"image {path.name!r} is no DICOM file with a picture")
    return ds


def _check_deflated(path: Path, pydicom: Any) -> None:
    """Raises DataError where a compressed data set would be larger than any picture may be."""
    try:
        meta = pydicom.filereader.read_file_meta_info(path)
        if meta.get("TransferSyntaxUID", "") != _DEFLATED:
            return
        start = 128 + 4 + 12 + int(meta.FileMetaInformationGroupLength)
    except pydicom.errors.InvalidDicomError:
        return  # no preamble, so nothing that says it is compressed
    opened, size, most = zlib.decompressobj(-zlib.MAX_WBITS), 0, 8 * MAX_PIXELS
    with path.open("rb") as stream:
        stream.seek(start)
        while block := opened.unconsumed_tail or stream.read(1 << 16):
            size += len(opened.decompress(block, 1 << 20))
            if size > most:
                raise DataError(f"image {path.name!r} unpacks to more than {most} bytes")


def _stored(path: Path, ds: Any, frame: int | None) -> np.ndarray:
    """Decoded pixels of one frame: [H, W], or [H, W, 3] as RGB."""
    pydicom = _library(path)
    meta = getattr(ds, "file_meta", {})
    syntax: Any = meta.get("TransferSyntaxUID") or _syntax(ds, pydicom)
    try:
        decoder = pydicom.pixels.get_decoder(syntax)
    except NotImplementedError:
        raise DataError(
            f"image {path.name!r} has the transfer syntax {syntax.name}, which cannot be decoded; "
            "save it uncompressed"
        ) from None
    if not decoder.is_available:
        raise DataError(
            f"image {path.name!r} has the transfer syntax {syntax.name}; decoding it needs the "
            "extra: pip install 'medmoe_jax[medical]'"
        )
    if "TransferSyntaxUID" in meta and str(syntax) != _DEFLATED:
        try:
            return pydicom.pixels.pixel_array(path, index=frame)  # reads no other frame
        except Exception:
            pass  # the way below reads some files that this one does not
    try:
        whole = header(path, pixels=True)
        whole.file_meta = pydicom.dataset.FileMetaDataset()
        whole.file_meta.TransferSyntaxUID = syntax
        return pydicom.pixels.pixel_array(whole, index=frame)
    except DataError:
        raise
    except Exception as error:  # decoders raise errors of many kinds, some with contents
        raise DataError(
            f"image {path.name!r}: its pixels ({syntax.name}) are missing, truncated or broken "
            f"({type(error).__name__})"
        ) from None


def _syntax(ds: Any, pydicom: Any) -> Any:
    """How a data set without file meta information is written, as it was read."""
    implicit, little = ds.original_encoding
    if implicit:
        return pydicom.uid.ImplicitVRLittleEndian
    return pydicom.uid.ExplicitVRLittleEndian if little else pydicom.uid.ExplicitVRBigEndian


def _grey(stored: np.ndarray, ds: Any, frame: int, view: ViewConfig, name: str) -> np.ndarray:
    """uint8[H, W], or [H, W, 3] with the window 'rgb'."""
    values, table = _rescaled(stored, ds, frame)
    tag = text(ds, "Modality")
    explicit = windows.given(view.window)
    chosen = (explicit,) if explicit else windows.hounsfield(view.window) if tag == "CT" else ()
    if chosen:
        bands = [windows.between(values, window) for window in chosen]
    else:
        number = windows.number_in_file(view.window)
        own = _own_window(values, ds, frame, number)
        if own is None and number:
            raise DataError(f"image {name!r} has no window {number} that can be used")
        bands = [_unwindowed(values, stored, ds, tag, table) if own is None else own]
    if text(ds, "PhotometricInterpretation") == "MONOCHROME1":
        bands = [1 - band for band in bands]
    pixels = [windows.to_bytes(band) for band in bands]
    return pixels[0] if len(pixels) == 1 else np.stack(pixels, -1)


def _rescaled(stored: np.ndarray, ds: Any, frame: int) -> tuple[np.ndarray, bool]:
    """f64[H, W] after the Modality LUT, and whether there was one (table or numbers)."""
    item = _of_frame(ds, frame, "PixelValueTransformationSequence")
    values = stored.astype(np.float64)
    if ds.get("ModalityLUTSequence"):
        looked_up = _looked_up(values, ds.ModalityLUTSequence[0], ds)
        if looked_up is not None:
            return looked_up[0], True
    slope, intercept = _number(item, "RescaleSlope", 1), _number(item, "RescaleIntercept", 0)
    slope = slope or 1.0  # 0 would make all pixels equal
    return values * slope + intercept, (slope, intercept) != (1, 0)


def _own_window(values: np.ndarray, ds: Any, frame: int, number: int) -> np.ndarray | None:
    """0 to 1 by window `number` of the file; None where it has none that shows something."""
    tables = ds.get("VOILUTSequence") or []
    if number < len(tables):
        looked_up = _looked_up(values, tables[number], ds)
        if looked_up is not None:
            return looked_up[0] / looked_up[1]
    item = _of_frame(ds, frame, "FrameVOILUTSequence")
    centres, widths = _numbers(item, "WindowCenter"), _numbers(item, "WindowWidth")
    if number >= min(len(centres), len(widths)):
        return None
    centre, width, function = centres[number], widths[number], text(item, "VOILUTFunction")
    exact = function in ("LINEAR_EXACT", "SIGMOID")
    if not (np.isfinite([centre, width]).all() and (width > 0 if exact else width >= 1)):
        return None
    shown = windows.from_tags(values, centre, width, function)
    flat = shown.max() - shown.min() < 1 / 255 and values.max() > values.min()
    return None if flat else shown


def _unwindowed(
    values: np.ndarray, stored: np.ndarray, ds: Any, tag: str, table: bool
) -> np.ndarray:
    """0 to 1 where the file brings no window."""
    bits = int(_number(ds, "BitsStored", 8 * stored.dtype.itemsize))
    if tag == "CT" and bits > 8:
        return windows.between(values, windows.DEFAULT_CT)
    if bits <= 8 and stored.dtype.kind == "u" and not table:
        return windows.between(values, (0, 2.0**bits - 1))
    padding = ds.get("PixelPaddingValue")
    counted = np.isfinite(values)
    if isinstance(padding, int):
        counted &= stored != padding
    values = np.nan_to_num(values, nan=-np.inf, posinf=np.inf, neginf=-np.inf)
    return windows.between(values, windows.own_range(values, counted))


def _looked_up(values: np.ndarray, item: Any, ds: Any) -> tuple[np.ndarray, float] | None:
    """f64[H, W] by a table of the file and the largest value it can have; None where the table is
    broken. Source: DICOM PS3.3, C.11.1.1 and C.11.2.1.1."""
    try:
        entries, first, bits = (int(v) for v in item.LUTDescriptor)
        data = item.LUTData
        if isinstance(data, bytes):
            order = "<" if ds.original_encoding[1] else ">"
            wide = len(data) >= 2 * (entries or 1 << 16)
            data = np.frombuffer(data, np.dtype(f"{order}u2" if wide else "u1"))
        table = np.asarray(data, np.float64)[: entries or 1 << 16]
    except Exception:  # missing or of another kind, in ways without end
        return None
    if not table.size or not 1 <= bits <= 16:
        return None
    place = np.clip(np.rint(values) - first, 0, table.size - 1).astype(np.int64)
    return np.minimum(table[place], 2.0**bits - 1), 2.0**bits - 1


def _palette(stored: np.ndarray, ds: Any, name: str) -> np.ndarray:
    """uint8[H, W, 3] by the colour tables of the file."""
    from pydicom.pixels.processing import apply_color_lut

    try:
        colours = apply_color_lut(stored, ds)[..., :3]
        bits = int(ds.RedPaletteColorLookupTableDescriptor[2])
    except Exception as error:
        raise DataError(
            f"image {name!r}: its colour tables are broken ({type(error).__name__})"
        ) from None
    return windows.to_bytes(np.clip(colours / (2.0**bits - 1), 0, 1))


def _of_frame(ds: Any, frame: int, sequence: str) -> Any:
    """Where the settings of a frame are: its functional group, that of all frames, or the data
    set itself. Source: DICOM PS3.3, C.7.6.16."""
    groups = (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0))
    for keyword, at in groups:
        items = ds.get(keyword) or []
        if at < len(items) and items[at].get(sequence):
            return items[at].get(sequence)[0]
    return ds


def _spacing(ds: Any, frame: int) -> tuple[float, float]:
    """Height and width of a pixel; equal where the file does not say."""
    item = _of_frame(ds, frame, "PixelMeasuresSequence")
    for keyword in ("PixelSpacing", "ImagerPixelSpacing", "PixelAspectRatio"):
        found = _numbers(item, keyword)
        if len(found) == 2:
            return found[0], found[1]
    return 1.0, 1.0


def _numbers(ds: Any, keyword: str) -> list[float]:
    """All values of a tag; none where one of them is no number."""
    try:
        found = ds.get(keyword)
        if found is None:
            return []
        return [float(v) for v in (found if hasattr(found, "__len__") else [found])]
    except (TypeError, ValueError, ArithmeticError):  # pydicom converts what it has read here
        return []


def _number(ds: Any, keyword: str, default: float) -> float:
    found = _numbers(ds, keyword)
    return found[0] if found and np.isfinite(found[0]) else default


def text(ds: Any, keyword: str) -> str:
    """The value of a tag in capitals; '' where there is none."""
    try:
        return str(ds.get(keyword) or "").strip().upper()
    except (TypeError, ValueError):
        return ""
