"""MedMNIST: every set, size and defect, as questions that predict and evaluate read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from miniature_medmnist import ROWS, medmnist
from PIL import Image

from medmoe_jax.data.prepare import medmnist as module
from medmoe_jax.data.prepare.__main__ import main
from medmoe_jax.data.questions import read_questions
from medmoe_jax.data.sources import read_samples
from medmoe_jax.evaluation.rows import pair, read


def prepare(source: Path, out: Path, *more: str) -> int:
    return main(["medmnist", "--source", str(source), "--out", str(out), *more])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    "flag, size, modality, licence, first, last, number",
    [
        ("pneumoniamnist", 28, "X-ray", "CC-BY-4.0", "normal", "pneumonia", 2),
        ("organcmnist", 64, "CT", "CC-BY-4.0", "bladder", "spleen", 11),
        (
            "dermamnist",
            128,
            "",
            "CC-BY-NC-4.0",
            "actinic keratoses and intraepithelial carcinoma",
            "vascular lesions",
            7,
        ),
        ("bloodmnist", 224, "", "CC-BY-4.0", "basophil", "platelet", 8),
    ],
)
def test_every_set(
    tmp_path: Path,
    flag: str,
    size: int,
    modality: str,
    licence: str,
    first: str,
    last: str,
    number: int,
) -> None:
    file = medmnist(tmp_path / "source", flag, size, number)
    assert prepare(file.parent, tmp_path / "out", "--allow-counts") == 0
    rows = lines(tmp_path / "out" / "manifest.jsonl")
    assert [row["split"] for row in rows] == [s for s, n in ROWS.items() for _ in range(n)]
    with np.load(file) as arrays:
        images = np.concatenate([arrays[f"{split}_images"] for split in ROWS])
        labels = np.concatenate([arrays[f"{split}_labels"] for split in ROWS])[:, 0]
    for row, pixels, label in zip(rows, images, labels, strict=True):
        with Image.open(tmp_path / "out" / "images" / row["image"]) as image:
            assert np.array_equal(np.asarray(image), pixels)
        assert row["label"] == label and row["options"][label] == row["conversations"][1]["value"]
        assert (row["options"][0], row["options"][-1], len(row["options"])) == (first, last, number)
        assert row["conversations"][0]["value"].startswith("<image>\n")
        assert f"options: {first}; " in row["conversations"][0]["value"]
        assert (row["modality"], row["licence"], row["answer_type"]) == (
            modality,
            licence,
            "CLOSED",
        )
        assert row["task"] == row["source"] == flag
        assert set(row["rules"]) == {"modality", "answer_type", "conversations"}
    assert rows[0]["id"] == f"{flag}_train_0" and rows[5]["image"] == f"{flag}_{size}/val/00000.png"
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    different = {d["rows"]: d["published"] for d in summary["published"]["differences"]}
    assert tuple(different.values()) == module.SETS[flag].counts
    assert licence in (tmp_path / "out" / "licence.txt").read_text()


def test_predict_and_evaluate_read_it(tmp_path: Path) -> None:
    file = medmnist(tmp_path / "source", "organcmnist", classes=11)
    prepare(file, tmp_path / "out", "--allow-counts")
    test, images = tmp_path / "out" / "test.jsonl", tmp_path / "out" / "images"
    samples = read_samples([tmp_path / "out" / "train.jsonl"], images)
    assert [sample.modality for sample in samples.samples] == [0] * 5 and not samples.notes
    options = module.SETS["organcmnist"].classes
    answers = tmp_path / "answers.jsonl"
    answers.write_text(
        "".join(
            json.dumps({"question_id": row["id"], "text": "The right femur? femur-right."}) + "\n"
            for row in lines(test)
        )
    )
    items = pair(read(test), read(answers))
    assert [(item.task, item.options, item.label) for item in items] == [
        ("organcmnist", options, label) for label in (0, 1, 2)
    ]
    assert all(q.options == options for q in read_questions(test))


def test_published_numbers(tmp_path: Path) -> None:
    """The paper's 17K and 36.7K are sums of these."""
    train = {flag: chosen.counts[0] for flag, chosen in module.SETS.items()}
    assert train["pneumoniamnist"] + train["organcmnist"] == 17_683
    assert sum(train.values()) == 36_649
    assert prepare(medmnist(tmp_path, "dermamnist"), tmp_path / "out") == 1


