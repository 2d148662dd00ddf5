"""What all data sets share: going on after a kill, workers, counts, ids, images, the sheet."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import miniature_sources as mini
import numpy as np
import pytest
from miniature_sources import lines, prepare
from PIL import Image

from medmoe_jax.data import images
from medmoe_jax.data.prepare import counts, layouts
from medmoe_jax.data.prepare.__main__ import main
from medmoe_jax.data.prepare.pictures import Store
from medmoe_jax.data.prepare.texts import Reading, split_of
from medmoe_jax.data.prepare.types import Event, Licence, Opened, Picture, Published
from medmoe_jax.data.prepare.write import begin, write
from medmoe_jax.data.problems import DataError

LICENCE = Licence("CC0-1.0", "https://example.org", "")


def folder_content(folder: Path) -> dict[str, bytes]:
    """All files below a folder but the summary, which has the command in it."""
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != "summary.json"
    }


def drafts(number: int, stop_at: int = -1) -> Iterator[Event]:
    """Rows with a picture each; at `stop_at` the program is interrupted."""
    for n in range(number):
        if n == stop_at:
            raise KeyboardInterrupt
        reading = Reading("train", "test", "CC0-1.0")
        yield reading.draft(
            file="f.json",
            place=n,
            id=n,
            turns=[("Q?", "yes")],
            answer_type="CLOSED",
            modality="CT",
            pictures=[Picture(f"p{n}.jpg", read=lambda n=n: mini.picture(n))],
        )


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    begin(out, {"name": "x"})
    with pytest.raises(KeyboardInterrupt):
        write(Opened("x", drafts(12, stop_at=9), (LICENCE,)), out, workers=1)
    stored = {file.name: file.stat().st_mtime_ns for file in (out / "images").glob("*.jpg")}
    assert len(stored) >= 4 and not list(out.glob("*.jsonl"))
    begin(out, {"name": "x"})
    result = write(Opened("x", drafts(12), (LICENCE,)), out, workers=1)
    assert (result.images_written, result.images_kept) == (12 - len(stored), len(stored))
    for name, time in stored.items():
        assert (out / "images" / name).stat().st_mtime_ns == time
    begin(tmp_path / "whole", {"name": "x"})
    write(Opened("x", drafts(12), (LICENCE,)), tmp_path / "whole", workers=1)
    assert folder_content(out) == folder_content(tmp_path / "whole")


def test_a_cut_image_is_written_again(tmp_path: Path) -> None:
    source, out = mini.slake(tmp_path / "s"), tmp_path / "out"
    assert prepare("slake", source, out, "--allow-counts") == 0
    whole = folder_content(out)
    image = out / "images" / "xmlab1" / "source.jpg"
    image.write_bytes(image.read_bytes()[:100])
    assert prepare("slake", source, out, "--allow-counts") == 0
    assert folder_content(out) == whole
    summary = json.loads((out / "summary.json").read_text())
    assert summary["images"] == {"written": 1, "kept": 3}


def test_parallel_equals_serial(tmp_path: Path) -> None:
    contents = []
    for workers in (1, 8):
        out = tmp_path / str(workers)
        begin(out, {"name": "x"})
        write(Opened("x", drafts(40), (LICENCE,)), out, workers=workers)
        contents.append(folder_content(out))
    assert contents[0] == contents[1] and len(contents[0]) == 40 + 5


def test_another_source_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert prepare("slake", mini.slake(tmp_path / "a"), out, "--allow-counts") == 0
    before = folder_content(out)
    assert prepare("slake", mini.slake(tmp_path / "b"), out, "--allow-counts") == 1
    assert "take another --out" in capsys.readouterr().err
    assert folder_content(out) == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="not empty"):
        begin(tmp_path / "full", {})


def test_comparison_with_published_numbers() -> None:
    first = Published("first", {"train": 3, "test": 2, "test CLOSED": 1})
    second = Published("second", {"train": 4, "test": 2})
    same = counts.compare(Counter({"train": 3, "test": 2, "test CLOSED": 1}), [first, second])
    assert not same.differs and same.version == "first" and not same.explained
    other = counts.compare(Counter({"train": 4, "test": 2}), [first, second])
    assert not other.differs and "second" in other.explained
    neither = counts.compare(Counter({"train": 5, "test": 2}), [first, second])
    assert neither.differs and neither.differences == [("train", 3, 5), ("test CLOSED", 1, 0)]
    part = counts.compare(Counter({"test": 2, "test CLOSED": 1}), [first], ["test"])
    assert not part.differs
    assert not counts.compare(Counter(), []).differs


def test_complete_numbers_are_no_difference(tmp_path: Path) -> None:
    """A part of the original size: VQA-RAD's test split, 272 closed and 179 open."""
    source = tmp_path / "rad"
    mini.put(source / "images" / "synpic0.jpg", mini.picture(0))
    rows = [
        mini.rad_row(n, "synpic0.jpg", f"Question {n}?", "yes" if n < 272 else "left",
                     answer_type="CLOSED" if n < 272 else "OPEN", phrase_type="test_freeform")
        for n in range(451)
    ]  # fmt: skip
    mini.save_json(source / "VQA_RAD Dataset Public.json", rows)
    assert prepare("vqa_rad", source, tmp_path / "out", "--splits", "test") == 0
    published = json.loads((tmp_path / "out" / "summary.json").read_text())["published"]
    assert published["counts"] == {"test": 451, "test CLOSED": 272, "test OPEN": 179}
    assert published["differences"] == []


