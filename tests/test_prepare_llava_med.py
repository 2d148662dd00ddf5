"""LLaVA-Med: alignment, instruct and mirrors, with images that lack and rows that are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from miniature_llava_med import (
    aligned,
    images,
    instructed,
    picture,
    talk,
    write_json,
    write_parquet,
)

from medmoe_jax.data.prepare.__main__ import main
from medmoe_jax.data.sources import read_samples


def prepare(source: Path, out: Path, *more: str) -> int:
    return main(["llava_med", "--source", str(source), "--out", str(out), *more])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_alignment(tmp_path: Path) -> None:
    """Rows without an image are left out, counted and listed; the others are JSON again too."""
    images(tmp_path / "source" / "images", 3)
    rows = [aligned(0), aligned(1), aligned(7), aligned(2), aligned(8, image="gone.jpg")]
    write_json(tmp_path / "source" / "llava_med_alignment_500k.json", rows)
    out = tmp_path / "out"
    assert prepare(tmp_path / "source", out, "--allow-counts") == 0
    written = lines(out / "manifest.jsonl")
    assert [row["id"] for row in written] == ["p0", "p1", "p2"]
    assert written[1]["conversations"] == talk(
        "Describe the image briefly.\n<image>", "Figure 1.\nTwo lines."
    )
    assert {row["answer_type"] for row in written} == {"OPEN"}
    assert {row["modality"] for row in written} == {""}
    assert {row["question_type"] for row in written} == {"alignment"}
    assert {row["licence"] for row in written} == {"CC-BY-NC-4.0"}
    assert (out / "images" / "p2.jpg").read_bytes() == picture(2)
    assert (out / "missing_images.txt").read_text() == "gone.jpg\np7.jpg\n"
    filtered = json.loads((out / "llava_med_alignment_500k_filter.json").read_text())
    assert filtered == [rows[0], rows[1], rows[3]]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["left_out"] == {"the image is missing (missing_images.txt)": 2}
    assert summary["handled"] == {"conversatons read as conversations": 3}
    assert summary["published"]["differences"] == [
        {"rows": "train", "published": 500_000, "found": 5}
    ]
    assert len(read_samples([out / "train.jsonl"], out / "images").samples) == 3


@pytest.mark.parametrize(
    "on, modality, rule",
    [
        (("chest_xray",), "X-ray", "agree"),
        (("mri",), "MRI", "agree"),
        (("ct_scan",), "CT", "agree"),
        (("histology", "gross"), "Pathology", "agree"),
        (("ct_scan", "mri"), "", "disagree"),
        ((), "", "none"),
    ],
)
def test_domain_flags(tmp_path: Path, on: tuple[str, ...], modality: str, rule: str) -> None:
    images(tmp_path / "images", 1)
    source = write_json(tmp_path / "some" / "instruct.json", [instructed(0, *on)])
    more = ("--images", str(tmp_path / "images"), "--allow-counts")
    assert prepare(source, tmp_path / "out", *more) == 0
    (row,) = lines(tmp_path / "out" / "manifest.jsonl")
    assert row["modality"].lower() == modality.lower() and rule in row["rules"]["modality"]
    assert row["question_type"] == "instruct" and row["domain"]["mri"] == ("mri" in on)
    assert len(row["conversations"]) == 4
    (sample,) = read_samples(
        [tmp_path / "out" / "train.jsonl"], tmp_path / "out" / "images"
    ).samples
    assert (sample.modality == -1) == (modality == "")


@pytest.mark.parametrize(
    "row, message",
    [
        ("text", "a row must be an object"),
        (instructed(1, conversations=None), "no 'conversations' list"),
        (instructed(1, conversations=["a"]), "must be an object with 'from'"),
        (instructed(1, conversations=talk("a", "b", "c")), "must take turns"),
        (instructed(1, conversations=talk("a", "b", "c", "d")[::-2]), "must take turns"),
        (instructed(1, conversations=talk("a", "b")[1:]), "must take turns"),
        (instructed(1, conversations=talk("a", " ")), "the answer is empty"),
        (instructed(1, conversations=talk("<image> <image>", "b")), "2 <image> in the text"),
        (instructed(1, image="../p1.jpg"), "points out of"),
        (instructed(1, image=7), "must be a path"),
        (instructed(2), "'p2.jpg' is no image that can be read"),
        (instructed(3), "'p3.jpg' is no image that can be read"),
    ],
)
def test_rows_that_are_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], row: Any, message: str
) -> None:
    folder = images(tmp_path / "source", 2)
    (folder / "p2.jpg").write_text("<html>not found</html>")
    (folder / "p3.jpg").write_bytes(picture(3)[:500])
    write_json(folder / "a.json", [instructed(0, "mri"), row])
    assert prepare(folder, tmp_path / "out", "--allow-counts") == 1
    error = capsys.readouterr().err
    assert "row 1" in error and message in error and "1 of 2 row(s)" in error
    assert prepare(folder, tmp_path / "out", "--allow-counts", "--on-error", "skip") == 0
    assert [r["id"] for r in lines(tmp_path / "out" / "manifest.jsonl")] == ["p0"]
    assert len(lines(tmp_path / "out" / "problems.jsonl")) == 1


@pytest.mark.parametrize("key", ["conversations", "conversatons"])
@pytest.mark.parametrize("as_text", [False, True])
def test_mirror(tmp_path: Path, key: str, as_text: bool) -> None:
    """Images inside; conversations and flags as objects or as JSON text."""

    def value(content: Any) -> Any:
        return json.dumps(content) if as_text else content

    rows = []
    for i in range(3):
        row = instructed(i, "mri", image={"bytes": picture(i), "path": f"p{i}.jpg"})
        row["domain"] = value(row["domain"])
        row[key] = value(row.pop("conversations"))
        rows.append(row)
    rows[2]["image"] = {"bytes": None, "path": "p2.jpg"}
    write_parquet(tmp_path / "source" / "train-00000-of-00001.parquet", rows)
    out = tmp_path / "out"
    assert prepare(tmp_path / "source", out, "--on-error", "skip") == 0
    written = lines(out / "manifest.jsonl")
    assert [row["modality"] for row in written] == ["MRI", "MRI"]
    assert written[1]["conversations"] == instructed(1)["conversations"]
    for i, row in enumerate(written):
        assert (out / "images" / row["image"]).read_bytes() == picture(i)
    assert "only its path, 'p2.jpg'" in (out / "problems.jsonl").read_text()


def test_a_first_turn_of_gpt_is_dropped(tmp_path: Path) -> None:
    folder = images(tmp_path / "source", 1)
    row = instructed(0, conversations=talk("", "Hello.", "What?", "This.")[1:])
    write_json(folder / "a.json", [row])
    assert prepare(folder, tmp_path / "out", "--allow-counts") == 0
    (written,) = lines(tmp_path / "out" / "manifest.jsonl")
    assert written["conversations"] == talk("<image>\nWhat?", "This.")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["handled"] == {"a turn of 'gpt' before the first question dropped": 1}


def test_texts_and_names_that_no_file_can_have(tmp_path: Path) -> None:
    """Half a character makes one row unusable; a name longer than names can be is a lost image."""
    folder = images(tmp_path / "images", 1)
    broken = aligned(0, id="half", conversatons=talk("Why?\n<image>", "so \ud83d"))
    long = aligned(1, image="x" * 300 + ".jpg")
    source = tmp_path / "llava_med_alignment_500k.json"
    source.write_text(json.dumps([aligned(0), broken, long]))
    more = ("--images", str(folder), "--allow-counts", "--on-error", "skip")
    assert prepare(source, tmp_path / "out", *more) == 0
    assert [row["id"] for row in lines(tmp_path / "out" / "manifest.jsonl")] == ["p0"]
    assert "half a character" in (tmp_path / "out" / "problems.jsonl").read_text()
    assert (tmp_path / "out" / "missing_images.txt").read_text() == "x" * 300 + ".jpg\n"
    filtered = json.loads((tmp_path / "out" / "llava_med_alignment_500k_filter.json").read_text())
    assert filtered == [aligned(0), broken]


def test_what_is_no_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a").mkdir()
    assert prepare(tmp_path / "a", tmp_path / "out") == 1
    assert "looked for one JSON list of conversations" in capsys.readouterr().err
    write_json(tmp_path / "a" / "x.json", [instructed(0)])
    assert prepare(tmp_path / "a", tmp_path / "out") == 1
    assert "name it with --images" in capsys.readouterr().err
    write_json(tmp_path / "a" / "y.json", [aligned(0)])
    assert prepare(tmp_path / "a", tmp_path / "out") == 1
    assert "several fit: x.json, y.json" in capsys.readouterr().err
