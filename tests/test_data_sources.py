"""JSON rows as LLaVA-Med and Med-MoE write them, and everything that can be wrong with a row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_data
from tiny_data import row

from medmoe_jax.config import MODALITIES
from medmoe_jax.data.problems import DataError, Problem, settle, write_problems
from medmoe_jax.data.sources import (
    UNKNOWN,
    Sample,
    choose_per_modality,
    read_rows,
    read_samples,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(3):
        tiny_data.save_image(tmp_path / "images" / f"i{number}.png", number)
    return tmp_path


def read_one(folder: Path, record: object) -> Sample:
    """The row as read; raises DataError with its one problem."""
    file = tiny_data.save_rows(folder / "one.json", [record])
    return read_samples([file], folder / "images").samples[0]


def test_stage3_row(folder: Path) -> None:
    extra = {"answer_type": "CLOSED", "modality": "MRI", "question_type": "PRES", "split": "x"}
    sample = read_one(folder, row(1, **extra))
    assert sample == Sample(
        id="r1",
        images=("i1.png",),
        turns=(("human", "<image>\nIs there a lesion?"), ("gpt", "yes")),
        answer_type="closed",
        modality=MODALITIES.index("MRI"),
        question_type="PRES",
        file=str(folder / "one.json"),
        row=0,
    )


def test_json_jsonl_and_misspelt_key_give_the_same(folder: Path) -> None:
    rows = [row(0, "Größe\u2028 3 µm"), row(1, 3), row(2, 2.5)]
    rows[1]["conversatons"] = rows[1].pop("conversations")
    first = tiny_data.save_rows(folder / "a.json", rows)
    second = tiny_data.save_rows(folder / "a.jsonl", rows)
    third = folder / "bom.json"
    third.write_text("\ufeff" + first.read_text(encoding="utf-8"), encoding="utf-8")
    loaded = read_samples([first, second, third], folder / "images")
    answers = ["Größe\u2028 3 µm", "3", "2.5"]
    assert [sample.turns[1][1] for sample in loaded.samples] == answers * 3
    assert [sample.row for sample in loaded.samples] == [0, 1, 2] * 3
    assert loaded.samples[4].file == str(second)
    assert (loaded.problems, loaded.notes, loaded.total) == ([], {}, 9)


@pytest.mark.parametrize(
    ("value", "known"),
    [
        ("open", "open"),
        ("OPEN ", "open"),
        ("other", "open"),
        ("number", "open"),
        ("close", "closed"),
        ("CLOSED", "closed"),
        ("yes/no", "closed"),
        (None, ""),
    ],
)
def test_answer_types(value: object, known: str, folder: Path) -> None:
    assert read_one(folder, row(0, answer_type=value)).answer_type == known


def test_unknown_words_are_counted(folder: Path) -> None:
    rows = [row(0, answer_type="essay"), row(1, answer_type="essay"), row(2, modality="PET")]
    loaded = read_rows([tiny_data.save_rows(folder / "a.json", rows)], folder / "images")
    assert loaded.notes == {"unknown answer_type 'essay'": 2, "unknown modality 'PET'": 1}
    assert [sample.answer_type for sample in loaded.samples] == ["", "", ""]
    assert loaded.samples[2].modality == UNKNOWN


@pytest.mark.parametrize(
    ("extra", "name"),
    [
        ({"modality": "CT"}, "CT"),
        ({"modality": "X-Ray"}, "X-ray"),
        ({"modality": "Pathology"}, "Pathology"),
        ({"domain": {"chest_xray": True, "mri": False}}, "X-ray"),
        ({"domain": {"mri": True}}, "MRI"),
        ({"domain": {"histology": True, "gross": True}}, "Pathology"),
        ({"domain": {"ct_scan": True}}, "CT"),
        ({"domain": {"ct_scan": True, "mri": True}}, None),
        ({"domain": {"ct_scan": False}}, None),
        ({"domain": {"mri": True}, "modality": "CT"}, "CT"),
        ({}, None),
    ],
)
def test_modalities(extra: dict, name: str | None, folder: Path) -> None:
    expected = UNKNOWN if name is None else MODALITIES.index(name)
    assert read_one(folder, row(0, **extra)).modality == expected


def test_images_none_one_or_several(folder: Path) -> None:
    several = row(0)
    several["image"] = ["i0.png", "i2.png"]
    several["conversations"][0]["value"] = "<image>\nand <image>: which?"
    assert read_one(folder, several).images == ("i0.png", "i2.png")
    for absent in (None, "", []):
        text = row(0)
        text["image"] = absent
        text["conversations"][0]["value"] = "What is asthma?"
        assert read_one(folder, text).images == ()
    del text["image"]
    assert read_one(folder, text).images == ()


def test_missing_image_token_is_added_before_the_question(folder: Path) -> None:
    record = row(0)
    record["conversations"][0]["value"] = "Is there a lesion?"
    file = tiny_data.save_rows(folder / "a.json", [record])
    loaded = read_rows([file], folder / "images")
    assert loaded.samples[0].turns[0] == ("human", "<image>\nIs there a lesion?")
    assert loaded.notes == {"<image> added before the first question": 1}


def test_leading_gpt_turn_and_several_rounds(folder: Path) -> None:
    record = row(0)
    record["conversations"].insert(0, {"from": "gpt", "value": "Hello"})
    record["conversations"] += [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "so"}]
    turns = read_one(folder, record).turns
    assert [role for role, _ in turns] == ["human", "gpt"] * 2
    assert turns[3][1] == "so"


def test_id_falls_back(folder: Path) -> None:
    record = row(0)
    del record["id"]
    assert read_one(folder, record).id == "one.json:0"
    assert read_one(folder, record | {"qid": 0}).id == "0"
    assert read_one(folder, record | {"question_id": 12}).id == "12"


def talk(*turns: object) -> dict:
    names = ("human", "gpt")
    spoken = [{"from": names[i % 2], "value": value} for i, value in enumerate(turns)]
    return {"id": "bad", "image": "i0.png", "conversations": spoken}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (talk("<image>\nQ", "  "), "empty answer 1"),
        (talk("<image>\nQ", "a", "Q2", ""), "empty answer 2"),
        (talk("<image>\nQ", "a", " ", "b"), "empty question 2"),
        (talk("", "a") | {"image": None}, "empty question 1"),
        (talk("<image>\nQ", None), "'value' must be text, not None"),
        (talk("<image>\nQ", True), "'value' must be text, not True"),
        (talk("<image>\nQ", float("nan")), "'value' must be text, not nan"),
        (talk("<image>\nQ"), "the last question has no answer"),
        (talk("<image>\nQ", "a", "Q"), "the last question has no answer"),
        (talk("<image><image>\nQ", "a"), "2 <image> in the text, but 1 image"),
        (talk("<image>\nQ", "a") | {"image": None}, "1 <image> in the text, but 0 image"),
        (talk("<image>\nQ", "a") | {"image": 7}, "'image' must be a path"),
        (talk("<image>\nQ", "a") | {"image": ["i0.png", None]}, "'image' must be a path"),
        (talk("<image>\nQ", "a") | {"image": "none.png"}, "'none.png' is not in"),
        (talk("<image>\nQ", "a") | {"image": "../a.json"}, "points out of the image folder"),
        ({"id": "bad", "conversations": []}, "no 'conversations' list"),
        ({"id": "bad", "conversations": [{"from": "user", "value": "Q"}]}, "'human' or 'gpt'"),
        ({"id": "bad", "conversations": ["Q"]}, "'human' or 'gpt'"),
        (
            {"id": "bad", "conversations": [{"from": "human", "value": "Q"}] * 2},
            "human and gpt must take turns",
        ),
    ],
)
def test_bad_rows(record: dict, reason: str, folder: Path) -> None:
    file = tiny_data.save_rows(folder / "a.json", [row(0), record])
    loaded = read_samples([file], folder / "images", "skip")
    assert [sample.id for sample in loaded.samples] == ["r0"]
    (problem,) = loaded.problems
    assert (problem.file, problem.row, problem.id) == (str(file), 1, "bad")
    assert reason in problem.reason
    with pytest.raises(DataError, match=r"1 of 2 row\(s\)[^$]*a\.json row 1 \(id 'bad'\)"):
        read_samples([file], folder / "images")


def test_rows_that_are_no_objects(folder: Path) -> None:
    file = folder / "a.jsonl"
    file.write_text(json.dumps(row(0)) + "\n\n{oops\n[1]\n")
    loaded = read_samples([file], folder / "images", "skip")
    assert [problem.row for problem in loaded.problems] == [2, 3]
    assert "no JSON" in loaded.problems[0].reason
    assert "must be an object, not list" in loaded.problems[1].reason


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_half_a_character_is_told(name: str, folder: Path) -> None:
    """JSON can say the first half of an emoji alone; no tokenizer takes it."""
    rows = [row(0, "\U0001f600"), row(1, "\ud83d")]
    lines = [json.dumps(one) for one in rows]  # with escapes
    text = "\n".join(lines) if name == "a.jsonl" else f"[{','.join(lines)}]"
    (folder / name).write_text(text)
    loaded = read_rows([folder / name], folder / "images")
    assert [sample.turns[1][1] for sample in loaded.samples] == ["\U0001f600"]
    (problem,) = loaded.problems
    assert problem.row == 1 and "half a character (\\ud83d)" in problem.reason


def test_error_lists_the_first_rows_and_the_remedy(folder: Path) -> None:
    rows = [row(0)] + [row(1, "") for _ in range(30)]
    file = tiny_data.save_rows(folder / "a.json", rows)
    with pytest.raises(DataError) as caught:
        read_samples([file], folder / "images")
    lines = str(caught.value).splitlines()
    assert lines[0] == "30 of 31 row(s) cannot be used:"
    assert lines[20] == f"  {file} row 20 (id 'r1'): empty answer 1"
    assert lines[21] == "  ... and 10 more"
    assert lines[22].endswith("--config.data.on_error=skip")
    assert len(caught.value.problems) == 30


def test_skip_needs_a_row_that_is_left(folder: Path) -> None:
    file = tiny_data.save_rows(folder / "a.json", [row(0, "")])
    with pytest.raises(DataError, match="No row is left"):
        read_samples([file], folder / "images", "skip")


def test_bad_files_and_settings(folder: Path) -> None:
    with pytest.raises(DataError, match="no data files"):
        read_rows([], folder)
    with pytest.raises(DataError, match=r"none\.json cannot be read"):
        read_rows([folder / "none.json"], folder)
    deep = "[" * 100_000
    for content, text in (
        ("[{]", "is no JSON"),
        (deep, "is no JSON: maximum"),
        ("[1" + "0" * 5000 + "]", "is no JSON: Exceeds the limit"),
        ("[]", "no rows in"),
        ("", "no rows in"),
    ):
        (folder / "b.json").write_text(content)
        with pytest.raises(DataError, match=text):
            read_rows([folder / "b.json"], folder)
    with pytest.raises(DataError, match=r"data\.on_error is 'ignore'"):
        settle([], "ignore")


def test_problems_are_written_as_lines(tmp_path: Path) -> None:
    problems = [Problem("a.json", 3, "x", "leer"), Problem("a.json", 4, "ö", "zu groß")]
    write_problems(problems, tmp_path / "problems.jsonl")
    lines = (tmp_path / "problems.jsonl").read_text(encoding="utf-8").splitlines()
    assert [Problem(**json.loads(line)) for line in lines] == problems


def labelled(modality: int, number: int) -> Sample:
    return Sample(f"{modality}.{number}", (), (), "", modality, "", "a.json", number)


def test_choose_per_modality() -> None:
    samples = [labelled(number % 5 - 1, number) for number in range(50)]
    chosen = choose_per_modality(samples, 4, seed=3)
    assert [sample.modality for sample in chosen].count(2) == 4
    assert len({sample.id for sample in chosen}) == 16
    assert [sample.row for sample in chosen] == sorted(sample.row for sample in chosen)
    assert chosen == choose_per_modality(samples, 4, seed=3)
    assert chosen != choose_per_modality(samples, 4, seed=4)
    assert choose_per_modality(samples, 0, 0) == [s for s in samples if s.modality != UNKNOWN]


def test_too_few_labels_are_named() -> None:
    samples = [labelled(m, n) for m, count in ((0, 5), (1, 2), (3, 5)) for n in range(count)]
    with pytest.raises(DataError, match=r"\(MRI 2, X-ray 0; needed: 3 each\)"):
        choose_per_modality(samples, 3, 0)
    with pytest.raises(DataError, match="X-ray 0"):
        choose_per_modality(samples, 0, 0)
