"""PathVQA: pickles that are read and pickles that are refused, and the mirror."""

from __future__ import annotations

import collections
import os
import pickle
from pathlib import Path

import miniature_sources as mini
import pytest
from miniature_sources import lines, prepare

from medmoe_jax.data.prepare import pickles
from medmoe_jax.data.problems import DataError


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_original(tmp_path: Path, protocol: int) -> None:
    source = mini.path_vqa(tmp_path / "pvqa", protocol)
    assert prepare("path_vqa", source, tmp_path / "out", "--allow-counts") == 0
    rows = lines(tmp_path / "out" / "manifest.jsonl")
    assert [(row["id"], row["split"]) for row in rows] == [
        ("100000", "train"), ("100001", "train"), ("100002", "train"),
        ("200000", "val"), ("300000", "test"),
    ]  # fmt: skip
    assert [row["answer_type"] for row in rows] == ["OPEN", "CLOSED", "OPEN", "OPEN", "CLOSED"]
    assert rows[2]["conversations"] == mini.talk("<image>\nHow many nodules?", "2")
    assert rows[3]["conversations"][1]["value"] == "vessel gastric"
    assert rows[4]["conversations"][0]["value"] == "<image>\nIs it na\u00efve?"
    assert {row["modality"] for row in rows} == {"Pathology"}
    assert [set(row["rules"]) for row in rows] == [{"modality"}] * 5
    assert rows[0]["question_type"] == "where" and rows[0]["licence"] == "MIT"
    assert rows[1]["image"] == "train/train_0000.jpg"
    assert (tmp_path / "out" / "images" / "val" / "val_0000.jpg").read_bytes() == mini.picture(2)


def test_pickles_without_types(tmp_path: Path) -> None:
    source = mini.path_vqa(tmp_path / "pvqa")
    for file in (source / "qas").glob("*_vqa.pkl"):
        file.unlink()
    assert prepare("path_vqa", source, tmp_path / "out", "--allow-counts") == 0
    rows = lines(tmp_path / "out" / "manifest.jsonl")
    assert [row["answer_type"] for row in rows] == ["OPEN", "CLOSED", "OPEN", "OPEN", "CLOSED"]
    assert all("answer_type" in row["rules"] for row in rows)
    assert rows[0]["id"] == "train-0"


class Malicious:
    """Runs a command when it is unpickled by the standard library."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
def test_malicious_pickles_are_refused_and_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], protocol: int
) -> None:
    source, mark = mini.path_vqa(tmp_path / "pvqa"), tmp_path / "mark"
    bad = pickle.dumps([{"img_id": "train_0000", "sent": Malicious(mark)}], protocol)
    mini.put(source / "qas" / "train_vqa.pkl", bad)
    assert prepare("path_vqa", source, tmp_path / "out", "--allow-counts") == 1
    assert "Nothing of the file was run" in capsys.readouterr().err
    assert not mark.exists()


@pytest.mark.parametrize("protocol", range(6))
def test_plain_data_comes_back(tmp_path: Path, protocol: int) -> None:
    shared = ["twice", {"a": (1, 2, 3, 4)}]
    content = [
        shared, shared, None, True, False, -1, 300, 70000, 2**70, 1.5,
        b"bytes" if protocol > 2 else 0,
        (), (1,), (1, 2), {}, {"k": [1, {2: ["x"]}]}, "\u00e9\u4e2d", {1, 2} if protocol > 3 else 0,
    ]  # fmt: skip
    file = mini.put(tmp_path / "x.pkl", pickle.dumps(content, protocol))
    back = pickles.read(file)
    assert back == content and back[0] is back[1]


def test_pickles_of_python_2(tmp_path: Path) -> None:
    """Its texts are bytes: UTF-8, or Latin-1 where they are not."""
    utf8, latin = "na\u00efve".encode(), "na\u00efve".encode("latin-1")
    body = b"\x80\x02]q\x00(" + b"".join(b"U" + bytes([len(t)]) + t for t in (utf8, latin)) + b"e."
    assert pickles.read(mini.put(tmp_path / "x.pkl", body)) == ["na\u00efve", "na\u00efve"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no pickle",
        pickle.dumps([1, 2, 3])[:-3],
        pickle.dumps(collections.OrderedDict(a=1)),
        b"\x80\x02K\x01K\x02a.",  # append to a number
        b"\x80\x02e.",  # no mark
        b"\x80\x02h\x05.",  # nothing remembered
    ],
)
def test_damaged_or_foreign_pickles(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataError, match=r"x\.pkl"):
        pickles.read(mini.put(tmp_path / "x.pkl", content))


def test_mirror(tmp_path: Path) -> None:
    row = {"image": mini.embedded(1), "question": "is it benign?", "answer": "no"}
    for split in ("train", "validation", "test"):
        file = tmp_path / "s" / "data" / f"{split}-00000-of-00002-0a1b.parquet"
        mini.save_parquet(file, [row, row | {"answer": "a cell"}])
    mini.save_parquet(tmp_path / "s" / "data" / "train-00001-of-00002-0a1c.parquet", [row])
    assert prepare("path_vqa", tmp_path / "s", tmp_path / "out", "--allow-counts") == 0
    rows = lines(tmp_path / "out" / "manifest.jsonl")
    assert [row["id"] for row in rows] == (
        ["train-0", "train-1", "train-2", "val-0", "val-1", "test-0", "test-1"]
    )
    assert [row["answer_type"] for row in rows[:2]] == ["CLOSED", "OPEN"]
    assert {row["modality"] for row in rows} == {"Pathology"}
    assert len({row["image"] for row in rows}) == 1


def test_odd_rows_are_bad_rows(tmp_path: Path) -> None:
    source = mini.path_vqa(tmp_path / "pvqa")
    good = mini.pvqa_row(1, "train_0000", "What?", "a cell", "other")
    rows = [
        good,
        good | {"label": {}},
        good | {"label": {"a": 1, "b": "2"}},
        good | {"img_id": "x" * 5000},
        good | {"img_id": "a\0b"},
        good | {"img_id": "../../train_0000"},
        good | {"sent": None},
        good | {"question_id": 2, "label": {"a": 0.3, "b": 1}, "img_id": "train_0001"},
    ]
    mini.put(source / "qas" / "train_vqa.pkl", pickle.dumps(rows))
    options = ("--splits", "train", "--on-error", "skip", "--allow-counts")
    assert prepare("path_vqa", source, tmp_path / "out", *options) == 0
    out = lines(tmp_path / "out" / "train.jsonl")
    assert [row["conversations"][1]["value"] for row in out] == ["a cell", "b"]
    assert [p["row"] for p in lines(tmp_path / "out" / "problems.jsonl")] == [1, 2, 3, 4, 5, 6]
