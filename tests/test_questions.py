"""Question files: the formats, what is no question, chunks and exchanged images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_data

from medmoe_jax.data.problems import DataError
from medmoe_jax.data.questions import Question, chunk, exchanged, read_questions


def talk(text: Any) -> list[dict[str, Any]]:
    return [{"from": "human", "value": text}, {"from": "gpt", "value": "yes"}]


def test_formats(tmp_path: Path) -> None:
    """Both spellings of conversations, LLaVA's rows, JSON and JSONL; <image> is left out."""
    rows = [
        {"id": "a", "image": "x.png", "conversations": talk("<image>\nIs it?")},
        {"id": 5, "image": ["x.png", "y.png"], "conversatons": talk("Which?\n<image>\n<image>")},
        {"question_id": 9, "id": "other", "image": "", "text": " Why? "},
        {"question": "How?", "image": None, "options": ["a", "b"]},
        {"id": "g", "conversations": [{"from": "gpt", "value": "Hello"}, *talk("So?")]},
        {"question_id": None, "id": None, "text": "Yes?"},
    ]
    want = [
        Question(0, "a", ("x.png",), "Is it?", ()),
        Question(1, 5, ("x.png", "y.png"), "Which?", ()),
        Question(2, 9, (), "Why?", ()),
        Question(3, 3, (), "How?", ("a", "b")),
        Question(4, "g", (), "So?", ()),
        Question(5, 5, (), "Yes?", ()),
    ]
    for name in ("q.json", "q.jsonl"):
        assert read_questions(tiny_data.save_rows(tmp_path / name, rows)) == want


def test_rows_without_a_question(tmp_path: Path) -> None:
    """All of them are named, with the reason."""
    bad: list[Any] = [
        "text",
        {"id": "n1"},
        {"id": "n2", "conversations": []},
        {"id": "n3", "text": "<image>\n"},
        {"id": "n4", "text": "Why?", "image": 3},
        {"id": "n5", "text": "Why?", "options": "yes"},
        {"id": "n6", "text": "Why?", "options": ["yes", ""]},
        {"id": "n7", "conversations": [{"from": "gpt", "value": "x"}]},
    ]
    file = tiny_data.save_rows(tmp_path / "q.json", [{"text": "Why?"}, *bad])
    with pytest.raises(DataError) as caught:
        read_questions(file)
    text = str(caught.value)
    assert text.startswith("8 of 9 rows are no questions")
    for place, row in enumerate(bad, start=1):
        assert f"row {place} " in text
        assert not isinstance(row, dict) or row["id"] in text
    assert text.count("no question:") == 4 and text.count("`options`") == 2
    (tmp_path / "l.jsonl").write_text('{"text": "Why?"}\n{"text": \n')
    with pytest.raises(DataError, match=r"row 1 .*no JSON"):
        read_questions(tmp_path / "l.jsonl")
    (tmp_path / "e.json").write_text("[]")
    with pytest.raises(DataError, match="holds no question"):
        read_questions(tmp_path / "e.json")
    with pytest.raises(DataError, match="cannot be read"):
        read_questions(tmp_path / "absent.json")


@pytest.mark.parametrize(("n", "number"), [(10, 1), (10, 3), (10, 10), (3, 5), (7, 2)])
def test_chunks(n: int, number: int) -> None:
    parts = [chunk(range(n), number, i) for i in range(number)]
    assert [x for part in parts for x in part] == list(range(n))
    sizes = [len(part) for part in parts]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == -(-n // number)
    for index in (-1, number):
        with pytest.raises(DataError, match=f"chunk {index} of {number}"):
            chunk(range(n), number, index)


def test_exchanged_images() -> None:
    """Every image becomes another one, the same wherever it is shown; the seed decides which."""
    names = [("a",), ("b",), ("a", "c"), (), ("d",), ("e",)]
    rows = [Question(i, i, shown, "Why?", ("x",)) for i, shown in enumerate(names)]
    found = exchanged(rows, 0)
    other: dict[str, str] = {}
    for before, after in zip(rows, found, strict=True):
        assert replace(after, images=()) == replace(before, images=())
        assert len(after.images) == len(before.images)
        for a, b in zip(before.images, after.images, strict=True):
            assert a != b and other.setdefault(a, b) == b
    assert sorted(other.values()) == sorted(other) == list("abcde")
    assert exchanged(rows, 0) == found
    assert len({tuple(q.images for q in exchanged(rows, seed)) for seed in range(9)}) > 3
    with pytest.raises(DataError, match="two different images"):
        exchanged(rows[:1], 0)
