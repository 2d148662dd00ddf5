"""VQA-RAD: every field of the original and of the mirrors, by hand."""

from __future__ import annotations

import json
from pathlib import Path

import miniature_sources as mini
import pytest
from miniature_sources import lines, prepare

from medmoe_jax.data.prepare.spoken import spoken_modality
from medmoe_jax.data.sources import read_samples


def test_original(tmp_path: Path) -> None:
    source = mini.vqa_rad(tmp_path / "rad")
    assert prepare("vqa_rad", source, tmp_path / "out", "--allow-counts") == 0
    rows = {row["id"]: row for row in lines(tmp_path / "out" / "manifest.jsonl")}
    assert list(rows) == ["1", "2", "3", "4", "5", "6", "7"]
    third = rows["3"]
    assert third["conversations"] == [
        {"from": "human", "value": "<image>\nHow many lesions are there?"},
        {"from": "gpt", "value": "2"},
    ]
    assert third["image"] == "synpic1.jpg" and third["question_type"] == "COUNT"
    assert (third["split"], third["source"], third["licence"]) == ("train", "vqa_rad", "CC0-1.0")
    assert [row["answer_type"] for row in rows.values()] == (
        ["CLOSED", "OPEN", "OPEN", "CLOSED", "OPEN", "CLOSED", "CLOSED"]
    )
    assert [row["modality"] for row in rows.values()] == (
        ["MRI", "MRI", "X-ray", "X-ray", "CT", "", ""]
    )
    assert rows["4"]["question_type"] == "SIZE, PRES"
    assert rows["4"]["conversations"][1]["value"] == "No"
    assert set(rows["1"]["rules"]) == {"modality"} and rows["6"]["rules"].keys() == {"answer_type"}
    copied = (tmp_path / "out" / "images" / "synpic0.jpg").read_bytes()
    assert copied == mini.picture(0)

    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["rows"] == {
        "train": {"total": 4, "OPEN": 2, "CLOSED": 2},
        "test": {"total": 3, "OPEN": 1, "CLOSED": 2},
    }
    assert summary["handled"] == {
        "answer: a number, written as text": 1,
        "answer: stray white space removed": 1,
        "answer_type: 'open' written as OPEN": 1,
        "answer_type: stray white space removed": 2,
        "answer_type: unknown 'wrong', given by rule": 1,
        "question: stray white space removed": 1,
    }
    assert summary["left_out"] == {"a row that is there twice, id and all": 1}
    different = {d["rows"]: d["found"] for d in summary["published"]["differences"]}
    assert different == {"train": 5, "test": 3, "test CLOSED": 2, "test OPEN": 1}
    read = read_samples([tmp_path / "out" / "train.jsonl"], tmp_path / "out" / "images")
    assert [sample.id for sample in read.samples] == ["1", "2", "3", "4"]


def test_numbers_that_differ_are_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare("vqa_rad", mini.vqa_rad(tmp_path / "rad"), tmp_path / "out") == 1
    printed = capsys.readouterr()
    assert "train               1797       5" in printed.out and "--allow-counts" in printed.err
    assert (tmp_path / "out" / "manifest.jsonl").is_file()


def test_mirror(tmp_path: Path) -> None:
    source = mini.vqa_rad_mirror(tmp_path / "rad")
    assert prepare("vqa_rad", source, tmp_path / "out", "--allow-counts") == 0
    rows = lines(tmp_path / "out" / "manifest.jsonl")
    assert [row["id"] for row in rows] == ["train-0", "train-1", "train-2", "test-0", "test-1"]
    types = [row["answer_type"] for row in rows]
    assert types == ["CLOSED", "OPEN", "OPEN", "CLOSED", "OPEN"]
    assert all("answer_type" in row["rules"] for row in rows)
    assert [row["modality"] for row in rows] == ["CT", "CT", "", "CT", ""]
    assert rows[0]["image"] == rows[1]["image"] == rows[3]["image"]
    assert rows[0]["image"].endswith(".jpg") and rows[2]["image"].endswith(".png")
    assert (tmp_path / "out" / "images" / rows[2]["image"]).read_bytes() == mini.picture(1, "PNG")
    assert len(list((tmp_path / "out" / "images").iterdir())) == 3


@pytest.mark.parametrize(
    ("question", "answer", "modality"),
    [
        ("What is the modality?", "Axial CT with contrast", "CT"),
        ("What modality?", "T2-weighted MRI", "MRI"),
        ("Is this an MRI?", "Yes", "MRI"),
        ("Is this an MRI?", "no", ""),
        ("MRI or CT?", "yes", ""),
        ("What is this?", "chest x-ray, PA", "X-ray"),
        ("What is this?", "plain film or CT", ""),
        ("What is this?", "acting", ""),
    ],
)
def test_spoken_modality(question: str, answer: str, modality: str) -> None:
    assert spoken_modality(question, answer) == modality
