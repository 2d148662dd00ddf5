"""NIfTI files as pictures: orientation, slices, values."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medmoe_jax.config import ViewConfig
from medmoe_jax.data.images import open_image
from medmoe_jax.data.problems import DataError

nibabel = pytest.importorskip("nibabel", reason="needs the extra medmoe_jax[medical]")

FILES = Path(nibabel.__path__[0]) / "tests" / "data"


def grey(path: Path, **view: Any) -> np.ndarray:
    return np.asarray(open_image(path, ViewConfig(**view)))[..., 0]


def save(path: Path, data: np.ndarray, affine: np.ndarray | None = None, **header: Any) -> Path:
    image = nibabel.Nifti1Image(data, np.eye(4) if affine is None else affine)
    for key, value in header.items():
        image.header[key] = value
    nibabel.save(image, path)
    return path


def markers() -> np.ndarray:
    """uint8[6, 8, 10] in RAS+: the right, the front and the head each have a bright side."""
    volume = np.full((6, 8, 10), 50, np.uint8)
    volume[5] += 100  # right
    volume[:, 7] += 50  # front
    volume[:, :, 9] += 25  # head
    return volume


def as_shown(volume: np.ndarray, axis: str, at: int) -> np.ndarray:
    """Pixel by pixel: right on the left, front (or head) at the top."""
    x, y, z = volume.shape
    sizes = {"axial": (y, x), "coronal": (z, x), "sagittal": (z, y)}[axis]
    picture = np.zeros(sizes, volume.dtype)
    for r in range(sizes[0]):
        for c in range(sizes[1]):
            if axis == "axial":
                picture[r, c] = volume[x - 1 - c, y - 1 - r, at]
            elif axis == "coronal":
                picture[r, c] = volume[x - 1 - c, at, z - 1 - r]
            else:
                picture[r, c] = volume[at, y - 1 - c, z - 1 - r]
    return picture


@pytest.mark.parametrize("order", ["RAS", "LPS", "PIR", "SAL", "ALI"])
def test_every_order_of_voxels_shows_the_same(tmp_path: Path, order: str) -> None:
    orientations = nibabel.orientations
    image = nibabel.Nifti1Image(markers(), np.diag([-1, 1, 1, 1]) @ np.diag([-1, 1, 1, 1]))
    turn = orientations.ornt_transform(
        orientations.io_orientation(image.affine), orientations.axcodes2ornt(tuple(order))
    )
    nibabel.save(image.as_reoriented(turn), tmp_path / "a.nii.gz")
    assert "".join(nibabel.aff2axcodes(nibabel.load(tmp_path / "a.nii.gz").affine)) == order
    for axis, at in (("axial", 5), ("coronal", 4), ("sagittal", 3)):
        found = grey(tmp_path / "a.nii.gz", axis=axis, window="0:255")
        np.testing.assert_array_equal(found, as_shown(markers(), axis, at))
    head = grey(tmp_path / "a.nii.gz", slice=9, window="0:255")
    np.testing.assert_array_equal(head, as_shown(markers(), "axial", 9))
    assert head[4, 0] == 175 and head[4, 5] == 75  # the patient's right is on the left
    assert head[0, 3] == 125  # the front is at the top


def test_the_real_files() -> None:
    image = nibabel.as_closest_canonical(nibabel.load(FILES / "anatomical.nii"))
    values = image.get_fdata()[:, :, 12]
    low, high = np.percentile(values, [0.5, 99.5])
    expected = np.rint(np.clip((values - low) / (high - low), 0, 1) * 255)
    np.testing.assert_array_equal(grey(FILES / "anatomical.nii"), expected.T[::-1, ::-1])
    # Four dimensions, scaled values, and a window in the header.
    file = FILES / "functional.nii"
    image = nibabel.as_closest_canonical(nibabel.load(file))
    values = image.get_fdata()[:, :, 1, 0]
    low, high = float(image.header["cal_min"]), float(image.header["cal_max"])
    expected = np.rint(np.clip((values - low) / (high - low), 0, 1) * 255)
    np.testing.assert_array_equal(grey(file), expected.T[::-1, ::-1])
    assert open_image(FILES / "example_nifti2.nii.gz").size == (32, 20)


def test_named_windows_and_three_at_once(tmp_path: Path) -> None:
    data = np.linspace(-1500, 1500, 6 * 5 * 3).reshape(6, 5, 3).astype(np.float32)
    path = save(tmp_path / "ct.nii", data)
    values = data[:, :, 1].astype(float).T[::-1, ::-1]
    expected = np.rint(np.clip((values + 1350) / 1500, 0, 1) * 255)
    np.testing.assert_array_equal(grey(path, window="lung"), expected)
    three = np.asarray(open_image(path, ViewConfig(window="rgb")))
    for channel, (low, high) in enumerate([(-1024, 1024), (-135, 215), (0, 80)]):
        expected = np.rint(np.clip((values - low) / (high - low), 0, 1) * 255)
        np.testing.assert_array_equal(three[..., channel], expected)


def test_what_is_no_number_is_black(tmp_path: Path) -> None:
    data = np.arange(60, dtype=np.float32).reshape(5, 4, 3)
    data[0, 0, 1], data[1, 0, 1] = np.nan, np.inf
    found = grey(save(tmp_path / "a.nii", data))
    assert found[3, 4] == 0 and found[3, 3] == 255
    with pytest.raises(DataError, match="no number that is finite"):
        open_image(save(tmp_path / "b.nii", data * np.nan))


def test_one_slice_two_dimensions_and_voxels_that_are_not_cubes(tmp_path: Path) -> None:
    coronal = np.arange(5 * 7, dtype=np.uint8).reshape(5, 1, 7)
    assert grey(save(tmp_path / "a.nii", coronal)).shape == (7, 5)
    flat = np.arange(5 * 7, dtype=np.uint8).reshape(5, 7)
    assert grey(save(tmp_path / "b.nii", flat)).shape == (7, 5)
    thick = save(tmp_path / "c.nii", markers(), np.diag([1.0, 1, 4, 1]))
    assert grey(thick).shape == (8, 6)
    assert grey(thick, axis="coronal").shape == (40, 6)


def test_faults_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = save(tmp_path / "good.nii.gz", markers())
    (tmp_path / "cut.nii.gz").write_bytes(good.read_bytes()[:-60])
    plain = gzip.decompress(good.read_bytes())
    (tmp_path / "cut.nii").write_bytes(plain[:400])
    (tmp_path / "text.nii").write_bytes(b"no volume at all" * 30)
    (tmp_path / "noending").write_bytes(plain)
    np.testing.assert_array_equal(grey(tmp_path / "noending"), grey(good))
    for name in ("cut.nii.gz", "cut.nii", "text.nii"):
        with pytest.raises(DataError, match=f"'{name}' is a broken NIfTI file"):
            open_image(tmp_path / name)
    with pytest.raises(DataError, match=r"has 10 slice\(s\); there is no slice 10"):
        open_image(good, ViewConfig(slice=10))
    with pytest.raises(DataError, match="one window at most"):
        open_image(good, ViewConfig(window="file:1"))
    head = bytearray(plain)
    head[42:48] = np.array([30000, 30000, 30000], "<i2").tobytes()
    (tmp_path / "bomb.nii").write_bytes(bytes(head))
    with pytest.raises(DataError, match="30000 x 30000 x 30000 voxels"):
        open_image(tmp_path / "bomb.nii")
    monkeypatch.setitem(sys.modules, "nibabel", None)
    with pytest.raises(DataError, match=r"needs nibabel: pip install 'medmoe_jax\[medical\]'"):
        open_image(good)
