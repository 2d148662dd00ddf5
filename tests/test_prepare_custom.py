"""One's own tables and Med-MoE's files."""

from __future__ import annotations

import json
from pathlib import Path

import miniature_sources as mini
import pytest
from miniature_sources import lines, prepare

from medmoe_jax.data import questions
from medmoe_jax.data.sources import read_samples


def test_med_moe(tmp_path: Path) -> None:
    assert prepare("med_moe", mini.med_moe(tmp_path / "m"), tmp_path / "out") == 0
    rows = lines(tmp_path / "out" / "manifest.jsonl")
    assert [row["id"] for row in rows] == ["1", "1-2", "train_0001", "9"]
    assert [row["answer_type"] for row in rows] == ["CLOSED", "OPEN", "OPEN", "CLOSED"]
    assert [row["split"] for row in rows] == ["train", "train", "train", "test"]
    assert [row["modality"] for row in rows] == ["", "", "Pathology", "Pathology"]
    assert rows[1]["conversations"] == mini.talk("How many?\n<image>", "2")
    assert rows[2]["conversations"] == mini.talk("<image>\nWhat is it?", "a cell")
    handled = json.loads((tmp_path / "out" / "summary.json").read_text())["handled"]
    assert handled["'conversatons' written as 'conversations'"] == 1
    assert handled["a turn: a number, written as text"] == 1
    assert handled["id: made unique"] == 1


def test_csv(tmp_path: Path) -> None:
    source = tmp_path / "s"
    table = (
        "\ufeffImage,Question,Answer,split,options,answer_type,modality,id,question_type,reader\n"
        'a.png,"Where, exactly?","left\nlung",train,,,ct,7,WHERE,me\n'
        "a.png;sub/b.png,Which differs?,second,val,,OPEN,,,,me\n"
        "\n"
        "sub/b.png,What is it?,Nevus,test,melanoma;nevus,,dermatoscopy,,,me\n"
        ",Is water wet?,yes,test,,,,,,me\n"
    )
    mini.put(source / "mine.csv", table.encode())
    mini.put(source / "pictures" / "a.png", mini.picture(1, "PNG"))
    mini.put(source / "pictures" / "sub" / "b.png", mini.picture(2))  # really a JPEG
    assert prepare("custom", source, tmp_path / "out", "--licence", "ours") == 0
    rows = lines(tmp_path / "out" / "manifest.jsonl")
    assert [row["id"] for row in rows] == ["7", "mine-1", "mine-2", "mine-3"]
    assert [row["split"] for row in rows] == ["train", "val", "test", "test"]
    assert rows[0]["conversations"] == mini.talk("<image>\nWhere, exactly?", "left lung")
    assert rows[0]["modality"] == "CT" and rows[2]["modality"] == "dermatoscopy"
    assert rows[1]["image"] == ["a.png", "sub/b.png.jpg"]
    assert rows[1]["conversations"][0]["value"] == "<image>\n<image>\nWhich differs?"
    assert rows[2]["conversations"] == mini.talk(
        "<image>\nWhat is it? Options: melanoma, nevus.", "nevus"
    )
    assert (rows[2]["options"], rows[2]["label"]) == (["melanoma", "nevus"], 1)
    assert rows[2]["answer_type"] == "CLOSED" and "answer_type" in rows[2]["rules"]
    assert rows[3]["image"] == "" and rows[3]["conversations"] == mini.talk("Is water wet?", "yes")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["remarks"] == ["columns that are not used: reader"]
    assert summary["handled"]["image: suffix of its format added"] == 2
    assert (tmp_path / "out" / "licence.txt").read_text().startswith("ours\n")
    read = read_samples([tmp_path / "out" / "manifest.jsonl"], tmp_path / "out" / "images")
    assert [sample.images for sample in read.samples][1] == ("a.png", "sub/b.png.jpg")
    asked = questions.read_questions(tmp_path / "out" / "test.jsonl")
    assert asked[0].options == ("melanoma", "nevus")


@pytest.mark.parametrize("name", ["val_mine.json", "val_mine.jsonl"])
def test_json(tmp_path: Path, name: str) -> None:
    rows = [
        {"image": "a.png", "question": "How many?", "answer": 3},
        {"image": ["a.png"], "question": "Is it?", "answer": "No.", "options": ["yes", "no."]},
    ]
    text = json.dumps(rows) if name.endswith("json") else "\n".join(map(json.dumps, rows))
    mini.put(tmp_path / "s" / name, text.encode())
    mini.put(tmp_path / "i" / "a.png", mini.picture(1, "PNG"))
    source = tmp_path / "s" / name
    assert prepare("custom", source, tmp_path / "out", "--images", str(tmp_path / "i")) == 0
    out = lines(tmp_path / "out" / "val.jsonl")
    assert [row["conversations"][1]["value"] for row in out] == ["3", "no."]
    assert [row["rules"].get("split") for row in out] == ["the file's name"] * 2


def test_errors_name_line_and_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = (
        "image,question,answer,split,answer_type,options\n"
        "a.png,Q,,train,,\n"
        "a.png,,A,train,,\n"
        "a.png,Q,A,trian,,\n"
        "a.png,Q,A,train,opne,\n"
        "a.png,Q,A,train,,x;y\n"
        "a.png,Q,A\n"
        "../a.png,Q,A,train,,\n"
        "b.png,Q,A,train,,\n"
        'a.png,"Q\ntwo lines",A,train,,\n'
        "a.png,Q,NaN stays,nowhere,,\n"
    )
    mini.put(tmp_path / "s" / "mine.csv", table.encode())
    mini.put(tmp_path / "s" / "a.png", mini.picture(1, "PNG"))
    assert prepare("custom", tmp_path / "s", tmp_path / "out") == 1
    reasons = [problem["reason"] for problem in lines(tmp_path / "out" / "problems.jsonl")]
    for reason, start in zip(
        reasons,
        (
            "line 2, column 'answer': ",
            "line 3, column 'question': ",
            "line 4, column 'split': 'trian'",
            "line 5, column 'answer_type': 'opne'",
            "line 6, column 'options': ",
            "line 7 has 3 cells, the header has 6",
            "line 8, column 'image': ",
            "line 9, column 'image': ",
            "line 12, column 'split': ",
        ),
        strict=True,
    ):
        assert reason.startswith(start), (reason, start)
    assert "mine.csv row 0" in capsys.readouterr().err


def test_empty_columns_of_a_spreadsheet(tmp_path: Path) -> None:
    """Have no name and are no columns; text in one of them is told."""
    table = "image,question,answer,,\n,Q1,yes,,\n,Q2,no,,lost\n"
    mini.put(tmp_path / "mine.csv", table.encode())
    out = tmp_path / "out"
    assert prepare("custom", tmp_path / "mine.csv", out, "--on-error", "skip") == 0
    assert [row["id"] for row in lines(out / "manifest.jsonl")] == ["mine-0"]
    assert json.loads((out / "summary.json").read_text())["remarks"] == []
    problem = lines(out / "problems.jsonl")[0]["reason"]
    assert problem == "line 3 has text in a column without a name"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"image,question\na.png,Q\n", "no column answer"),
        (b"image,question,answer,answer\n", "there twice"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b'image,question,answer\na.png,"Q,A\n', "cannot be read"),
    ],
)
def test_tables_that_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, said: str
) -> None:
    mini.put(tmp_path / "s" / "mine.csv", content)
    assert prepare("custom", tmp_path / "s", tmp_path / "out") == 1
    assert said in capsys.readouterr().err
