"""Image file -> uint8 RGB square, as CLIP's image processor makes it.

Equal to Med-MoE for 8-bit images without transparency. Deliberate differences, where the official
`convert('RGB')` loses the picture:

* More than 8 bits a channel in greyscale (16-bit PNG or TIFF, 32-bit integers, floats): the image's
  own range is mapped linearly, its lowest value to 0 and its highest to 255 (in TIFF files whose
  zero is white the other way round). The official code clips at 255, which turns a normal scan
  white. A constant image becomes black.
* Transparency is laid over white, as viewers show it. The official code shows whatever colour
  hides behind the transparent pixels.
* The orientation written in the file (EXIF) is applied, so that left and right are those a viewer
  shows. The official code ignores it.

Of a file with several frames the first is used, as in the official code. DICOM and NIfTI files are
accepted wherever an image is; `data/medical/` says what is shown of them.
"""

from __future__ import annotations

import errno
import json
import os
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from medmoe_jax.config import ViewConfig, VisionConfig
from medmoe_jax.data import medical
from medmoe_jax.data.medical import windows
from medmoe_jax.data.placement import Placement, place
from medmoe_jax.data.problems import DataError
from medmoe_jax.data.size import MAX_PIXELS, check_pixels

LONGEST_NAME = 300  # letters of a path that messages show whole
WHITE = (255, 255, 255)
MAX_WORK_PIXELS = 4 * MAX_PIXELS  # after padding to a square, or after resizing
SUFFIXES = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "BMP": (".bmp", ".dib"),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "JPEG2000": (".jp2", ".j2k", ".jpx", ".jpf", ".jpc", ".j2c"),
}  # Pillow's format -> suffixes, the usual one first; no scripts
FORMATS = tuple(SUFFIXES)
_ORIENTATION = 0x0112  # EXIF tag
_PHOTOMETRIC = 0x0106  # TIFF tag; 0 = the smallest value is white
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class ImageSpec:
    """What an image becomes."""

    resize: int  # pixels of the shortest edge
    crop: int  # pixels of the square cut from the centre
    aspect: str = "pad"  # pad (to a square, before resizing) | square (centre crop only)
    mean: tuple[float, ...] = VisionConfig.mean  # of pixels in 0..1, R G B; by default CLIP's
    std: tuple[float, ...] = VisionConfig.std
    view: ViewConfig = field(default_factory=ViewConfig)  # of DICOM and NIfTI files

    def __post_init__(self) -> None:
        windows.check_view(self.view)
        if self.aspect not in ("pad", "square"):
            raise DataError(f"data.image_aspect {self.aspect!r} is unknown; use 'pad' or 'square'")


