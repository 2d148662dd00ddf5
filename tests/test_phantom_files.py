"""Files of the phantom studies: formats, balance against blind guessing, command line."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medmoe_jax.config import MODALITIES
from medmoe_jax.data import phantom
from medmoe_jax.data.phantom.__main__ import main
from medmoe_jax.data.phantom.balance import blind_scores
from medmoe_jax.data.phantom.render import random_state
from medmoe_jax.data.phantom.sheet import contact_sheet

TRAIN, TEST, SIZE = 240, 120, 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set."""
    out = tmp_path_factory.mktemp("phantom")
    phantom.write(out, seed=3, train=TRAIN, test=TEST, size=SIZE)
    return out


def _read(folder: Path, name: str) -> list[dict]:
    return json.loads((folder / f"{name}.json").read_text())


def _stage3_questions(rows: list[dict]) -> list[phantom.Question]:
    return [
        phantom.Question(
            row["conversations"][0]["value"].removeprefix("<image>\n"),
            row["conversations"][1]["value"],
            row["question_type"],
            row["answer_type"].lower() != "open",
        )
        for row in rows
    ]


def test_images_are_grey_or_colour_and_some_are_not_square(folder: Path):
    shapes = []
    for line in (folder / "studies.jsonl").read_text().splitlines():
        row = json.loads(line)
        with Image.open(folder / "images" / row["image"]) as image:
            assert image.mode == ("RGB" if row["modality"] == "Pathology" else "L"), row
            assert max(image.size) == SIZE
            shapes.append(image.size)
            assert np.asarray(image).std() > 15, row["image"]
    assert len(shapes) == TRAIN + TEST
    assert 0.1 < np.mean([width != height for width, height in shapes]) < 0.6


def test_alignment_rows_have_the_misspelt_key(folder: Path):
    rows = _read(folder, "alignment")
    assert len(rows) == TRAIN
    for row in rows:
        assert set(row) == {"id", "image", "conversatons"}
        human, gpt = row["conversatons"]
        assert human["from"] == "human" and human["value"].endswith("\n<image>")
        assert gpt["from"] == "gpt" and gpt["value"].endswith(".")
    assert len({row["conversatons"][0]["value"] for row in rows}) >= 5


