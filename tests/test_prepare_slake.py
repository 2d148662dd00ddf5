"""SLAKE: languages, layouts and the row that is known to be empty."""

from __future__ import annotations

import json
from pathlib import Path

import miniature_sources as mini
import pytest
from miniature_sources import lines, prepare

from medmoe_jax.data.sources import read_samples


def test_english(tmp_path: Path) -> None:
    assert prepare("slake", mini.slake(tmp_path / "s"), tmp_path / "out", "--allow-counts") == 0
    rows = lines(tmp_path / "out" / "manifest.jsonl")
    assert [(row["id"], row["split"]) for row in rows] == [
        ("0", "train"), ("1", "train"), ("3", "train"), ("10", "val"),
        ("20", "test"), ("22", "test"),
    ]  # fmt: skip
    assert [row["answer_type"] for row in rows] == (
        ["OPEN", "CLOSED", "OPEN", "OPEN", "CLOSED", "OPEN"]
    )
    assert [row["modality"] for row in rows] == ["CT", "CT", "MRI", "X-ray", "X-ray", "X-ray"]
    assert rows[1]["conversations"] == mini.talk("<image>\nIs it normal?", "Yes")
    assert rows[2]["conversations"][1]["value"] == "2"
    assert rows[2]["question_type"] == "Quantity" and rows[2]["language"] == "en"
    assert {row["licence"] for row in rows} == {"CC-BY-4.0"}
    assert not any(row["rules"] for row in rows)
    assert rows[0]["image"] == "xmlab1/source.jpg"
    image = tmp_path / "out" / "images" / rows[0]["image"]
    assert image.read_bytes() == mini.picture(1)

    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["left_out"] == {
        "qid 1622: its answer is empty in the release": 1,
        "question in zh (--language en)": 3,
    }
    found = {d["rows"]: d["found"] for d in summary["published"]["differences"]}
    assert found == {"train": 4, "val": 1, "test": 2}  # the empty row is one of the published ones
    for split in ("train", "val", "test"):
        assert read_samples([tmp_path / "out" / f"{split}.jsonl"], tmp_path / "out" / "images")


@pytest.mark.parametrize(("language", "ids"), [("zh", "2 4 21"), ("both", "0 1 2 3 4 10 20 21 22")])
def test_languages(tmp_path: Path, language: str, ids: str) -> None:
    more = ("--language", language, "--allow-counts")
    assert prepare("slake", mini.slake(tmp_path / "s"), tmp_path / "out", *more) == 0
    assert [row["id"] for row in lines(tmp_path / "out" / "manifest.jsonl")] == ids.split()


def test_zip_files_give_the_same(tmp_path: Path) -> None:
    plain = mini.slake(tmp_path / "plain")
    images = mini.slake(tmp_path / "images", zipped_images=True)
    whole = mini.zipped(plain, tmp_path / "Slake1.0.zip")
    for number, source in enumerate((plain, images, whole)):
        assert prepare("slake", source, tmp_path / f"out{number}", "--allow-counts") == 0
    ours = [lines(tmp_path / f"out{n}" / "manifest.jsonl") for n in range(3)]
    for rows in ours:
        for row in rows:
            del row["origin"]  # names the file
    assert ours[0] == ours[1] == ours[2]
    for name in {row["image"] for row in ours[0]}:
        copies = {(tmp_path / f"out{n}" / "images" / name).read_bytes() for n in range(3)}
        assert len(copies) == 1


def test_rows_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        mini.slake_row(1, "xmlab1/source.jpg", "Q?", "fine"),
        mini.slake_row(2, "xmlab1/source.jpg", "Q?", "  "),
        mini.slake_row(3, "xmlab1/source.jpg", "Q?", "ja", q_lang="de"),
        mini.slake_row(4, "../secret.jpg", "Q?", "a"),
        mini.slake_row(5, "xmlab9/source.jpg", "Q?", "a"),
        mini.slake_row(6, "xmlab2/source.jpg", "Q?", "a"),
        mini.slake_row(7, "xmlab3/source.jpg", "Q?", "a"),
        mini.slake_row(8, "xmlab1/source.jpg", "Q?", True),
        "no object",
    ]
    source = tmp_path / "s"
    mini.save_json(source / "test.json", rows)
    mini.put(source / "imgs" / "xmlab1" / "source.jpg", mini.picture(1))
    mini.put(source / "imgs" / "xmlab2" / "source.jpg", b"<html>not found</html>")
    mini.put(source / "imgs" / "xmlab3" / "source.jpg", mini.picture(3)[:-200])
    mini.put(source / "secret.jpg", mini.picture(4))
    options = ("--splits", "test", "--allow-counts")
    assert prepare("slake", source, tmp_path / "out", *options) == 1
    said = capsys.readouterr().err
    assert "8 of 9 row(s) cannot be used" in said and "--on-error skip" in said
    assert not (tmp_path / "out" / "manifest.jsonl").exists()

    assert prepare("slake", source, tmp_path / "out", *options, "--on-error", "skip") == 0
    assert [row["id"] for row in lines(tmp_path / "out" / "test.jsonl")] == ["1"]
    faults = {problem["row"]: problem["reason"] for problem in
              lines(tmp_path / "out" / "problems.jsonl")}  # fmt: skip
    assert set(faults) == set(range(1, 9))
    assert "answer is empty" in faults[1] and "'de' is unknown" in faults[2]
    assert "out of the image folder" in faults[3] and "is not in" in faults[4]
    assert "no image" in faults[5] and "cannot be read" in faults[6]
    assert "must be text" in faults[7] and "must be an object" in faults[8]
    assert [p.name for p in (tmp_path / "out" / "images").iterdir()] == ["xmlab1"]


def test_mirror_with_the_fields_of_the_original(tmp_path: Path) -> None:
    rows = mini.slake_rows()
    for name, split in (("train", "train"), ("validation", "validation"), ("test", "test")):
        kept = [row | {"image": mini.embedded(1)} for row in rows[name] if row["q_lang"] != "zh"]
        kept = [row | {"answer": str(row["answer"])} for row in kept]
        mini.save_parquet(tmp_path / "s" / "data" / f"{split}-00000-of-00001.parquet", kept)
    assert prepare("slake", tmp_path / "s", tmp_path / "out", "--allow-counts") == 0
    out = lines(tmp_path / "out" / "manifest.jsonl")
    assert [row["id"] for row in out] == ["0", "1", "3", "10", "20", "22"]
    assert [row["modality"] for row in out] == ["CT", "CT", "MRI", "X-ray", "X-ray", "X-ray"]
    assert not any(row["rules"] for row in out)


def test_mirror_with_image_question_and_answer_only(tmp_path: Path) -> None:
    rows = [
        {
            "images": [mini.embedded(1)],
            "problem": "<image>Which imaging modality?",
            "answer": "MRI",
        },
        {"images": [mini.embedded(1)], "problem": "<image>Is it normal?", "answer": "No"},
    ]
    mini.save_parquet(tmp_path / "s" / "test-00000-of-00001.parquet", rows)
    options = ("--allow-counts", "--splits", "test")
    assert prepare("slake", tmp_path / "s", tmp_path / "out", *options) == 0
    out = lines(tmp_path / "out" / "test.jsonl")
    assert [row["conversations"][0]["value"] for row in out] == (
        ["<image>\nWhich imaging modality?", "<image>\nIs it normal?"]
    )
    assert [row["answer_type"] for row in out] == ["OPEN", "CLOSED"]
    assert [row["modality"] for row in out] == ["MRI", "MRI"]
    assert set(out[0]["rules"]) == {"answer_type", "modality", "language"}
