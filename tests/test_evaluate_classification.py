"""Classification: options scored by likelihood, and classes named in free text."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import pytest

from medmoe_jax.data.problems import DataError
from medmoe_jax.evaluation import classification, text
from medmoe_jax.evaluation.bootstrap import Bootstrap
from medmoe_jax.evaluation.classification import UNPARSED, named_option
from medmoe_jax.evaluation.report import report
from medmoe_jax.metrics import MissingExtra

Json = dict[str, Any]


def row(key: int, options: list[str] | None, label: int | None, task: str = "t") -> Json:
    turns = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "x"}]
    found: Json = {"id": key, "image": f"{key}.png", "answer_type": "CLOSED", "task": task}
    return found | {"conversations": turns, "options": options, "label": label}


def said(key: int, answer: str, options: dict[str, float] | None = None) -> Json:
    metadata = {} if options is None else {"options": options}
    return {"question_id": key, "text": answer, "metadata": metadata}


@pytest.mark.parametrize(
    ("answer", "options", "want"),
    [
        ("It is the Lungs.", ["lungs", "liver"], 0),
        ("liver or lungs", ["lungs", "liver"], UNPARSED),
        ("delivery", ["lungs", "liver"], UNPARSED),
        ("", ["lungs", "liver"], UNPARSED),
        ("the left lung", ["lung", "left lung"], 1),
        ("left lung and lung", ["lung", "left lung"], UNPARSED),
        ("lung", ["lung", "left lung"], 0),
        ("left-lung", ["lung", "left lung"], 1),
        ("A", ["A", "B"], 0),
        ("The answer is B", ["A", "B"], 1),
        ("B: a lung", ["A", "B"], UNPARSED),  # an article looks like the option A
        ("two", ["1", "2"], 1),
        ("Naevus pigment\u00e9", ["naevus pigment\u00e9", "m\u00e9lanome"], 0),
        (" + ", ["+", "-"], 0),
        ("it is +", ["+", "-"], UNPARSED),  # an option without words occurs nowhere
    ],
)
def test_named_option(answer: str, options: list[str], want: int) -> None:
    assert named_option(answer, options) == want


def scored(
    truth: np.ndarray, scores: np.ndarray, names: list[str]
) -> tuple[list[Json], list[Json]]:
    rows = [row(i, names, int(label)) for i, label in enumerate(truth)]
    answers = [
        said(i, names[int(np.argmax(p))], dict(zip(names, map(float, p), strict=True)))
        for i, p in enumerate(scores)
    ]
    return rows, answers


@pytest.mark.parametrize("classes", [2, 4])
def test_accuracy_and_auc_are_those_of_sklearn(classes: int) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(classes)
    truth = rng.integers(0, classes, 80)
    scores = rng.dirichlet(np.ones(classes), 80).round(2) + 0.2 * np.eye(classes)[truth]
    scores = scores / scores.sum(1, keepdims=True)
    names = [f"class{i}" for i in range(classes)]
    found = report(*scored(truth, scores, names), metric="official", samples=200)
    mine = found["classification"]["t"]["likelihood"]
    assert mine["accuracy_percent"] == pytest.approx(
        100 * sklearn.accuracy_score(truth, scores.argmax(1))
    )
    if classes == 2:
        want = sklearn.roc_auc_score(truth, scores[:, 1])
    else:
        want = sklearn.roc_auc_score(truth, scores, multi_class="ovr", average="macro")
    assert mine["auc"] == pytest.approx(want, abs=1e-12) and mine["auc_absent"] == ""
    low, high = mine["auc_ci95"]
    assert low < mine["auc"] < high and 0.02 < high - low < 0.3
    counts = {name: int((truth == i).sum()) for i, name in enumerate(names)}
    assert {name: cell["n"] for name, cell in mine["per_class"].items()} == counts
    first = scores[truth == 0].argmax(1) == 0
    assert mine["per_class"]["class0"]["accuracy_percent"] == pytest.approx(100 * first.mean())


def test_auc_of_weighted_rows_is_that_of_sklearn() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    truth, score = rng.random(50) < 0.4, rng.random(50).round(1)  # many ties
    weights = rng.integers(0, 4, (20, 50)).astype(float)
    found = classification.weighted_auc(truth, score)(weights)
    want = [sklearn.roc_auc_score(truth, score, sample_weight=w) for w in weights]
    assert found[:, 0] == pytest.approx(want, abs=1e-12)
    assert np.isnan(classification.weighted_auc(truth, score)(weights * truth)).all()


def test_free_text() -> None:
    names = ["healthy", "lesion"]
    rows = [row(i, names, label) for i, label in enumerate([0, 0, 1, 1])]
    answers = ["Healthy.", "lesion", "healthy or lesion", "I see a lesion"]
    found = report(rows, [said(i, a) for i, a in enumerate(answers)], samples=50)
    task = found["classification"]["t"]
    assert task["likelihood"] is None and task["classes"] == names
    mine = task["text"]
    assert (mine["n"], mine["accuracy_percent"], mine["unparsable_percent"]) == (4, 50, 25)
    assert mine["parsed_accuracy_percent"] == pytest.approx(200 / 3)
    assert mine["per_class"]["lesion"] == {"n": 2, "accuracy_percent": 50}
    line = next(x for x in text.markdown(found).split("\n") if x.startswith("| free text"))
    assert [cell.strip() for cell in line.split("|")[2:6:3]] == ["4", "25.0"]


def test_rows_without_options_or_scores() -> None:
    names = ["a1", "b1"]
    rows = [row(0, names, 0), row(1, names, 1), row(2, None, 1), row(3, names, None)]
    answers = [said(0, "a1", {"a1": 0.9, "b1": 0.1, "c1": 0.0}), said(1, "?"), said(2, "a1")]
    found = report(rows, [*answers, said(3, "a1", {"a1": 1.0})], samples=10)
    task = found["classification"]["t"]
    assert task["n"] == 2 and task["text"]["parsed_accuracy_percent"] == 100
    assert (task["likelihood"]["n"], task["likelihood"]["auc"]) == (1, None)
    assert task["likelihood"]["auc_absent"] == "all rows are of one class"
    assert task["likelihood"]["per_class"]["b1"] == {"n": 0, "accuracy_percent": None}
    assert "No AUC: all rows are of one class." in text.markdown(found)
    json.dumps(found, allow_nan=False)
    assert report(rows[2:3], answers[2:], samples=0)["classification"] == {}


def test_classes_that_differ_or_are_absent() -> None:
    pytest.importorskip("sklearn")
    # Order does not matter: class names do.
    rows = [row(0, ["x1", "y1"], 0), row(1, ["y1", "x1"], 0)]
    sure = {"x1": 0.8, "y1": 0.2}
    answers = [said(0, "x1", sure), said(1, "y1", {"x1": 0.3, "y1": 0.7})]
    mine = report(rows, answers, samples=20)["classification"]["t"]["likelihood"]
    assert (mine["auc"], mine["accuracy_percent"]) == (1.0, 100)
    rows[1] = row(1, ["y1", "z1"], 0)
    answers[1] = said(1, "y1", {"y1": 0.7, "z1": 0.3})
    task = report(rows, answers, samples=20)["classification"]["t"]
    assert task["classes"] == ["x1", "y1", "z1"] and task["likelihood"]["auc"] is None
    assert "different options" in task["likelihood"]["auc_absent"]
    three = ["x1", "y1", "z1"]
    rows = [row(i, three, i) for i in range(2)]
    answers = [said(i, "", {"x1": 0.6 - i / 2, "y1": 0.3 + i / 2, "z1": 0.1}) for i in range(2)]
    found = report(rows, answers, samples=20)
    mine = found["classification"]["t"]["likelihood"]
    assert mine["auc"] == 1.0 and "['z1']" in mine["auc_absent"]
    assert found["classification"]["t"]["text"]["parsed_accuracy_percent"] is None


def test_tasks_are_apart_and_controls_know_them() -> None:
    names = ["x1", "y1"]
    rows = [row(i, names, i % 2, task="" if i < 2 else "organ") for i in range(6)]
    answers = [said(i, names[i % 2]) for i in range(6)]
    blank = [said(i, "x1") for i in range(6)]
    found = report(rows, answers, metric="strict", control_predictions={"blank": blank})
    assert {name: task["n"] for name, task in found["classification"].items()} == {
        "classification": 2,
        "organ": 4,
    }
    cell = found["controls"]["blank"]["figures"]["organ accuracy, text"]
    assert (cell["n"], cell["shown_percent"], cell["control_percent"]) == (4, 100, 50)


def test_bad_labels_name_the_row() -> None:
    with pytest.raises(DataError, match=r"row 0: 'label' must be 0 to 1, not '1'"):
        report([row(0, ["a", "b"], "1")], [said(0, "a")])  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match=r"the answer to 0: no probability of the options \['b'\]"):
        report([row(0, ["a", "b"], 1)], [said(0, "a", {"a": 1.0, "B": 0.0})])


def test_without_sklearn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    rows, answers = scored(np.array([0, 1]), np.eye(2), ["x", "y"])
    with pytest.raises(MissingExtra, match=r"scikit-learn.*medmoe_jax\[eval\]"):
        report(rows, answers, metric="official", samples=0)
    # Where no option is scored there is no AUC, and no need.
    free = [said(i, "x") for i in range(2)]
    task = report(rows, free, metric="official", samples=0)["classification"]["t"]
    assert task["text"]["accuracy_percent"] == 50


def test_no_rows_no_tasks() -> None:
    assert classification.report([], Bootstrap.draw([], 5, 0)) == {}
    assert classification.columns([]) == {}