@pytest.mark.parametrize(("name", "number"), [("instruct", TRAIN), ("instruct_heldout", TEST)])
def test_instruct_rows(folder: Path, name: str, number: int):
    rows = _read(folder, name)
    assert len(rows) == number
    flags, lengths, first = Counter(), Counter(), Counter()
    for row in rows:
        assert set(row) == {"id", "image", "domain", "conversations"}
        assert set(row["domain"]) == {"chest_xray", "mri", "histology", "gross", "ct_scan"}
        flags[tuple(k for k, v in row["domain"].items() if v)] += 1
        turns = row["conversations"]
        assert [t["from"] for t in turns] == ["human", "gpt"] * (len(turns) // 2)
        lengths[len(turns) // 2] += 1
        asked = [t["value"] for t in turns[::2]]
        assert "".join(asked).count("<image>") == 1 and "<image>" in asked[0]
        assert len({q.replace("<image>", "").strip() for q in asked}) == len(asked)
        assert all(t["value"] for t in turns)
        first[asked[0].startswith("<image>\n")] += 1
    domains = ("ct_scan", "mri", "chest_xray", "histology")
    assert flags == {(domain,): number // 4 for domain in domains}
    assert min(lengths) >= 3 and max(lengths) <= 6 and len(lengths) == 4
    assert min(first.values()) > 0.35 * number


def test_stage3_rows(folder: Path):
    rows = _read(folder, "train_all")
    assert len({row["id"] for row in rows}) == len(rows)
    assert {row["answer_type"] for row in rows} == {"open", "close", "OPEN", "CLOSED"}
    assert {row["modality"] for row in rows} == set(MODALITIES)
    modality = {
        row["image"]: row["modality"]
        for row in map(json.loads, (folder / "studies.jsonl").read_text().splitlines())
    }
    for row in rows:
        assert row["modality"] == modality[row["image"]]
        human, gpt = row["conversations"]
        assert human["value"].startswith("<image>\n") and gpt["value"]
    assert abs(len(rows) - 4 * TRAIN) < 0.15 * 4 * TRAIN


def test_training_and_heldout_images_are_disjoint(folder: Path):
    train = {r["image"] for n in ("alignment", "instruct", "train_all") for r in _read(folder, n)}
    held = {r["image"] for n in ("instruct_heldout", "test") for r in _read(folder, n)}
    assert not train & held
    content = defaultdict(set)
    for path in (folder / "images").iterdir():
        content[path.read_bytes()].add(path.name)
    assert all(len(names) == 1 for names in content.values())


def test_classification_rows_name_their_label(folder: Path):
    for name in ("classify_train", "classify_test"):
        conditions = Counter()
        for row in _read(folder, name):
            human, gpt = row["conversations"]
            assert gpt["value"] == row["options"][row["label"]]
            assert human["value"].endswith(f"Options: {', '.join(row['options'])}.")
            if row["task"] == "condition":
                conditions[gpt["value"]] += 1
        assert len(set(conditions.values())) == 1 and len(conditions) == 2


def test_every_text_has_equally_many_of_each_answer(folder: Path):
    for name in ("train_all", "test"):
        counts: dict[str, Counter] = defaultdict(Counter)
        for question in _stage3_questions(_read(folder, name)):
            counts[question.text][question.answer] += 1
        for text, by_answer in counts.items():
            assert len(by_answer) > 1 and len(set(by_answer.values())) == 1, (text, by_answer)


def test_a_blind_model_stays_near_chance(folder: Path):
    train = _stage3_questions(_read(folder, "train_all"))
    test = _stage3_questions(_read(folder, "test"))
    closed, recall = blind_scores(train, test)
    assert 0.4 <= closed <= 0.58
    assert recall <= 0.45
    assert 0.4 < np.mean([question.closed for question in test]) < 0.6
    # It must not help to know the modality either, where the question leaves it open.
    lesion_kinds = ("PRES", "POS", "COUNT", "SIZE")
    by_modality = {}
    for part, rows in (("train", "train_all"), ("test", "test")):
        by_modality[part] = [
            phantom.Question(f"{row['modality']} {q.text}", q.answer, q.kind, q.closed)
            for row, q in zip(
                _read(folder, rows), _stage3_questions(_read(folder, rows)), strict=True
            )
            if q.kind in lesion_kinds
        ]
    closed, _ = blind_scores(by_modality["train"], by_modality["test"])
    assert closed <= 0.6


def test_blind_scores_sees_a_bias():
    asked = [phantom.Question("q?", "yes", "PRES", True)] * 3
    asked += [phantom.Question("q?", "no", "PRES", True)]
    where = [phantom.Question("where?", "upper left", "POS", False)]
    where += [phantom.Question("where?", "upper right", "POS", False)]
    closed, recall = blind_scores(asked + where, asked + where)
    assert closed == 0.75 and recall == 0.75


def test_files_do_not_depend_on_the_number_of_processes(tmp_path: Path):
    for workers in (1, 2):
        phantom.write(tmp_path / str(workers), train=48, test=8, size=56, workers=workers)
    files = sorted(p.relative_to(tmp_path / "1") for p in (tmp_path / "1").rglob("*.*"))
    assert len(files) == 56 + 11
    for file in files:
        assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "2" / file).read_bytes(), file


def test_texts_hold_every_word_of_the_files(folder: Path):
    known = {word for text in phantom.texts(0, 300) for word in re.findall(r"[\w-]+", text)}
    for name in ("alignment", "instruct", "train_all", "test", "classify_test"):
        for row in _read(folder, name):
            for turn in row.get("conversations") or row["conversatons"]:
                words = re.findall(r"[\w-]+", turn["value"].replace("<image>", ""))
                assert set(words) <= known, turn


def test_readme_and_licence_say_synthetic(folder: Path):
    readme = (folder / "README.md").read_text()
    assert "Synthetic" in readme and f"| `alignment.json` | {TRAIN} |" in readme
    assert "synthetic" in (folder / "licence.txt").read_text()


def test_rows_about_other_images_do_not_stay(tmp_path: Path):
    """Where a folder is written again with another seed, or less of it."""
    phantom.write(tmp_path, seed=1, train=8, test=8, size=56, signs=True)
    counts = phantom.write(tmp_path, seed=2, train=8, test=8, size=56)
    assert not list(tmp_path.glob("signs_*")) and not list(tmp_path.glob("classify_more_*"))
    assert {file.name for file in tmp_path.glob("*.json")} - {"summary.json"} == {
        name for name in counts if name.endswith(".json")
    }


def test_wrong_requests_say_what_is_wrong(tmp_path: Path):
    with pytest.raises(ValueError, match="split 'valid' is unknown; use one of train, test"):
        random_state(0, "valid", 0)
    with pytest.raises(ValueError, match="must not be negative"):
        random_state(0, "train", -1)
    with pytest.raises(ValueError, match="use at least 8 images a part"):
        phantom.write(tmp_path, train=4)
    assert not list(tmp_path.iterdir())


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out, sheet = tmp_path / "data", tmp_path / "sheet.png"
    sizes = ["--train", "16", "--test", "8", "--size", "56", "--workers", "1"]
    assert main(["--out", str(out), "--sheet", str(sheet), *sizes]) == 0
    assert "24  images" in capsys.readouterr().out
    assert (out / "test.json").is_file() and sheet.is_file()
    with pytest.raises(SystemExit):
        main([])
    assert "nothing to do" in capsys.readouterr().err


def test_contact_sheet_shows_every_modality():
    sheet = np.asarray(contact_sheet(0, columns=2, rows=1, size=96))
    assert sheet.shape[2] == 3
    bands = np.array_split(sheet.astype(int), 4)
    colour = [np.abs(band[:, :, 0] - band[:, :, 1]).mean() for band in bands]
    assert max(colour[:3]) == 0 and colour[3] > 2