def test_images_that_are_stored_otherwise(tmp_path: Path) -> None:
    """DICOM becomes PNG; a picture with another format's suffix gets its own."""
    pydicom = pytest.importorskip("pydicom")
    from pydicom.data import get_testdata_file

    source = Path(str(get_testdata_file("CT_small.dcm")))
    assert pydicom.dcmread(source).Modality == "CT"
    folder = tmp_path / "s"
    mini.put(folder / "scan.dcm", source.read_bytes())
    mini.put(folder / "b.png", mini.picture(1))
    mini.put(folder / "mine.csv", b"image,question,answer\nscan.dcm,Q?,yes\nb.png,Q?,no\n")
    assert prepare("custom", folder, tmp_path / "out") == 0
    rows = lines(tmp_path / "out" / "train.jsonl")
    assert [row["image"] for row in rows] == ["scan.dcm.png", "b.png.jpg"]
    assert rows[0]["modality"] == "CT" and "DICOM" in rows[0]["rules"]["modality"]
    with Image.open(tmp_path / "out" / "images" / "scan.dcm.png") as image:
        assert (image.mode, image.size) == ("RGB", (128, 128))
        assert np.asarray(image).std() > 10
    assert prepare("custom", folder, tmp_path / "out") == 0
    images = json.loads((tmp_path / "out" / "summary.json").read_text())["images"]
    assert images == {"written": 0, "kept": 2}


def test_versions_that_say_nothing_of_the_splits(tmp_path: Path) -> None:
    """A version without numbers for what was asked for is no version that agrees."""
    first = Published("first", {"train": 3, "val": 2})
    second = Published("second", {"train": 5})
    found = counts.compare(Counter({"val": 1}), [first, second], ["val"])
    assert found.differs and found.table == (("val", 2, 1),)
    assert counts.compare(Counter({"val": 1}), [second], ["val"]) == counts.none_known()
    source = mini.slake(tmp_path / "s")
    assert prepare("slake", source, tmp_path / "out", "--splits", "val") == 1