def read_image_spec(file: str | Path, aspect: str, view: ViewConfig | None = None) -> ImageSpec:
    """ImageSpec of a CLIP preprocessor_config.json, today's or an older spelling.

    Args:
      file: the JSON file; `size` is a number or {'shortest_edge': n}, `crop_size` a number or
        {'height': n, 'width': n}.
      aspect: 'pad' or 'square'.
      view: of DICOM and NIfTI files; default: their own window, the middle slice.

    Raises:
      DataError: the file cannot be read, or asks for something other than resize, centre crop and
        normalisation.
    """
    file = Path(file)
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        size, crop = config["size"], config["crop_size"]
        resize = size["shortest_edge"] if isinstance(size, dict) else size
        if isinstance(crop, dict):
            if crop["height"] != crop["width"]:
                raise DataError(f"{file}: crop_size {crop} is not square")
            crop = crop["height"]
        spec = ImageSpec(
            int(resize),
            int(crop),
            aspect,
            tuple(config.get("image_mean") or VisionConfig.mean),
            tuple(config.get("image_std") or VisionConfig.std),
            view or ViewConfig(),
        )
    except (OSError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{file} is no CLIP preprocessor_config.json: {error!r}") from error
    steps = ("do_resize", "do_center_crop", "do_normalize", "do_rescale", "do_convert_rgb")
    off = [step for step in steps if config.get(step, True) is not True]
    if off or config.get("resample", 3) != 3:
        raise DataError(f"{file}: only bicubic resizing (resample 3) with {steps} all on is known")
    if abs(config.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
        raise DataError(f"{file}: rescale_factor must be 1/255")
    return spec


def find_image(folder: str | Path, name: str) -> Path:
    """Path of image `name` inside `folder`.

    Raises:
      DataError: the name is absolute or leaves the folder (also by a link), or there is no file.
    """
    path = Path(folder) / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise DataError(
            f"image {name!r} points out of the image folder; write it relative to the folder"
        )
    shown = name if len(name) <= LONGEST_NAME else f"{name[:80]}..."  # an image as text, mostly
    try:
        there = path.is_file()
    except OSError as error:
        # Whether a name is too long depends on the folder; no file has it either way.
        if error.errno != errno.ENAMETOOLONG:
            raise DataError(f"image {shown!r} cannot be read: {error.strerror}") from error
        there = False
    if not there:
        raise DataError(f"image {shown!r} is not in {folder}")
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise DataError(
            f"image {name!r} is a link that leaves {folder}; copy the file, or give the folder it "
            "lies in as --config.data.image_folder"
        )
    return path


def load_image(path: str | Path, spec: ImageSpec) -> np.ndarray:
    """Reads one image.

    Returns:
      uint8[crop, crop, 3], RGB.

    Raises:
      DataError: as `open_image`, or the image is too elongated.
    """
    return _fitted(open_image(path, spec.view), Path(path).name, spec)


def load_encoded(content: bytes, name: str, spec: ImageSpec, most: int = MAX_PIXELS) -> np.ndarray:
    """Like `load_image`, for the content of a file of one of FORMATS with `most` pixels."""
    return _fitted(decode(content, name, most), name, spec)


def _fitted(image: Image.Image, name: str, spec: ImageSpec) -> np.ndarray:
    try:
        return fit(image, spec)
    except DataError as error:
        raise DataError(f"image {name!r}: {error}") from error


def open_image(path: str | Path, view: ViewConfig | None = None) -> Image.Image:
    """The picture in a file, at its own size: PNG, JPEG, ... (FORMATS), DICOM or NIfTI.

    Args:
      path: recognised by its content; DICOM files without a preamble by their name.
      view: what is shown of a DICOM or NIfTI file; default: its own window, the middle slice.

    Returns:
      8-bit RGB, upright.

    Raises:
      DataError: not an image, broken, truncated, of an unknown format, or absurdly large.
    """
    path = Path(path)
    found = medical.kind(path)
    if found:
        return medical.open_medical(path, found, view or ViewConfig()).convert("RGB")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"image {path.name!r} cannot be read: {error.strerror}") from error
    return decode(content, path.name)


def decode(content: bytes, name: str, most: int = MAX_PIXELS) -> Image.Image:
    """The picture in the content of a file of one of FORMATS with `most` pixels; otherwise as
    `open_image`."""
    try:
        with Image.open(BytesIO(content), formats=FORMATS) as image:
            image.verify()  # checksums of PNG files, which decoding alone does not look at
        with Image.open(BytesIO(content), formats=FORMATS) as image:  # the first one is used up
            check_pixels(image.width, image.height, name, most)
            return to_rgb(image)
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"image {name!r} is too large ({error}); make it smaller") from error
    except UnidentifiedImageError as error:
        known = ", ".join(FORMATS)
        raise DataError(f"image {name!r} cannot be read: it is none of {known}") from error
    except Exception as error:  # Pillow's decoders raise errors of many kinds on broken files
        raise DataError(f"image {name!r} cannot be read: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB upright image; the rules are those at the top of this file.

    Raises:
      DataError: the pixel values are not all finite.
    """
    # Pillow turns such pictures of up to 8 bits round itself.
    negative = getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0
    image = _upright(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image, np.float64)
        low, high = values.min(), values.max()
        if not (np.isfinite(low) and np.isfinite(high)):
            raise DataError("the image holds values that are not finite numbers")
        scaled = (values - low) * (255 / (high - low) if high > low else 0)
        scaled = 255 - scaled if negative and high > low else scaled
        return Image.fromarray(np.rint(scaled).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image).convert("RGB")
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    image.load()  # Pillow turns TIFF files itself, while it decodes them
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a broken EXIF block says nothing about orientation; viewers ignore it too
        turn = None
    return image if turn is None else image.transpose(turn)


def fit(image: Image.Image, spec: ImageSpec) -> np.ndarray:
    """Padding to a square (if asked for), bicubic resize of the shortest edge, centre crop.

    Args:
      image: RGB.
      spec: sizes; the padding has the colour `padding`.

    Returns:
      uint8[crop, crop, 3]; black where the crop is larger than the resized image.

    Raises:
      DataError: the image is so elongated that the result would not fit in memory.

    Source: `expand2square` of Med-MoE and `CLIPImageProcessor` of transformers.
    """
    check_fit(*image.size, spec)
    where = placement(*image.size, spec)
    if where.padded != image.size:
        square = Image.new("RGB", where.padded, padding(spec))
        square.paste(image, where.offset)
        image = square
    pixels = np.asarray(image.resize(where.resized, Image.Resampling.BICUBIC))
    if min(pixels.shape[:2]) < spec.crop:
        more = [max(0, spec.crop - edge) for edge in pixels.shape[:2]]
        left, top = where.margin
        pixels = np.pad(pixels, [(top, more[0] - top), (left, more[1] - left), (0, 0)])
    left, top = where.cut
    return pixels[top : top + spec.crop, left : left + spec.crop].copy()


def placement(width: int, height: int, spec: ImageSpec) -> Placement:
    """Where `fit` puts a picture of this size."""
    return place(width, height, spec.resize, spec.crop, spec.aspect == "pad")


def padding(spec: ImageSpec) -> tuple[int, ...]:
    """Colour of what `fit` pads with, R G B in 0..255: the mean that the tower subtracts."""
    return tuple(int(m * 255) for m in spec.mean)


def check_fit(width: int, height: int, spec: ImageSpec) -> None:
    """Raises DataError where `fit` would make an image of this size too large on its way."""
    short, long = min(width, height), max(width, height)
    made = (long, long) if spec.aspect == "pad" else (spec.resize, spec.resize * long // short)
    if made[0] * made[1] > MAX_WORK_PIXELS:
        if width > height:
            made = made[::-1]
        raise DataError(
            f"an image of {width} x {height} pixels is too elongated: it would become "
            f"{made[0]} x {made[1]}; crop it first"
        )


def normalise(images: np.ndarray, spec: ImageSpec) -> np.ndarray:
    """uint8[..., 3] -> float32[..., 3], (pixel / 255 - mean) / std, what the vision tower reads."""
    mean, std = np.asarray(spec.mean, np.float32), np.asarray(spec.std, np.float32)
    return (images.astype(np.float32) / np.float32(255) - mean) / std