def test_one_of_several_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flag, size in (("pneumoniamnist", 28), ("pneumoniamnist", 64), ("dermamnist", 64)):
        medmnist(tmp_path / "source", flag, size)
    medmnist(tmp_path / "source", "pathmnist")
    source, more = tmp_path / "source", ("--allow-counts", "--set", "pneumoniamnist")
    assert prepare(source, tmp_path / "a", "--allow-counts") == 1
    assert "choose by --set and --size" in capsys.readouterr().err
    assert prepare(source, tmp_path / "b", *more, "--size", "64") == 0
    assert "pneumoniamnist at 64 pixels" in capsys.readouterr().out
    assert prepare(source, tmp_path / "c", *more, "--size", "224") == 1
    assert "looked for one npz file that fits" in capsys.readouterr().err
    own = medmnist(tmp_path / "own", "pneumoniamnist").rename(tmp_path / "own" / "mine.npz")
    assert prepare(own, tmp_path / "d", *more) == 0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"val_labels": None}, "has no array 'val_labels'"),
        ({"train_labels": np.zeros((4, 1), np.uint8)}, r"must be uint8 [4, 'S', 'S']"),
        ({"train_labels": np.zeros((5, 2), np.uint8)}, "must be integers [N, 1], not uint8 [5, 2]"),
        ({"train_labels": np.zeros((5, 1))}, "must be integers [N, 1], not float64"),
        ({"train_labels": np.array([[object()]] * 5)}, "allow_pickle=False"),
        ({"test_images": np.zeros((3, 28, 28), np.float32)}, "not float32 [3, 28, 28]"),
        ({"test_images": np.zeros((3, 28, 28, 3), np.uint8)}, "not uint8 [3, 28, 28, 3]"),
        ({"test_images": np.zeros((3, 30, 30), np.uint8)}, "S one of 28, 64, 128, 224"),
        ({"test_images": np.zeros((3, 64, 64), np.uint8)}, "images of 64 pixels, but its name"),
        ({"test_labels": np.array([[0], [2], [255]], np.uint8)}, "label 255 is none of 0 to 1"),
    ],
)
def test_defects(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], message: str
) -> None:
    file = medmnist(tmp_path, "pneumoniamnist", **change)
    assert prepare(file, tmp_path / "out", "--allow-counts") == 1
    assert message in capsys.readouterr().err


def test_shapes_that_say_the_same(tmp_path: Path) -> None:
    """Labels [N], grey images [N, S, S, 1]."""
    first = medmnist(tmp_path / "a", "pneumoniamnist")
    with np.load(first) as arrays:
        change = {
            "val_images": arrays["val_images"][..., None],
            "test_labels": arrays["test_labels"][:, 0].astype(np.int64),
        }
    second = medmnist(tmp_path / "b", "pneumoniamnist", **change)
    for name, file in (("a", first), ("b", second)):
        assert prepare(file, tmp_path / "out" / name, "--allow-counts") == 0
    manifests = [(tmp_path / "out" / n / "manifest.jsonl").read_text() for n in "ab"]
    assert manifests[0] == manifests[1]
    images = [sorted((tmp_path / "out" / n / "images").rglob("*.png")) for n in "ab"]
    assert [f.read_bytes() for f in images[0]] == [f.read_bytes() for f in images[1]]


def test_a_file_cut_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = medmnist(tmp_path, "pneumoniamnist")
    file.write_bytes(file.read_bytes()[:-2000])
    assert prepare(file, tmp_path / "out", "--allow-counts") == 1
    assert "cannot be read" in capsys.readouterr().err


def test_wrong_labels_are_left_out_when_asked(tmp_path: Path) -> None:
    labels = np.array([[0], [2], [1], [0], [9]], np.int64)
    file = medmnist(tmp_path, "pneumoniamnist", train_labels=labels)
    assert prepare(file, tmp_path / "out", "--allow-counts", "--on-error", "skip") == 0
    kept = [row["id"][-1] for row in lines(tmp_path / "out" / "train.jsonl")]
    assert kept == ["0", "2", "3"]
    problems = lines(tmp_path / "out" / "problems.jsonl")
    assert [problem["row"] for problem in problems] == [1, 4]