@pytest.mark.parametrize("name", ["custom", "slake"])
def test_a_folder_below_the_source_is_written_twice(tmp_path: Path, name: str) -> None:
    """What was prepared before is not taken for a part of the source."""
    source = tmp_path / "s"
    if name == "slake":
        mini.slake(source)
    else:
        mini.put(source / "a.csv", b"image,question,answer\np.jpg,Q?,yes\n")
        mini.put(source / "p.jpg", mini.picture(1))
    out = source / "prepared"
    assert prepare(name, source, out, "--allow-counts") == 0
    whole = folder_content(out)
    assert prepare(name, source, out, "--allow-counts") == 0
    assert folder_content(out) == whole


def test_mended_pictures_are_taken_anew(tmp_path: Path) -> None:
    """Of the same length, so that the size of the file says nothing."""
    source, out = tmp_path / "s", tmp_path / "out"
    mini.put(source / "a.csv", b"image,question,answer\na.bmp,Q?,yes\nv.nii,Q?,no\n")
    nib = pytest.importorskip("nibabel", reason="needs the extra medmoe_jax[medical]")
    for brightness in (10, 200):
        Image.new("L", (20, 20), brightness).save(source / "a.bmp")
        volume = np.arange(64, dtype=np.int16).reshape(4, 4, 4) * (1 if brightness == 10 else -1)
        nib.save(nib.Nifti1Image(volume, np.eye(4)), source / "v.nii")
        assert prepare("custom", source, out) == 0
        assert (out / "images" / "a.bmp").read_bytes() == (source / "a.bmp").read_bytes()
        shown = images.open_image(source / "v.nii")
        np.testing.assert_array_equal(images.open_image(out / "images" / "v.nii.png"), shown)


