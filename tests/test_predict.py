"""Prediction and evaluation files."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import tiny_runs

from medmoe_jax import evaluate, predict
from medmoe_jax.config import MoeConfig
from medmoe_jax.data.problems import DataError


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(model folder, question file)."""
    root = tmp_path_factory.mktemp("predict")
    return tiny_runs.save_start(root / "model", moe=MoeConfig()), tiny_runs.save_questions(
        root / "d", 5
    )


def ask(setting: tuple[Path, Path], out: Path, batch_size: int, shown: str = "shown") -> list[dict]:
    model, questions = setting
    predict.predict(
        Namespace(
            model_path=model,
            question_file=questions,
            image_folder=questions.parent / "images",
            answers_file=out,
            conv_mode="",
            batch_size=batch_size,
            max_new_tokens=6,
            image_aspect="pad",
            images=shown,
            dtype="float32",
        )
    )
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_answers_do_not_depend_on_the_batch(setting: tuple[Path, Path], tmp_path: Path):
    alone, together = (ask(setting, tmp_path / f"{n}.jsonl", n) for n in (1, 3))
    assert [row["question_id"] for row in together] == [f"r{i}" for i in range(5)]
    assert [row["text"] for row in alone] == [row["text"] for row in together]
    np.testing.assert_allclose(
        [row["metadata"]["confidence"] for row in alone],
        [row["metadata"]["confidence"] for row in together],
        rtol=1e-4,
    )
    keys = {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}
    assert set(alone[0]) == keys and "<image>" not in alone[0]["prompt"]


def test_blank_images_change_what_the_model_sees(setting: tuple[Path, Path], tmp_path: Path):
    seen, blank = (ask(setting, tmp_path / f"{s}.jsonl", 5, s) for s in ("shown", "blank"))
    assert [r["metadata"]["confidence"] for r in seen] != [
        r["metadata"]["confidence"] for r in blank
    ]
    # Same question, same (empty) picture: same confidence.
    assert len({r["metadata"]["confidence"] for r in blank}) == 1


def test_scores_are_paired_by_id(setting: tuple[Path, Path], tmp_path: Path):
    _, questions = setting
    said = {"r0": "left lung", "r1": "no", "r2": "lung", "r3": "yes", "r4": "right"}
    rows = [{"question_id": k, "text": v} for k, v in reversed(said.items())]
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = evaluate.evaluate(questions, answers)["summary"]
    assert summary["closed accuracy"] == summary["closed accuracy, strict"] == 50.0
    assert summary["open recall"] == pytest.approx(50.0)
    answers.write_text("".join(json.dumps(row) + "\n" for row in [*rows[1:], {"question_id": "x"}]))
    with pytest.raises(DataError, match=r"without a prediction \['r4'\].*question \['x'\]"):
        evaluate.evaluate(questions, answers)
    answers.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    with pytest.raises(DataError, match="more than once"):
        evaluate.evaluate(questions, answers)
