"""Official figures equal the goldens to the last digit; strict ones mean what they say."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from medmoe_jax.data.prepare import medmnist
from medmoe_jax.data.sources import ANSWER_TYPES, CLOSED, OPEN
from medmoe_jax.metrics import (
    Answer,
    MissingExtra,
    bleu,
    normalize_word,
    official,
    options,
    strict,
    values,
    wrong_answers,
)


@pytest.fixture(scope="module")
def golden(fixtures: Path) -> tuple[list[Answer], dict[str, Any], list[dict[str, str]]]:
    """Answers, and the official figures and wrong answers for them."""
    folder = fixtures / "metrics"
    truth = json.loads((folder / "gt.json").read_text())
    predictions = [json.loads(line) for line in (folder / "pred.jsonl").read_text().splitlines()]
    answers = []
    for row, prediction in zip(truth, predictions, strict=True):
        turns = row.get("conversations") or row["conversatons"]
        reference, kind = turns[1]["value"], row["answer_type"]
        answers.append(Answer(reference, prediction["text"], kind, prediction["prompt"]))
    expected = json.loads((folder / "expected.json").read_text())
    return answers, expected, json.loads((folder / "wrong_answers.json").read_text())


def test_official_goldens(golden: tuple[list[Answer], dict[str, Any], list[Any]]) -> None:
    answers, expected, wrong = golden
    report = official(answers)
    assert report["aggregate_percent"] == pytest.approx(expected["aggregate_percent"], abs=1e-9)
    assert (report["n_open"], report["n_closed"], report["n_ignored"]) == (46, 54, 0)
    assert len(report["per_sample"]) == len(expected["per_sample"])
    for row, want in zip(report["per_sample"], expected["per_sample"], strict=True):
        want = {k: v for k, v in want.items() if k != "id"}
        assert row.get("bleu") == pytest.approx(want.pop("bleu", None), abs=1e-9)
        assert {k: v for k, v in row.items() if k != "bleu"} == pytest.approx(want, abs=1e-9)
    assert wrong_answers(answers) == wrong


def test_official_pools_only_its_own_answer_types() -> None:
    kinds = ["open", "OPEN", "close", "CLOSED", "closed", "Open", "yes/no", "other"]
    report = official([("no", "normal", kind) for kind in kinds])
    assert (report["n_open"], report["n_closed"], report["n_ignored"]) == (2, 2, 4)
    assert report["per_sample"][4:] == [{}] * 4
    assert report["aggregate_percent"]["yes/no accuracy"] == 100
    assert official([])["aggregate_percent"]["Recall"] is None
    assert official([("a", "b", "open")])["aggregate_percent"]["yes/no accuracy"] is None


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The x-ray", "x ray"),  # no space beside any hyphen: a space
        ("x-ray, or x- ray", "xray or x ray"),  # one beside a space: all hyphens vanish
        ("1,200 mm (axial/left)", "1200 mm axialleft"),  # a comma in a number: all marks vanish
        ("blood/fluid?", "blood fluid"),
        ("3.5 cm. 12. e.g.", "3.5 cm 12 eg"),
        ("none of two an Ten", "0 of 2 10"),
        ("dont cant its ow's'at", "don't can't its 'ow's'at"),
        ("somebody'd somebodyd've", "somebodyd somebody'd've"),
        (" ".join(["w."] * 34), " ".join(["w"] * 32 + ["w."] * 2)),  # 32 full stops at most
        ("#: it\u2019s 'so'", "#: it\u2019s 'so'"),
        ("", ""),
        ("a the ?", ""),
    ],
)
def test_normalize_word(text: str, normal: str) -> None:
    assert normalize_word(text) == normal


@pytest.mark.parametrize(
    ("reference", "prediction", "f1", "precision", "recall", "exact"),
    [
        # A repeated right word is found each time: recall 4/5 where sets would say 1/2.
        ("left lung", "left left left left", 8 / 9, 1.0, 4 / 5, 1 / 4),
        ("left left lung", "left", 2 / 3, 1.0, 1 / 2, 1.0),
        ("lung", "the lung of a man", 1 / 2, 1 / 3, 1.0, 1 / 3),
        ("a", "a", 0, 0, 0, 0),
        ("", "lung", 0, 0, 0, 0),
        ("lung", "", 0, 0, 0, 0),
    ],
)
def test_official_counts(
    reference: str, prediction: str, f1: float, precision: float, recall: float, exact: float
) -> None:
    row = official([(reference, prediction, "open")])["per_sample"][0]
    assert row["f1"] == pytest.approx(f1)
    assert row["precision"] == pytest.approx(precision)
    assert row["recall"] == pytest.approx(recall)
    assert row["exact_match"] == pytest.approx(exact)


@pytest.mark.parametrize(
    ("reference", "prediction", "right"),
    [("no", "normal", True), ("Right", "upRIGHT", True), ("yes", "no", False), ("", "x", True)],
)
def test_official_closed_is_a_substring(reference: str, prediction: str, right: bool) -> None:
    assert official([(reference, prediction, "CLOSED")])["per_sample"][0]["closed_correct"] is right


@pytest.mark.parametrize(
    ("reference", "prediction", "want"),
    [
        # Of 5 words 2 match, of 4 pairs 1, of 3 triples none (method 1 counts 0.1).
        ("left lung", "in the left lung .", [2 / 5, 1 / 4, 0.1 / 3]),
        # A short prediction pays exp(1 - 4/2); its missing triples count as 0.1 of 1.
        ("a b c d", "a b", [math.exp(-1), math.exp(-1), 0.1 * math.exp(-1)]),
        ("left", "left left left", [1 / 3, 0.1 / 2, 0.1 / 1]),  # clipped to one
        ("lung", "liver", [0, 0, 0]),
        ("", "lung", [0, 0, 0]),
        ("lung", "", [0, 0, 0]),
        ("", "", [0, 0, 0]),
    ],
)
def test_bleu_by_hand(reference: str, prediction: str, want: list[float]) -> None:
    assert bleu(reference.split(), prediction.split()) == pytest.approx(want, abs=1e-12)


def test_bleu_without_nltk_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nltk.translate", None)
    with pytest.raises(MissingExtra, match=r"nltk.*medmoe_jax\[eval\]"):
        official([("lung", "lung", "open")])
    # Neither needs it.
    assert official([("no", "no", "CLOSED")])["aggregate_percent"]["yes/no accuracy"] == 100
    assert wrong_answers([("lung", "liver", "open"), ("No", "Yes", "close")]) == [
        {"prompt": "", "correct_answer": "no", "predicted_answer": "yes"}
    ]


def test_answer_types_are_those_of_the_data() -> None:
    for kind, group in ANSWER_TYPES.items():
        report = strict([("yes", "yes", kind)])
        assert (report["n_open"], report["n_closed"]) == (group == OPEN, group == CLOSED), kind


def test_values_are_what_the_figures_are_means_of() -> None:
    rows = [("left lung", "left", "open"), ("no", "now", "close"), ("x", "x", "?")]
    for variant, score in (("official", official), ("strict", strict)):
        report = score(rows)
        columns = values(variant, report["per_sample"])
        assert columns.keys() == report["aggregate_percent"].keys()
        for name, column in columns.items():
            found = [value for value in column if value is not None]
            assert column[2] is None and len(found) == 1
            assert report["aggregate_percent"][name] == 100 * found[0]


@pytest.mark.parametrize(
    ("reference", "prediction", "question", "right"),
    [
        ("No", "No, it is not enlarged.", "", True),
        ("no", "The heart is normal.", "", False),  # the official figure says right
        ("yes", "Yes", "", True),
        ("yes", "yes and no", "", False),
        ("yes", "eyes", "", False),
        ("no", "", "", False),
        ("Left", "on the left side", "Is it on the left or right side?", True),
        ("Left", "left or right", "Is it on the left or right side?", False),
        ("right", "upright", "Is it left or right?", False),
        ("right side", "the right side", "Is it the left or the right side?", True),
        ("MRI", "CT, not MRI", "Choose from the following options: [CT, MRI, X-ray]", False),
        ("X-ray", "an x-ray", "Choose from the following options: [CT, MRI, X-ray]", True),
        ("lung", "left lung", "[lung, left lung]", False),
        ("left lung", "left lung", "[lung, left lung]", True),
        ("two", "There are 2.", "", True),
        ("left lung", "lung, left", "", False),
        ("", "anything", "", False),
    ],
)
def test_strict_closed(reference: str, prediction: str, question: str, right: bool) -> None:
    row = strict([Answer(reference, prediction, "Closed ", question)])["per_sample"][0]
    assert row["closed_correct"] is right


@pytest.mark.parametrize(
    ("reference", "prediction", "recall", "precision", "f1", "exact"),
    [
        ("left lung", "left left left left", 1 / 2, 1.0, 1 / 3, False),
        ("the Left lung.", "left lung", 1.0, 1.0, 1.0, True),
        ("lung left", "left lung", 1.0, 1.0, 1.0, False),
        ("3.5 cm", "3.5cm", 1.0, 1.0, 1.0, True),
        ("1,200 mm", "1200 mm", 1.0, 1.0, 1.0, True),
        ("3.5", "3 or 5", 0.0, 0.0, 0.0, False),
        ("lung", "", 0.0, 0.0, 0.0, False),
        ("", "lung", 0.0, 0.0, 0.0, False),
        ("", "the", 1.0, 1.0, 1.0, True),
    ],
)
def test_strict_open(
    reference: str, prediction: str, recall: float, precision: float, f1: float, exact: bool
) -> None:
    row = strict([(reference, prediction, "other")])["per_sample"][0]
    assert row["recall"] == pytest.approx(recall)
    assert row["precision"] == pytest.approx(precision)
    assert row["f1"] == pytest.approx(f1)
    assert row["exact_match"] is exact


def test_strict_report() -> None:
    rows = [("yes", "yes", "CLOSED"), ("no", "nothing", "yes/no"), ("ct", "ct", " OPEN")]
    report = strict([*rows, ("x", "x", "appearance")])
    assert (report["n_open"], report["n_closed"], report["n_ignored"]) == (1, 2, 1)
    assert report["aggregate_percent"]["Closed Accuracy"] == 50
    assert report["aggregate_percent"]["Open Exact Match"] == 100
    assert report["per_sample"][3] == {}
    assert strict([])["aggregate_percent"]["Open Recall"] is None


def test_strict_closed_is_never_above_official(
    golden: tuple[list[Answer], dict[str, Any], list[Any]],
) -> None:
    answers = golden[0]
    pairs = zip(strict(answers)["per_sample"], official(answers)["per_sample"], strict=True)
    for mine, theirs in pairs:
        assert mine.get("closed_correct", False) <= theirs.get("closed_correct", True)


def test_naming_two_classes_is_no_answer() -> None:
    question = medmnist.prompt(medmnist.SETS["pneumoniamnist"])
    answers = [
        Answer("normal", said, "CLOSED", question) for said in ("Normal.", "normal or pneumonia")
    ]
    assert [row["closed_correct"] for row in strict(answers)["per_sample"]] == [True, False]


def test_a_letter_that_is_an_article() -> None:
    for said, percent in (("A", 100), ("A.", 100), ("B", 0), ("", 0), ("A or B", 0)):
        found = strict([("A", said, "CLOSED", "Which one? Options: A, B.")])
        assert found["aggregate_percent"]["Closed Accuracy"] == percent, said
    assert strict([("the left", "left", "CLOSED")])["aggregate_percent"]["Closed Accuracy"] == 100


def test_options() -> None:
    assert options("Is it CT or an MRI?") == [["ct"], ["mri"]]
    assert options("[a] Which one? [Left lung, none]") == [["left", "lung"], ["0"]]
    assert options("Which? Options: liver, left kidney.") == [["liver"], ["left", "kidney"]]
    sizes = options("Which? Options: 1.5 cm, 2 cm. Choose.")
    assert sizes == [["1.5", "cm"], ["2", "cm"]]
    assert options("Choose from the following two options: [Yes, No]") == [["yes"], ["no"]]
    named = options("What?\nChoose one of these options: left, or right (lung); heart.")
    assert named == [["left", "or", "right", "lung"], ["heart"]]
    assert options("Or is it?") == []
    asked = "Is it in the left lung or the right lung?"
    assert options(asked) == [["left"], ["right"]]
    assert options("Left upper lobe or left lower lobe?") == [["left", "upper"], ["left", "lower"]]
    assert options("CT or MRI or CT angiography?") == [["ct"], ["mri"], ["mri"], ["ct"]]
    assert options("Lung or lung?") == [["lung"], ["lung"]]
    for said, percent in (("left lung", 100), ("right lung", 0), ("left and right lung", 0)):
        found = strict([("left", said, "CLOSED", asked)])["aggregate_percent"]
        assert found["Closed Accuracy"] == percent, said