def test_pictures_that_training_would_refuse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Are told here: this one has pixels that are no numbers."""
    source = tmp_path / "s"
    mini.put(source / "a.csv", b"image,question,answer\na.tif,Q?,yes\n")
    Image.fromarray(np.full((20, 20), np.nan, np.float32)).save(source / "a.tif")
    assert prepare("custom", source, tmp_path / "out") == 1
    assert "not finite numbers" in capsys.readouterr().err


def test_other_splits_do_not_replace_those_that_are_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = mini.slake(tmp_path / "s"), tmp_path / "out"
    assert prepare("slake", source, out, "--allow-counts", "--splits", "train,val") == 0
    before = folder_content(out)
    assert prepare("slake", source, out, "--allow-counts", "--splits", "test") == 1
    assert "holds rows of train, val, which --splits test would remove" in capsys.readouterr().err
    assert folder_content(out) == before
    assert prepare("slake", source, out, "--allow-counts") == 0


def test_two_pictures_of_one_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "s"
    mini.put(source / "a.csv", b"image,question,answer\na.jpg,Q?,yes\na.jpg.png,Q?,no\n")
    mini.put(source / "a.jpg", mini.picture(1, "PNG"))
    mini.put(source / "a.jpg.png", mini.picture(2, "PNG"))
    assert prepare("custom", source, tmp_path / "out") == 1
    told = capsys.readouterr().err
    assert "would both be stored as 'a.jpg.png'" in told and "1 of 2 row(s)" in told


def test_halves_of_characters_are_bad_rows(tmp_path: Path) -> None:
    """In any field of a row, as what is written is UTF-8."""
    rows = [
        {"id": i, "answer_type": "open", "conversations": mini.talk("Why?", "so"), "task": task}
        for i, task in enumerate(("whole", "half \ud83d"))
    ]
    mini.put(tmp_path / "train_all.json", json.dumps(rows).encode())
    out = tmp_path / "out"
    assert prepare("med_moe", tmp_path / "train_all.json", out, "--on-error", "skip") == 0
    assert [row["id"] for row in lines(out / "manifest.jsonl")] == ["0"]
    assert "half a character" in (out / "problems.jsonl").read_text()


def test_names_that_leave_the_folder(tmp_path: Path) -> None:
    with Store(tmp_path / "images", 1) as store:
        for name in ("../a.png", "/tmp/a.png", "x/../../a.png"):
            picture = Picture(name, read=lambda: mini.picture(0, "PNG"))
            store.start(picture)
            with pytest.raises(DataError, match="out of the image folder"):
                store.name(picture)
    assert [p.name for p in tmp_path.iterdir()] == ["images"]
    assert not list((tmp_path / "images").iterdir())


def test_sheet_shows_the_pictures(tmp_path: Path) -> None:
    begin(tmp_path, {})
    write(Opened("x", drafts(2), (LICENCE,)), tmp_path)
    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    assert pixels.shape == (224 + 104, 2 * 224, 3)
    assert pixels[100:124, 100:124].std() > 20  # the picture
    assert (pixels[224:] < 128).any() and (pixels[224:] > 250).mean() > 0.5  # text on white


def test_wrong_names_and_layouts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["vqarad", "--source", "x", "--out", "y"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "vqa_rad" in said and "path_vqa" in said
    assert prepare("slake", tmp_path / "nowhere", tmp_path / "out") == 1
    assert "does not exist" in capsys.readouterr().err
    mini.put(tmp_path / "s" / "readme.txt", b"")
    for name in ("vqa_rad", "slake", "path_vqa", "med_moe", "custom"):
        assert prepare(name, tmp_path / "s", tmp_path / "out") == 1
        said = capsys.readouterr().err
        assert "looked for" in said and "found readme.txt" in said
    assert not (tmp_path / "out").exists()


def test_the_image_folder_is_found(tmp_path: Path) -> None:
    for name in ("other/a.png", "deep/images/a.png", "deep/images/x/b.png"):
        mini.put(tmp_path / name, b"")
    found = layouts.image_folder(tmp_path, ["a.png", "x/b.png"], None)
    assert found == tmp_path / "deep" / "images"
    with pytest.raises(DataError, match="--images"):
        layouts.image_folder(tmp_path, ["c.png"], None)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00001-eb8844602202be60.parquet", "train"),
        ("validation.json", "val"),
        ("test_rad", "test"),
        ("VQA_RAD Dataset Public.json", ""),
        ("trainset", ""),
        ("train_test", ""),
    ],
)
def test_split_of(name: str, split: str) -> None:
    assert split_of(name) == split


@pytest.mark.parametrize(
    ("value", "text", "put_right"),
    [
        ("yes", "yes", 0),
        (" a\t b\n", "a b", 1),
        (3, "3", 1),
        (2.0, "2", 1),
        (2.5, "2.5", 1),
        ("is <image> it", "is it", 1),
    ],
)
def test_texts(value: object, text: str, put_right: int) -> None:
    reading = Reading("train", "x", "y")
    assert reading.text(value, "answer") == text
    assert len(reading.handled) == put_right


@pytest.mark.parametrize("value", [None, "", " \t", float("nan"), True, ["a"], "<image>"])
def test_texts_that_are_none(value: object) -> None:
    with pytest.raises(DataError, match="the answer"):
        Reading("train", "x", "y").text(value, "answer")
    with pytest.raises(DataError, match=r"the answer holds half a character: '\\ud83d'"):
        Reading("train", "x", "y").text("\ud83d", "answer")


@pytest.mark.parametrize(
    ("given", "answer", "kind", "by_rule"),
    [
        ("OPEN", "yes", "OPEN", False),
        (" closed ", "left", "CLOSED", False),
        ("yes/no", "yes", "CLOSED", False),
        ("number", "2", "OPEN", False),
        (None, "Yes.", "CLOSED", True),
        ("", "none", "OPEN", True),
        ("sometimes", "no", "CLOSED", True),
        (float("nan"), "no", "CLOSED", True),
    ],
)
def test_answer_types(given: object, answer: str, kind: str, by_rule: bool) -> None:
    reading = Reading("train", "x", "y")
    assert reading.answer_type(given, answer) == kind
    assert ("answer_type" in reading.rules) == by_rule
