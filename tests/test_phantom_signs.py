"""Questions that take a rule of the modality: neither sign nor modality alone says anything."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np

from medmoe_jax.config import MODALITIES
from medmoe_jax.data import phantom
from medmoe_jax.data.phantom import signs


def test_rules_are_latin_squares():
    for rule in (signs.DIAGNOSIS, signs.STEP):
        table = [[rule.answer(modality, sign) for sign in range(4)] for modality in MODALITIES]
        for line in (*table, *zip(*table, strict=True)):
            assert sorted(line) == sorted(rule.answers)


def test_questions_follow_from_the_facts():
    for _, facts in phantom.generate(0, 60, size=32):
        asked = {q.text: q.answer for q in signs.questions(facts)}
        assert bool(asked) == bool(facts.lesions)
        if not asked:
            continue
        sign = 2 * (facts.size == "large") + (len(facts.lesions) > 1)
        right = signs.DIAGNOSIS.answer(facts.modality, sign)
        assert asked["What is the diagnosis?"] == right
        assert asked[f"Is the diagnosis {right}?"] == "yes"
        assert sum(asked[f"Is the diagnosis {name}?"] == "yes" for name in signs.DIAGNOSES) == 1
        assert ("What is the next step?" in asked) == (len(facts.lesions) == 1)


def test_files_are_balanced_and_the_others_stay(tmp_path: Path):
    plain, more = tmp_path / "plain", tmp_path / "more"
    for folder, with_signs in ((plain, False), (more, True)):
        phantom.write(folder, train=48, test=16, size=56, signs=with_signs)
    for name in ("train_all", "test", "instruct", "classify_train", "alignment"):
        assert (plain / f"{name}.json").read_text() == (more / f"{name}.json").read_text()
    added = {p.name for p in more.iterdir()} - {p.name for p in plain.iterdir()}
    parts = ("train", "test")
    assert added == {f"{n}_{p}.json" for n in ("signs", "classify_more") for p in parts}
    rows = json.loads((more / "signs_train.json").read_text())
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        question, answer = (turn["value"] for turn in row["conversations"])
        counts.setdefault(question, Counter())[answer] += 1
    assert len(rows) > 100
    assert all(len(c) > 1 and len(set(c.values())) == 1 for c in counts.values())


def test_readings_know_the_words_and_no_rule():
    asked = 0
    for number, turns in enumerate(phantom.readings(0, 80, 4, signs=True)):
        told = turns[0][0].partition("\n")[0]
        known = "The diagnosis is" in told
        asked += known
        for question, answer in turns:
            if question.endswith("What is the diagnosis?"):
                assert known and f"The diagnosis is {answer}." in told, number
    assert 20 < asked < 60
    assert list(phantom.readings(1, 30, 4)) == list(phantom.readings(1, 30, 4, signs=False))
    said, questions = signs.random_signs(np.random.default_rng(0))
    assert len(questions) == 4 and said.count("is") >= 2
