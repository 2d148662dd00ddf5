"""Reports of answer files: pairing, official figures, tables, controls, command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medmoe_jax import evaluate as command
from medmoe_jax.data import questions
from medmoe_jax.data.problems import DataError
from medmoe_jax.evaluation import bootstrap, controls, figures, rows, text
from medmoe_jax.evaluation.report import report
from medmoe_jax.metrics import MissingExtra

Json = dict[str, Any]


def question(
    key: Any, answer: str, kind: str = "CLOSED", text_: str = "Is it?", **more: Any
) -> Json:
    turns = [{"from": "human", "value": f"<image>\n{text_}"}, {"from": "gpt", "value": answer}]
    return {"id": key, "image": f"{key}.png", "answer_type": kind, "conversations": turns} | more


def said(key: Any, answer: str, **metadata: Any) -> Json:
    return {"question_id": key, "text": answer, "metadata": metadata}


def write(path: Path, lines: list[Json]) -> Path:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in lines))
    return path


@pytest.fixture
def golden(fixtures: Path) -> Path:
    return fixtures / "metrics"


def run(monkeypatch: pytest.MonkeyPatch, *args: object) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, args)])
    command.main()


def test_official_command_equals_the_script(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "new" / "metrics.json"
    files = ("--gt", golden / "gt.json", "--pred", golden / "pred.jsonl", "--out", out)
    run(monkeypatch, *files, "--metric", "official", "--pair", "order", "--bootstrap", 50)
    found, want = json.loads(out.read_text()), json.loads((golden / "expected.json").read_text())
    mine = found["official"]
    assert mine["aggregate_percent"] == pytest.approx(want["aggregate_percent"], abs=1e-9)
    assert len(mine["per_sample"]) == 100
    for row, theirs in zip(mine["per_sample"], want["per_sample"], strict=True):
        assert row.pop("bleu", []) == pytest.approx(theirs.pop("bleu", []), abs=1e-9)
        assert row == pytest.approx(theirs, abs=1e-9)
    wrong = json.loads((golden / "wrong_answers.json").read_text())
    assert mine["wrong_answers"] == wrong
    assert json.loads(out.with_suffix(".wrong.json").read_text()) == wrong
    assert found["summary"].keys() == {"closed accuracy", "open recall"} and "strict" not in found
    for name, value in mine["aggregate_percent"].items():
        low, high = mine["ci95_percent"][name]
        assert low <= value <= high and mine["n"][name] in (46, 54)
    # Two of its ids occur twice, which only pairing by order can stand.
    with pytest.raises(SystemExit, match=r"2 ids occur more than once.*--pair order"):
        run(monkeypatch, *files)


def test_pairing_by_id() -> None:
    asked = [question(i, "yes") for i in (1, "b", 3)]
    answers = [said("3", "no"), said("1", "yes"), said("b", "yes")]
    items = rows.pair(asked, answers)
    assert [(item.id, item.prediction) for item in items] == [(1, "yes"), ("b", "yes"), (3, "no")]
    with pytest.raises(DataError, match=r"1 ids without a prediction \['b'\], 0 predictions"):
        rows.pair(asked, answers[:2])
    with pytest.raises(DataError, match=r"1 predictions without a question \['x'\]"):
        rows.pair(asked, [*answers, said("x", "no")])
    with pytest.raises(DataError, match=r"P: 1 ids occur more than once: \['b'\]"):
        rows.pair(asked, [*answers, said("b", "no")], names=("G", "P"))
    with pytest.raises(DataError, match=r"G: 1 ids occur more than once: \['1'\]"):
        rows.pair([*asked, question("1", "no")], answers, names=("G", "P"))
    with pytest.raises(DataError, match="3 rows, P has 2: they cannot be paired by order"):
        rows.pair(asked, answers[:2], "order", names=("G", "P"))
    with pytest.raises(DataError, match="no rows"):
        rows.pair([], [])
    with pytest.raises(DataError, match="not by 'name'"):
        rows.pair(asked, answers, "name")


def test_ids_are_those_of_the_question_reader(tmp_path: Path) -> None:
    asked = [question("a", "yes"), question("b", "no") | {"question_id": 0}, question("c", "no")]
    asked += [question(None, "no"), question("e", "no") | {"question_id": None}]
    del asked[2]["id"]
    file = write(tmp_path / "q.jsonl", asked)
    answers = [said(q.id, str(q.row)) for q in reversed(questions.read_questions(file))]
    said_to = [item.prediction for item in rows.pair(rows.read(file), answers)]
    assert said_to == ["0", "1", "2", "3", "4"]


def test_pairing_by_order_looks_at_no_id() -> None:
    items = rows.pair([question(1, "a"), question(1, "b")], [said(9, "x"), said(9, "y")], "order")
    assert [(i.reference, i.prediction) for i in items] == [("a", "x"), ("b", "y")]


def test_what_is_read_of_a_row() -> None:
    row = question(7, "x", "OPEN", domain={"mri": True, "ct_scan": False}, content_type="Organ")
    row["conversatons"] = [{"from": "gpt", "value": "Hello"}, *row.pop("conversations")]
    row["image"] = ["a.png", "b.png"]
    item = rows.pair([row], [said(7, "y", confidence=1.0000001, images="blank")])[0]
    assert (item.question, item.prompt, item.reference) == ("Is it?", "Is it?", "x")
    assert (item.modality, item.question_type) == ("MRI", "Organ")
    assert (item.image, item.confidence, item.shown) == ("a.png + b.png", 1.0, "blank")
    # `predict` calls a row without an id by its number; a text-only row is a cluster by itself.
    bare = {"conversations": [{"value": "q"}, {"value": 3}], "modality": "Ultrasound"}
    item = rows.pair([bare], [said(0, "3")])[0]
    assert (item.reference, item.modality, item.cluster) == ("3", "Ultrasound", "row 0")


@pytest.mark.parametrize(
    ("row", "prediction", "message"),
    [
        ({"conversations": [{"value": "q"}]}, {}, r"G: row 1 has no question with an answer"),
        ({"conversations": "q"}, {}, "no question with an answer"),
        ({"conversations": [{"value": "q"}, {"value": None}]}, {}, "no question with an answer"),
        ({"conversations": [{"value": "q"}, {"value": float("nan")}]}, {}, "no question with"),
        ({}, {"text": None}, r"P: the answer to 1 has no 'text'"),
        ({}, {"metadata": [1]}, "'metadata' must be an object"),
        ({}, {"metadata": {"confidence": "high"}}, "number from 0 to 1, not 'high'"),
        ({}, {"metadata": {"confidence": float("nan")}}, "number from 0 to 1, not nan"),
        ({}, {"metadata": {"confidence": 1.5}}, "not 1.5"),
        ({}, {"metadata": {"options": ["yes"]}}, "must be an object of probabilities"),
        ({"options": ["a", "b"], "label": 2}, {}, "'label' must be 0 to 1, not 2"),
        ({"options": ["a", "a"], "label": 0}, {}, "different texts"),
        (
            {"options": ["a", "b"], "label": 0},
            {"metadata": {"options": {"a": 1}}},
            r"no probability of the options \['b'\]",
        ),
    ],
)
def test_bad_rows(row: Json, prediction: Json, message: str) -> None:
    with pytest.raises(DataError, match=message):
        rows.pair([question(1, "x") | row], [said(1, "x") | prediction], names=("G", "P"))


def test_read(tmp_path: Path) -> None:
    # U+2028 may stand in a JSON string and ends no line; a byte order mark is skipped.
    lines = [said(1, "a\u2028b \u00e9"), said(2, "")]
    file = write(tmp_path / "a.jsonl", lines)
    assert rows.read(file) == lines
    file.write_text("\ufeff" + json.dumps(lines, indent=2))
    assert rows.read(file) == lines
    file.write_text('{"a": 1}\n\n{"a": ')
    with pytest.raises(DataError, match=r"a\.jsonl row 2: the line is no JSON"):
        rows.read(file)
    file.write_text("[1]")
    with pytest.raises(DataError, match="row 0: must be an object, not int"):
        rows.read(file)
    with pytest.raises(DataError, match="cannot be read"):
        rows.read(tmp_path / "absent")


def test_bleu_in_the_strict_report() -> None:
    asked = [question(1, "left lung", "other"), question(2, "a b c d", "open"), question(3, "no")]
    answers = [said(1, "Left lung"), said(2, ""), said(3, "no")]
    found = report(asked, answers, metric="strict", samples=20)["strict"]
    assert [row.get("bleu") for row in found["per_sample"]] == pytest.approx([1, 0, None])
    assert found["aggregate_percent"]["Open BLEU (sentences)"] == pytest.approx(50)
    # 2 words where 6 are wanted, all right: exp(1 - 6/2).
    assert found["aggregate_percent"]["Open BLEU"] == pytest.approx(100 * np.exp(-2))
    low, high = found["ci95_percent"]["Open BLEU"]
    assert 0 <= low <= high <= 100 and found["n"]["Open BLEU"] == 2


def test_tables() -> None:
    asked = [
        question(1, "yes", "close", modality="CT scan", question_type="PRES"),
        question(2, "no", "CLOSED", modality="CT", image="1.png"),
        question(3, "lung", " Open", modality="Ultrasound"),
        question(4, "no", "yes/no"),
        question(5, "red", "appearance"),
    ]
    answers = [said(1, "yes"), said(2, "yes"), said(3, "the lung"), said(4, "no"), said(5, "red")]
    found = report(asked, answers, samples=30)
    tables = found["tables"]
    assert list(tables) == ["answer_type", "modality", "question_type"]
    assert list(tables["answer_type"]) == ["appearance", "closed", "open", "yes/no"]
    assert list(tables["modality"]) == ["CT", "Ultrasound", "(unknown)"]
    ct = tables["modality"]["CT"]
    assert (ct["n"], ct["images"]) == (2, 1)
    assert ct["figures"]["closed accuracy"] == {"percent": 50, "n": 2, "ci95": None}
    assert "open recall" not in ct["figures"]
    assert tables["answer_type"]["appearance"] == {"n": 1, "images": 1, "figures": {}}
    assert tables["answer_type"]["yes/no"]["figures"].keys() == {"closed accuracy, strict"}
    assert tables["question_type"]["PRES"]["figures"]["closed accuracy"]["percent"] == 100
    # " Open" is no official type, "appearance" is none at all.
    assert (found["official"]["n_ignored"], found["strict"]["n_ignored"]) == (3, 1)
    assert found["summary"]["open recall"] is None and found["summary_ci95"]["open recall"] is None
    assert "| (unknown) " in text.markdown(found)


@pytest.mark.parametrize("kind", ["CLOSED", "open", "unheard of", ""])
def test_one_kind_of_rows(kind: str) -> None:
    found = report([question(1, "no", kind)], [said(1, "")], samples=10)
    assert found["strict"]["aggregate_percent"]["Closed Accuracy"] == {"CLOSED": 0}.get(kind)
    assert found["official"]["aggregate_percent"]["Recall"] == {"open": 0}.get(kind)
    assert "modality" not in found["tables"] and found["confidence"] is None
    assert ("answer_type" in found["tables"]) == bool(kind)
    assert len(found["wrong"]) == (kind in ("CLOSED", "open"))
    assert text.markdown(found).startswith("# Evaluation\n\n1 questions about 1 images")
    json.dumps(found, allow_nan=False)


def test_wrong_answers_tell_the_row() -> None:
    asked = [
        question("\u00e9", "No", modality="MRI"),
        question(2, "left lung", "open"),
        question(3, "no"),
    ]
    answers = [said("\u00e9", "normal", confidence=0.5), said(2, "lung"), said(3, "no")]
    answers[0]["prompt"] = "Was?"
    assert report(asked, answers, samples=0)["wrong"] == [
        {
            "id": "\u00e9",
            "image": "\u00e9.png",
            "prompt": "Was?",
            "correct_answer": "No",
            "predicted_answer": "normal",
            "answer_type": "CLOSED",
            "modality": "MRI",
            "confidence": 0.5,
        },
        {
            "id": 2,
            "image": "2.png",
            "prompt": "Is it?",
            "correct_answer": "left lung",
            "predicted_answer": "lung",
            "answer_type": "open",
            "recall": 0.5,
            "precision": 1.0,
            "f1": pytest.approx(2 / 3),
        },
    ]


def test_controls() -> None:
    asked = [question(i, "yes" if i % 2 else "no") for i in range(40)]
    answers = [said(i, "yes" if i % 2 else "no", images="shown") for i in range(40)]
    blank = [said(i, "yes", images="blank") for i in reversed(range(40))]
    found = report(asked, answers, control_predictions={"blank": blank})
    control = found["controls"]["blank"]
    assert control["same_answer_percent"] == 50
    cell = control["figures"]["closed accuracy, strict"]
    assert (cell["shown_percent"], cell["control_percent"], cell["difference"]) == (100, 50, 50)
    # Paired: the difference of a draw is the share of "no" questions in it.
    want = 1.96 * 100 * np.sqrt(0.25 / 40)
    assert cell["ci95"] == pytest.approx([50 - want, 50 + want], abs=3)
    assert "The image is worth 50.0 points" in text.markdown(found)
    assert "open recall" not in control["figures"]
    same = report(asked, answers, control_predictions={"noise": [said(i, "no") for i in range(40)]})
    assert same["controls"]["noise"]["same_answer_percent"] == 50
    with pytest.raises(DataError, match=r"images \['blank'\]: run predict with --images noise"):
        report(asked, answers, control_predictions={"noise": blank})
    with pytest.raises(DataError, match="'black' is none of"):
        report(asked, answers, control_predictions={"black": blank})
    with pytest.raises(DataError, match=r"the control blank and .* 1 ids without a prediction"):
        report(asked, answers, control_predictions={"blank": blank[1:]})


def test_a_control_without_effect() -> None:
    asked = [question(i, "yes") for i in range(30)]
    answers = [said(i, "yes" if i % 3 else "no") for i in range(30)]
    others = [said(i, "yes" if (i + 1) % 3 else "no") for i in range(30)]
    found = report(asked, answers, control_predictions={"shuffled": others}, metric="official")
    low, high = found["controls"]["shuffled"]["figures"]["closed accuracy"]["ci95"]
    assert low < 0 < high
    assert "No effect of the image can be told from chance" in text.markdown(found)
    items = rows.pair(asked, answers)
    boot = bootstrap.Bootstrap.draw([item.cluster for item in items], 10, 0)
    columns = figures.summary({"strict": figures.columns("strict", figures.score(items, "strict"))})
    itself = controls.compare(items, items, columns, columns, boot)
    assert itself["figures"]["closed accuracy, strict"]["ci95"] == [0, 0]


def test_errors_are_shown_and_count_as_wrong() -> None:
    asked = [question(1, "yes"), question(2, "yes")]
    found = report(asked, [said(1, "yes"), said(2, "", error="no such file")], samples=0)
    assert found["errors"] == {"2": "no such file"} and found["summary"]["closed accuracy"] == 50
    shown = text.markdown(found)
    assert "1 questions have no answer because of an error** and count as wrong: 2\n" in shown


def test_a_row_of_a_table_is_one_line() -> None:
    """Also where a question type, say, has a line feed in it."""
    shown = text.table(("type", "n"), [("a | b\nc", "1")])
    assert shown.splitlines()[2] == "| a \\| b c |   1 |"


def test_settings_are_checked() -> None:
    one = ([question(1, "yes")], [said(1, "yes")])
    with pytest.raises(DataError, match="official, strict, both, not 'exact'"):
        report(*one, metric="exact")
    with pytest.raises(DataError, match="0 to 1, not 80"):
        report(*one, abstain_below=80)


def test_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.bleu", None)
    with pytest.raises(MissingExtra, match=r"sacrebleu.*medmoe_jax\[eval\]"):
        report([question(1, "lung", "open")], [said(1, "lung")], metric="strict")


def test_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [question(i, ["no", "left lung"][i % 2], ["CLOSED", "open"][i % 2]) for i in range(8)]
    gt = write(tmp_path / "gt.jsonl", asked)
    pred = write(tmp_path / "p.jsonl", [said(i, "no", confidence=0.1 + i / 10) for i in range(8)])
    noise = write(tmp_path / "n.jsonl", [said(i, "yes", images="noise") for i in range(8)])
    out, wrong = tmp_path / "o" / "m.json", tmp_path / "w" / "wrong.json"
    more = ("--wrong", wrong, "--control", f"noise={noise}", "--abstain-below", 0.4)
    calibrate = ("--calibrate-on", gt, pred, "--bootstrap", 25)
    run(monkeypatch, "--gt", gt, "--pred", pred, "--out", out, *more, *calibrate)
    shown = capsys.readouterr().out
    found = json.loads(out.read_text())
    assert out.with_suffix(".md").read_text().strip() in shown and f"Written: {out}" in shown
    assert found["summary"]["closed accuracy"] == 100 and found["summary"]["open recall"] == 0
    assert "wrong" not in found and len(json.loads(wrong.read_text())) == 4
    assert found["controls"]["noise"]["figures"]["closed accuracy"]["difference"] == 100
    assert found["confidence"]["all"]["abstain"]["n_answered"] == 5
    assert found["confidence"]["shared_images"] == 8 and "8 images are in both sets" in shown
    for flag in (("--control", "dark=x"), ("--control", "blank"), ("--abstain-below", "2")):
        with pytest.raises(SystemExit, match="error: "):
            run(monkeypatch, "--gt", gt, "--pred", pred, *flag)
    with pytest.raises(SystemExit, match=r"error: .*cannot be read"):
        run(monkeypatch, "--gt", gt, "--pred", tmp_path / "absent")


def test_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    pytest.importorskip("matplotlib")
    from PIL import Image

    gt = write(tmp_path / "gt.jsonl", [question(i, "no") for i in range(6)])
    sure = [said(i, "no" if i else "yes", confidence=i / 5) for i in range(6)]
    level = [said(i, "no", confidence=0.5) for i in range(6)]
    unsure = [said(i, "no", confidence=None) for i in range(6)]
    for name, answers in (("sure", sure), ("level", level)):
        pred = write(tmp_path / "p.jsonl", answers)
        folder = tmp_path / name
        run(monkeypatch, "--gt", gt, "--pred", pred, "--plots", folder, "--abstain-below", 0.3)
        for file in ("reliability.png", "risk_coverage.png"):
            picture = Image.open(folder / file)
            assert min(picture.size) > 600 and len(picture.convert("RGB").getcolors(1 << 20)) > 20
    pred = write(tmp_path / "p.jsonl", unsure)
    run(monkeypatch, "--gt", gt, "--pred", pred, "--plots", tmp_path / "none")
    assert "No pictures" in capsys.readouterr().out and not (tmp_path / "none").exists()


def test_a_pipe_that_closes_loses_no_file(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with `| head`: the report is written before it is shown."""

    def closed(*_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", closed)
    files = ("--gt", golden / "gt.json", "--pred", golden / "pred.jsonl")
    with pytest.raises(SystemExit):
        run(monkeypatch, *files, "--pair", "order", "--bootstrap", 0, "--out", tmp_path / "m.json")
    assert json.loads((tmp_path / "m.json").read_text())["n"]
    assert (tmp_path / "m.md").read_text().startswith("# Evaluation")


def test_what_is_read_is_not_written_over(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gt, pred = tmp_path / "gt.json", tmp_path / "pred.jsonl"
    gt.write_bytes((golden / "gt.json").read_bytes())
    pred.write_bytes((golden / "pred.jsonl").read_bytes())
    out = tmp_path / "m.json"
    for more in (("--out", gt), ("--out", out, "--wrong", tmp_path / "x" / ".." / "pred.jsonl")):
        with pytest.raises(SystemExit, match="would be written over"):
            run(monkeypatch, "--gt", gt, "--pred", pred, "--pair", "order", *more)
    with pytest.raises(SystemExit, match="would be written over"):
        run(monkeypatch, "--gt", gt, "--pred", pred, "--out", out, "--wrong", out)
    assert gt.read_bytes() == (golden / "gt.json").read_bytes() and not out.exists()
