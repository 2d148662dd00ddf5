"""Decoded images against CLIP's processor, and the documented differences."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import tiny_data
from PIL import Image

from medmoe_jax.data import images
from medmoe_jax.data.images import ImageSpec, find_image, load_image
from medmoe_jax.data.problems import DataError

SPEC = ImageSpec(8, 8, "square")


@pytest.mark.parametrize("name", ["rgb_wide", "gray_tall"])
@pytest.mark.parametrize(("aspect", "key"), [("pad", "pad"), ("square", "default")])
def test_eight_bit_images_are_equal(name: str, aspect: str, key: str, fixtures: Path) -> None:
    folder = fixtures / "images"
    golden = np.load(folder / "pixel_values.npz")
    spec = images.read_image_spec(folder / "preprocessor_config.json", aspect)
    pixels = load_image(folder / f"{name}.png", spec)
    assert pixels.dtype == np.uint8 and pixels.shape == (56, 56, 3)
    made = images.normalise(pixels, spec).transpose(2, 0, 1)
    np.testing.assert_array_equal(made, golden[f"{name}.{key}"])

    spec = ImageSpec(336, 336, aspect)
    made = images.normalise(load_image(folder / f"{name}.png", spec), spec).transpose(2, 0, 1)
    np.testing.assert_array_equal(made[:, ::12, ::12], golden[f"{name}.336.{key}_stride12"])
    whole = [made.mean(), made.std()]  # sums of 338 688 float32 values, in another order
    np.testing.assert_allclose(whole, golden[f"{name}.336.{key}_meanstd"], atol=1e-5)


def test_padding_colour_is_the_official_one(fixtures: Path, tmp_path: Path) -> None:
    meta = json.loads((fixtures / "images" / "meta.json").read_text())
    path = tiny_data.save_image(tmp_path / "wide.png", size=(30, 10))
    corner = load_image(path, ImageSpec(30, 30, "pad"))[0, 0]
    assert corner.tolist() == meta["images"][0]["background"] == [122, 116, 104]


def test_sixteen_bit_uses_its_own_range(fixtures: Path, tmp_path: Path) -> None:
    """The official code turns gray16.png white; here its range fills 0..255."""
    for name in ("gray16", "gray16_low"):
        path = fixtures / "images" / f"{name}.png"
        raw = np.asarray(Image.open(path)).astype(float)
        spec = ImageSpec(min(raw.shape), min(raw.shape), "square")
        top, left = ((edge - spec.crop) // 2 for edge in raw.shape)
        expected = np.rint((raw - raw.min()) / (raw.max() - raw.min()) * 255)
        expected = expected[top : top + spec.crop, left : left + spec.crop]
        for channel in np.moveaxis(load_image(path, spec), -1, 0):
            np.testing.assert_array_equal(channel, expected)
    for value, kind in ((1000, np.uint16), (-7, np.int32), (0.5, np.float32)):
        path = tmp_path / "constant.tiff"
        Image.fromarray(np.full((8, 8), value, kind)).save(path)
        assert not load_image(path, SPEC).any()
    ramp = np.arange(64, dtype=np.float32).reshape(8, 8) - 32
    Image.fromarray(ramp).save(path)
    assert load_image(path, SPEC)[..., 1].ravel()[[0, 63]].tolist() == [0, 255]
    ramp[0, 0] = np.nan
    Image.fromarray(ramp).save(path)
    with pytest.raises(DataError, match="not finite"):
        load_image(path, SPEC)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
def test_films_whose_zero_is_white(tmp_path: Path, kind: type) -> None:
    """As digitised X-ray films have it, whatever the number of bits."""
    values = np.tile(np.linspace(0, 200, 9).astype(kind), (9, 1))
    Image.fromarray(values).save(tmp_path / "film.tif")
    content = (tmp_path / "film.tif").read_bytes()
    entry = struct.pack("<HHI", 262, 3, 1)  # PhotometricInterpretation: a short, one of it
    assert content.count(entry + struct.pack("<HH", 1, 0)) == 1
    film = content.replace(entry + struct.pack("<HH", 1, 0), entry + struct.pack("<HH", 0, 0))
    shown, negative = (np.asarray(images.decode(c, "film.tif"), int) for c in (content, film))
    np.testing.assert_array_equal(negative, 255 - shown)
    assert shown[0, 0, 0] < shown[0, -1, 0]


def test_transparency_is_laid_over_white(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:, :4] = (10, 20, 30, 255)
    pixels[:, 4:] = (10, 20, 30, 0)
    pixels[0, 0, 3] = 51  # a fifth
    Image.fromarray(pixels).save(tmp_path / "a.png")
    made = load_image(tmp_path / "a.png", SPEC)
    assert made[5, 2].tolist() == [10, 20, 30]
    assert made[5, 6].tolist() == [255, 255, 255]
    assert made[0, 0].tolist() == [206, 208, 210]
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([1, 2, 3])
    palette.save(tmp_path / "p.png", transparency=0)
    assert (load_image(tmp_path / "p.png", SPEC) == 255).all()
    Image.new("LA", (8, 8), (7, 255)).save(tmp_path / "la.png")
    assert (load_image(tmp_path / "la.png", SPEC) == 7).all()


def test_written_orientation_is_applied(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:, :4] = 200  # left half bright
    exif = Image.Exif()
    for orientation, bright in (
        (1, np.s_[:, :3]),
        (2, np.s_[:, 5:]),
        (3, np.s_[:, 5:]),
        (6, np.s_[:3]),
        (8, np.s_[5:]),
    ):
        exif[0x0112] = orientation
        for name in ("o.png", "o.tif"):  # Pillow turns the second kind itself
            Image.fromarray(pixels).save(tmp_path / name, exif=exif)
            made = load_image(tmp_path / name, SPEC)
            assert (made[bright] == 200).all(), (name, orientation)
            assert made.mean() == 100


def test_crop_larger_than_the_resized_image_is_black_around(tmp_path: Path) -> None:
    Image.new("RGB", (20, 20), (9, 9, 9)).save(tmp_path / "a.png")
    made = load_image(tmp_path / "a.png", ImageSpec(5, 8, "square"))
    assert made.shape == (8, 8, 3)
    assert (made[2:7, 2:7] == 9).all()  # as CLIPImageProcessor: the odd pixel is at the top left
    assert made.astype(int).sum() == 5 * 5 * 3 * 9


def test_spellings_of_the_preprocessor_config(tmp_path: Path) -> None:
    file = tmp_path / "preprocessor_config.json"
    today = {"size": {"shortest_edge": 24}, "crop_size": {"height": 20, "width": 20}}
    for config in (today, {"size": 24, "crop_size": 20, "do_resize": True}):
        file.write_text(json.dumps(config))
        assert images.read_image_spec(file, "pad") == ImageSpec(24, 20, "pad")
    file.write_text(json.dumps(today | {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    spec = images.read_image_spec(file, "square")
    assert (spec.mean, spec.std) == ((0.5,) * 3, (0.25,) * 3)
    file.write_text(json.dumps(today | {"image_mean": None, "image_std": None}))
    assert images.read_image_spec(file, "pad") == ImageSpec(24, 20, "pad")
    for wrong, text in (
        ({"size": 24}, "no CLIP preprocessor_config"),
        ({"size": {"height": 2, "width": 2}, "crop_size": 2}, "no CLIP preprocessor_config"),
        ({"size": 24, "crop_size": {"height": 2, "width": 3}}, "not square"),
        (today | {"resample": 2}, "only bicubic"),
        (today | {"do_center_crop": False}, "only bicubic"),
        (today | {"rescale_factor": 1.0}, "rescale_factor"),
    ):
        file.write_text(json.dumps(wrong))
        with pytest.raises(DataError, match=text):
            images.read_image_spec(file, "pad")
    file.write_text("{")
    with pytest.raises(DataError, match="no CLIP preprocessor_config"):
        images.read_image_spec(file, "pad")
    with pytest.raises(DataError, match="'stretch' is unknown"):
        ImageSpec(8, 8, "stretch")


def test_broken_files_are_told(tmp_path: Path) -> None:
    good = tiny_data.save_image(tmp_path / "good.png", size=(64, 64)).read_bytes()
    Image.open(tmp_path / "good.png").save(tmp_path / "good.jpg", quality=95)
    jpeg = (tmp_path / "good.jpg").read_bytes()
    for name, content in (
        ("text.png", b"no image at all"),
        ("empty.png", b""),
        ("cut.png", good[: len(good) // 2]),
        ("cut.jpg", jpeg[: len(jpeg) // 2]),
        ("flipped.png", good[:5000] + b"\xff\x00\xff" + good[5003:]),
        ("script.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"image '{name}' cannot be read"):
            load_image(tmp_path / name, SPEC)


def test_huge_and_elongated_images_are_told(tmp_path: Path) -> None:
    Image.new("1", (10000, 10000)).save(tmp_path / "bomb.png")
    with pytest.raises(DataError, match=r"'bomb\.png' is too large|has 10000 x 10000 pixels"):
        load_image(tmp_path / "bomb.png", SPEC)
    Image.new("1", (60000, 2)).save(tmp_path / "line.png")
    with pytest.raises(DataError, match="60000 x 2 pixels is too elongated"):
        load_image(tmp_path / "line.png", ImageSpec(336, 336, "square"))
    with pytest.raises(DataError, match="too elongated: it would become 60000 x 60000"):
        load_image(tmp_path / "line.png", ImageSpec(336, 336, "pad"))


def test_paths_stay_in_the_folder(tmp_path: Path) -> None:
    outside = tiny_data.save_image(tmp_path / "outside.png")
    folder = tmp_path / "images"
    inside = tiny_data.save_image(folder / "sub" / "a.png")
    (folder / "link.png").symlink_to(outside)
    (folder / "friend.png").symlink_to(inside)
    assert find_image(folder, "sub/a.png") == inside
    assert find_image(folder, "friend.png") == folder / "friend.png"
    (tmp_path / "door").symlink_to(folder)
    assert find_image(tmp_path / "door", "sub/a.png").is_file()
    for name, text in (
        ("../outside.png", "points out of"),
        ("sub/../../outside.png", "points out of"),
        (str(outside), "points out of"),
        ("link.png", "is a link that leaves"),
        ("none.png", "'none.png' is not in"),
        ("sub", "'sub' is not in"),
        ("a\0b.png", "is not in"),
        ("data:image/png;base64," + 1000 * "iVBO", r"base64,\w{58}\.\.\.' is not in"),
        (50 * "iVBO" + ".png", r"\w{200}\.png' is not in"),
        (1000 * "iVBO", r"\w{80}\.\.\.' is not in"),
        ("a/" + 2000 * "b/", r"\.\.\.' is not in"),
    ):
        with pytest.raises(DataError, match=text):
            find_image(folder, name)
