"""The check of data sets: planted defects are found and named, a clean set passes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_data
from PIL import Image, ImageEnhance

from medmoe_jax.config import DataConfig
from medmoe_jax.data import tokens
from medmoe_jax.data.check import __main__ as check
from medmoe_jax.data.check import leakage, lengths, pictures, rows
from medmoe_jax.data.phantom.render import draw_image
from medmoe_jax.data.problems import DataError

ROOT = Path(__file__).resolve().parents[1]


def phantom(split: str, index: int) -> Image.Image:
    return Image.fromarray(draw_image(3, split, index, 96)[0]).convert("RGB")


def row(name: Any, question: str = "Is there a lesion?", answer: Any = "yes", **other: Any) -> dict:
    talk = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    facts = {"id": f"{name}-{question}", "answer_type": "closed", "modality": "CT"}
    return facts | {"image": name, "conversations": talk} | other


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    """A folder with train.json and test.jsonl, 8 + 4 images."""
    (tmp_path / "images").mkdir()
    for split, n in (("train", 8), ("test", 4)):
        for index in range(n):
            phantom(split, index).save(tmp_path / "images" / f"{split}{index}.png")
    tiny_data.save_rows(tmp_path / "train.json", [row(f"train{i}.png") for i in range(8)])
    tiny_data.save_rows(tmp_path / "test.jsonl", [row(f"test{i}.png") for i in range(4)])
    return tmp_path


def run(folder: Path, *more: str) -> tuple[int, dict, str]:
    """Exit status, JSON and Markdown of a check of train.json and test.jsonl."""
    files = [str(folder / name) for name in ("train.json", "test.jsonl")]
    status = check.main([*files, "--out", str(folder / "out"), *more])
    found = json.loads((folder / "out" / "report.json").read_text())
    return status, found, (folder / "out" / "report.md").read_text()


def add(folder: Path, *new: dict, name: str = "train.json") -> int:
    """Appends rows; returns the number of the first."""
    file = folder / name
    old = [r for _, r, _ in rows.sources.records(file)]
    tiny_data.save_rows(file, [*old, *new])
    return len(old)


def places(found: dict, kind: str) -> list[tuple[str, int | None]]:
    """File name and row of the findings of a kind."""
    return [(Path(f["file"]).name, f["row"]) for f in found["findings"] if f["kind"] == kind]


def test_a_clean_set_passes(clean: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, found, text = run(clean)
    assert (status, found["errors"], found["warnings"], found["rows"]) == (0, 0, 0, 12)
    assert found["findings"] == [] and found["pairs"] == [] and found["usable"] == 12
    assert found["balance"]["modality"] == {"train": {"CT": 8}, "test": {"CT": 4}}
    assert "**0 errors, 0 warnings.**" in text and "| CT | 8 (100%) | 4 (100%) |" in text
    assert "Lengths were not checked" in text
    assert capsys.readouterr().out.splitlines()[-2] == "12 rows: 0 errors, 0 warnings"


def test_defects_of_rows_and_images(clean: Path) -> None:
    good = (clean / "images" / "train0.png").read_bytes()
    (clean / "images" / "cut.png").write_bytes(good[: len(good) // 2])
    (clean / "images" / "text.png").write_text("no image")
    Image.new("1", (10000, 10000)).save(clean / "images" / "bomb.png")
    Image.new("1", (60000, 2)).save(clean / "images" / "line.png")
    phantom("pretrain", 1).save(clean / "images" / "really.png", "JPEG")
    phantom("pretrain", 2).resize((12, 12)).save(clean / "images" / "dot.png")
    (clean / "secret.png").write_bytes(good)
    blank = [{"from": "human", "value": " "}, {"from": "gpt", "value": "yes"}]
    planted = [
        ("unreadable image", row("cut.png")),
        ("unreadable image", row("text.png")),
        ("absurd size", row("bomb.png")),
        ("absurd size", row("line.png")),
        ("missing image", row("none.png")),
        ("path leaves the folder", row("../secret.png")),
        ("empty row", row("train1.png", "And this?", "  ")),
        ("empty row", {"id": "e", "conversations": blank}),
        ("unusable row", {"id": "x", "image": "train1.png"}),
        ("unknown answer type", row("train2.png", "Where?", answer_type="maybe")),
        ("wrong extension", row("really.png")),
        ("odd size", row("dot.png")),
        ("doubled row", row("train3.png")),
        ("doubled id", row("train3.png", "What else?", id="train4.png-Is there a lesion?")),
        ("no answer type", row("train3.png", "Why?", answer_type=None)),
        ("no modality", row("train3.png", "How?", modality="other")),
    ]
    start = add(clean, *(r for _, r in planted))
    status, found, text = run(clean)
    assert status == 1
    for place, (kind, _) in enumerate(planted):
        assert ("train.json", start + place) in places(found, kind), kind
    assert len(found["findings"]) == len(planted)
    levels = {f["kind"]: f["level"] for f in found["findings"]}
    warned = {"wrong extension", "odd size", "doubled row", "doubled id"}
    warned |= {"no answer type", "no modality"}
    assert {k for k, level in levels.items() if level == "warning"} == warned
    assert f"train.json row {start} (id 'cut.png-Is there a lesion?'): image 'cut.png'" in text
    assert found["rows"] == 12 + len(planted) and found["usable"] == 12 + len(planted) - 10


def test_files_that_cannot_be_read(clean: Path) -> None:
    (clean / "train.json").write_text("[{")
    status, found, _ = run(clean)
    assert status == 1 and places(found, "unreadable file") == [("train.json", None)]
    assert found["rows"] == 4  # the other file is looked at all the same
    (clean / "test.jsonl").write_text(json.dumps(row("test0.png")) + "\n{broken\n")
    _, found, _ = run(clean)
    assert places(found, "unusable row") == [("test.jsonl", 1)]


def variant(picture: Image.Image, name: str, path: Path) -> Path:
    """Writes a copy that is not the same file."""
    path = path.with_suffix(".jpg" if "JPEG" in name else ".bmp" if name == "BMP" else ".png")
    width, height = picture.size
    changed = {
        "half the size": lambda: picture.resize((width // 2, height // 2)),
        "larger": lambda: picture.resize((width * 3 // 2, height * 3 // 2)),
        "brighter": lambda: ImageEnhance.Brightness(picture).enhance(1.12),
        "darker": lambda: ImageEnhance.Brightness(picture).enhance(0.8),
        "less contrast": lambda: ImageEnhance.Contrast(picture).enhance(0.7),
    }.get(name, lambda: picture)()
    changed.save(path, **({"quality": int(name[-2:])} if "JPEG" in name else {}))
    return path


COPIES = ["JPEG 90", "JPEG 60", "half the size", "larger", "brighter", "darker", "less contrast"]


@pytest.mark.parametrize("how", ["same file", "BMP", *COPIES])
def test_pictures_in_two_splits(clean: Path, how: str) -> None:
    """Each copy of a training image is found, named and drawn; nothing else is."""
    kind = (
        "picture in two splits" if how in ("same file", "BMP") else "near-duplicate in two splits"
    )
    names = []
    for index in range(0, 8, 2):
        original = clean / "images" / f"train{index}.png"
        path = original.with_name(f"copy{index}.png")
        if how == "same file":
            path.write_bytes(original.read_bytes())
        else:
            path = variant(Image.open(original), how, path)
        names.append(path.name)
    start = add(clean, *(row(name, f"What is {name}?") for name in names), name="test.jsonl")
    status, found, text = run(clean)
    assert status == 1
    assert places(found, kind) == [("test.jsonl", start + n) for n in range(4)]
    assert len(found["findings"]) == 4 and found["shared"] == {"train & test": 4}
    pairs = {(Path(p["first"]).name, Path(p["second"]).name) for p in found["pairs"]}
    assert pairs == {(f"train{2 * n}.png", name) for n, name in enumerate(names)}
    assert "![pairs](pairs.png)" in text
    with Image.open(clean / "out" / "pairs.png") as sheet:
        assert sheet.size == (412, 4 * 236)
    status, found, _ = run(clean, "--leakage", "warning")
    assert status == 0 and found["warnings"] == 4


def test_no_false_alarm_among_phantoms() -> None:
    """Also the closest of many different images stay apart."""
    facts = []
    for index in range(160):
        grey = phantom("train", index).convert("L")
        size = (pictures.THUMB, pictures.THUMB)
        thumb = np.asarray(grey.resize(size, Image.Resampling.BOX))
        facts.append((pictures._difference(grey), thumb.ravel()))
    hashes = np.array([f[0] for f in facts], np.uint64)
    thumbs = np.stack([f[1] for f in facts])
    assert leakage.near(hashes, thumbs, np.arange(160)) == []
    # The same by plain loops, with a threshold that some pairs reach.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leakage, "SIMILAR", 0.9)
        patch.setattr(leakage, "BLOCK", 50)
        found = {
            (min(i, j), max(i, j)) for i, j, _ in leakage.near(hashes, thumbs, np.arange(160) % 3)
        }
    expected = set()
    for i in range(160):
        for j in range(i + 1, 160):
            apart = bin(int(hashes[i]) ^ int(hashes[j])).count("1")
            alike = np.corrcoef(thumbs[i], thumbs[j])[0, 1]
            if i % 3 != j % 3 and apart <= leakage.DISTANCE and alike >= 0.9:
                expected.add((i, j))
    assert found == expected and expected


def test_one_grey_is_no_evidence(clean: Path) -> None:
    for name, value in (("a", 10), ("b", 200)):
        Image.new("RGB", (64, 64), (value,) * 3).save(clean / "images" / f"{name}.png")
    add(clean, row("a.png"))
    add(clean, row("b.png"), name="test.jsonl")
    assert run(clean)[0] == 0


def test_questions_in_two_splits(clean: Path) -> None:
    path = variant(Image.open(clean / "images" / "train2.png"), "JPEG 90", clean / "images" / "c")
    new = [
        row(path.name, "is there  a LESION?", "no"),
        row("train3.png", "Something else?"),
        row(None, "What is a lung?", image=None),
    ]
    new[2]["conversations"][0]["value"] = "What is a lung?"
    start = add(clean, *new, name="test.jsonl")
    number = add(clean, new[2] | {"id": "text"})
    _, found, _ = run(clean)
    assert places(found, "question in two splits") == [
        ("test.jsonl", start),
        ("test.jsonl", start + 2),
    ]
    reasons = [f["reason"] for f in found["findings"] if f["kind"] == "question in two splits"]
    assert "about the same picture, with another answer, is in train" in reasons[0]
    assert "train.json row 2 (id 'train2.png-" in reasons[0]
    assert (
        f"without a picture, with the same answer, is in train: {clean / 'train.json'} row {number}"
        in reasons[1]
    )
    assert places(found, "picture in two splits") == [("test.jsonl", start + 1)]


def test_splits(tmp_path: Path) -> None:
    for name, split in (
        ("train_all.json", "train"),
        ("my-validation.jsonl", "val"),
        ("test_rad.json", "test"),
        ("instruct_heldout.json", "test"),
        ("contest.json", "contest"),
    ):
        assert rows.split_of({}, Path(name)) == split
    assert rows.split_of({"split": "Validation"}, Path("train.json")) == "val"
    # A prepared folder: one manifest, `images` beside it.
    (tmp_path / "images").mkdir()
    phantom("train", 0).save(tmp_path / "images" / "a.png")
    new = [row("a.png", split="train"), row("a.png", "Where?", split="test")]
    tiny_data.save_rows(tmp_path / "manifest.jsonl", new)
    assert check.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert places(found, "picture in two splits") == [("manifest.jsonl", 1)]


def test_lengths_and_padding(clean: Path) -> None:
    folder = tiny_data.save_tokenizer(clean / "model" / "tokenizer")
    long = row("train1.png", "Describe it.", "word " * 900)
    start = add(clean, long)
    config = clean / "config.py"
    config.write_text(
        "from medmoe_jax.config import DataConfig, OptimConfig, RunConfig\n"
        "def get_config(size='16'):\n"
        "    data = DataConfig(max_length=512, buckets=(64, 128, 256))\n"
        f"    return RunConfig(init={str(clean / 'model')!r}, data=data,\n"
        "        optim=OptimConfig(batch_size=int(size), accumulate=2))\n"
    )
    status, found, text = run(clean, "--config", f"{config}:8", "--patches", "16")
    assert status == 1 and places(found, "over-long sample") == [("train.json", start)]
    tokenizer = tokens.load_tokenizer(folder, "phi")
    table = rows.read([clean / "train.json", clean / "test.jsonl"])
    measured, _ = lengths.measure(table.rows, DataConfig(max_length=512), tokenizer, 16)
    assert found["lengths"] == measured.tolist() and measured[start] > 900
    assert "![lengths](lengths.png)" in text and (clean / "out" / "lengths.png").is_file()
    used = [n for n in found["lengths"] if n <= 512]
    counts = {size: 0 for size in (64, 128, 256, 512)}
    for n in used:
        counts[min(size for size in counts if size >= n)] += 1
    assert found["padding"]["rows"] == {str(size): n for size, n in counts.items()}
    assert list(found["padding"]["waste"]) == ["shuffle", "group", "pack"]
    assert re.search(r"\| group \(configured\) \| \d+\.\d% \|", text)


def test_padding_by_hand() -> None:
    cfg = DataConfig(max_length=100, buckets=(10, 50), batching="shuffle")
    some = np.array([10, 10, 10, 10, 0, 101])  # unusable and over-long rows are left out
    found = lengths.padding(some, cfg, 2)
    assert found["rows"] == {10: 4, 50: 0, 100: 0} and found["batching"] == "shuffle"
    assert found["waste"] == {"shuffle": 0, "group": 0, "pack": pytest.approx(1 - 40 / 50)}
    found = lengths.padding(np.array([11, 60]), cfg, 2)["waste"]
    assert found["shuffle"] == found["group"] == pytest.approx(1 - 71 / 200)
    assert found["pack"] == pytest.approx(1 - 71 / 100)
    # The best fit: 60 + 40 and 55 + 45 fill two rows.
    found = lengths.padding(np.array([40, 45, 55, 60]), cfg, 2)["waste"]
    assert found["pack"] == pytest.approx(0)
    assert lengths.padding(np.array([0, 101]), cfg, 2)["waste"] == {}


def test_patients_are_named_by_tag_alone(clean: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pydicom", reason="needs the extra medmoe_jax[medical]")
    from test_medical_dicom import SECRET, ramp, save

    pixels = np.tile(ramp(np.uint8, 0, 1), (2, 2))
    save(clean / "images" / "a.dcm", pixels, BurnedInAnnotation="YES", Modality="MR")
    save(clean / "images" / "b.dcm", pixels.T, PatientName="Anonymous", PatientID="")
    whole = (clean / "images" / "a.dcm").read_bytes()
    (clean / "images" / "cut.dcm").write_bytes(whole[:-50])
    start = add(clean, row("a.dcm"), row("b.dcm", modality="MRI"), row("cut.dcm"))
    status, found, text = run(clean)
    assert status == 1
    assert places(found, "tags of a patient") == [("train.json", start)]
    tags = "'a.dcm' has the DICOM tags PatientName, PatientID, BurnedInAnnotation"
    assert tags in text
    assert places(found, "modality of another kind") == [("train.json", start)]
    assert places(found, "unreadable image") == [("train.json", start + 2)]
    said = capsys.readouterr()
    for name in [*SECRET.split("^"), "4711"]:
        assert name not in said.out + said.err + text + json.dumps(found)


def test_command_line(clean: Path) -> None:
    command = [sys.executable, "-m", "medmoe_jax.data.check", str(clean / "train.json")]
    command += ["--config", str(ROOT / "configs" / "stage3.py") + ":tiny", "--out", "report"]
    done = subprocess.run(command, cwd=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (clean / "report" / "report.md").is_file() and "0 errors" in done.stdout
    assert check.main([str(clean / "train.json"), "--config", "none.py"]) == 1
    with pytest.raises(DataError, match="window 'x'"):
        rows_view = check.arguments().parse_args(["f", "--window", "x"])
        check.flags.view(rows_view)
