"""Prediction files: formats, chunks, resuming, controls, rows that cannot be answered."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_data
import tiny_service

from medmoe_jax import evaluate, predict
from medmoe_jax import model as loaded
from medmoe_jax.config import MODALITIES, ConfigError, MoeConfig
from medmoe_jax.data.problems import DataError

pytestmark = pytest.mark.usefixtures("quick_compile")

KEYS = ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
TEXTS = [
    "Is there a lesion?",
    "Why?",
    "What is shown in this image?",
    "Which lung?",
    "Left or right?",
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, images/ and questions.json with images (one row has two, one none) and options."""
    root = tmp_path_factory.mktemp("predict")
    tiny_service.save(root / "model", tiny_service.config("phi", MoeConfig()))
    rows = []
    for i, text in enumerate(TEXTS):
        tiny_data.save_image(root / "images" / f"i{i}.png", seed=i)
        talk = [{"from": "human", "value": f"<image>\n{text}"}, {"from": "gpt", "value": "x"}]
        rows.append({"id": f"r{i}", "image": f"i{i}.png", "conversatons": talk})
    rows[1]["image"] = None
    rows[2]["image"] = ["i2.png", "i0.png"]
    rows[3]["options"] = ["left", "right", "both lungs"]
    tiny_data.save_rows(root / "questions.json", rows)
    return root


@pytest.fixture(scope="module")
def once(root: Path) -> Any:
    """Loads the model once for all runs of this module."""
    model = loaded.load(root / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loaded, "load", lambda *_, **__: model)
        yield model


def arguments(root: Path, out: Path, *more: str, questions: str = "questions.json") -> list[str]:
    """A command line."""
    return [
        *("--model-path", str(root / "model"), "--question-file", str(root / questions)),
        *("--image-folder", str(root / "images"), "--answers-file", str(out)),
        *("--max-new-tokens", "8", *more),
    ]


def ask(root: Path, out: Path, *more: str, questions: str = "questions.json") -> list[dict]:
    """Runs and reads the answers."""
    command = arguments(root, out, *more, questions=questions)
    assert predict.predict(predict.arguments().parse_args(command)) == 0
    assert [p.name for p in out.parent.glob(f"{out.name}*")] == [out.name]
    return read(out)


def read(out: Path) -> list[dict]:
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def content(rows: list[dict]) -> list[tuple]:
    return [(r["question_id"], r["prompt"], r["text"]) for r in rows]


@pytest.fixture(scope="module")
def answers(root: Path, once: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """All questions, scored options included."""
    return ask(root, tmp_path_factory.mktemp("all") / "new" / "answers.jsonl", "--score-options")


def test_rows(root: Path, once: Any, answers: list[dict]) -> None:
    """The official keys, in the order of the questions; numbers are the model's."""
    assert [row["question_id"] for row in answers] == [f"r{i}" for i in range(5)]
    assert [row["prompt"] for row in answers] == TEXTS
    assert len({row["answer_id"] for row in answers}) == 5
    shown = [["i0.png"], [], ["i2.png", "i0.png"], ["i3.png"], ["i4.png"]]
    for row, names in zip(answers, shown, strict=True):
        assert list(row) == KEYS and row["model_id"] == str(root / "model")
        about = row["metadata"]
        assert about["images"] == "shown" and list(about["router"]) == list(MODALITIES)
        pictures = [root / "images" / name for name in names]
        reply = once.generate(row["prompt"], pictures, predict.Sampling(max_new_tokens=8))
        assert row["text"] == reply.text and about["finished"] == reply.finished
        assert about["confidence"] == pytest.approx(reply.confidence, rel=1e-3)
        assert about["tokens"] == len(reply.ids)
    assert ["options" in row["metadata"] for row in answers] == [i == 3 for i in range(5)]
    options = answers[3]["metadata"]["options"]
    assert list(options) == ["left", "right", "both lungs"]
    (scores,) = once.score([TEXTS[3]], [root / "images/i3.png"], [list(options)])
    want = np.exp(scores) / np.exp(scores).sum()
    np.testing.assert_allclose(list(options.values()), want, rtol=1e-3)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_batch_size_changes_nothing(
    root: Path, once: Any, answers: list[dict], tmp_path: Path, size: int
) -> None:
    found = ask(root, tmp_path / "a.jsonl", "--batch-size", str(size))
    assert content(found) == content(answers)
    for one, other in zip(found, answers, strict=True):
        assert one["metadata"]["confidence"] == pytest.approx(
            other["metadata"]["confidence"], rel=1e-3
        )


def test_chunks_are_the_file(root: Path, once: Any, answers: list[dict], tmp_path: Path) -> None:
    for number in (2, 4):
        found = []
        for index in range(number):
            chunk = ("--num-chunks", str(number), "--chunk-idx", str(index))
            found += ask(root, tmp_path / f"{number}_{index}.jsonl", *chunk)
        assert content(found) == content(answers)
    with pytest.raises(DataError, match="chunk 4 of 4 does not exist"):
        ask(root, tmp_path / "x.jsonl", "--num-chunks", "4", "--chunk-idx", "4")


def test_llava_questions(root: Path, once: Any, answers: list[dict], tmp_path: Path) -> None:
    """JSONL of question_id, image, text gives the same answers."""
    rows = [
        {"question_id": 7, "image": "i0.png", "text": f"{TEXTS[0]}\n<image>"},
        {"question_id": 3, "text": TEXTS[1]},
    ]
    tiny_data.save_rows(root / "llava.jsonl", rows)
    found = ask(root, tmp_path / "a.jsonl", questions="llava.jsonl")
    assert [row["question_id"] for row in found] == [7, 3]
    assert [row["text"] for row in found] == [row["text"] for row in answers[:2]]


def killed(path: Path, out: Path, after: int, cut: int) -> None:
    """Makes of a whole partial file one that was ended `cut` bytes before a line's end."""
    lines = path.read_bytes().split(b"\n")
    kept = b"\n".join(lines[: after + 1]) + b"\n"
    out.write_bytes(kept[: len(kept) - cut])


@pytest.fixture(scope="module")
def partial(root: Path, once: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The partial file just before the end of a run, whose texts have letters of several bytes."""
    out = tmp_path_factory.mktemp("killed") / "a.jsonl"
    tiny_data.save_rows(
        root / "many.json", [{"id": i, "text": f"Größe 病変 {i}?"} for i in range(4)]
    )

    def stop(self: Any) -> None:
        self.file.close()
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict.Progress, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            ask(root, out, "--batch-size", "1", questions="many.json")
    assert not out.exists()
    return out.with_name("a.jsonl.partial")


def test_a_killed_run_goes_on(
    root: Path,
    once: Any,
    partial: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whole lines stay, a cut one (also within a letter) is answered again, nothing else is."""
    whole = ask(root, tmp_path / "whole.jsonl", questions="many.json")
    asked: list[int] = []
    real = predict.replies

    def counting(model: Any, questions: Any, *args: Any, **settings: Any) -> Any:
        asked.append(len(questions))
        return real(model, questions, *args, **settings)

    monkeypatch.setattr(predict, "replies", counting)
    line = partial.read_bytes().split(b"\n")[3]
    inside = len(line) - line.index("病".encode())  # keeps the first of its three bytes
    for cut, again in ((0, 1), (1, 2), (20, 2), (inside, 2)):
        out = tmp_path / f"{cut}.jsonl"
        killed(partial, out.with_name(out.name + ".partial"), 3, cut)
        found = ask(root, out, "--batch-size", "2", questions="many.json")
        assert content(found) == content(whole) and asked.pop() == again
        assert f"{4 - again} of 4 answers are there" in capsys.readouterr().out
    killed(partial, tmp_path / "0.jsonl.partial", 4, 0)  # ended before the file was renamed
    assert content(ask(root, tmp_path / "0.jsonl", questions="many.json")) == content(whole)
    assert not asked


def test_other_settings_do_not_mix(root: Path, once: Any, partial: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    for change in (("--temperature", "0.5"), ("--stop", "x"), ("--images", "blank")):
        killed(partial, tmp_path / "a.jsonl.partial", 2, 0)
        with pytest.raises(DataError, match=f"other settings .*{change[0][2:]}.*delete the file"):
            ask(root, out, *change, questions="many.json")
    text = (root / "many.json").read_text(encoding="utf-8")
    try:
        (root / "many.json").write_text(text.replace("0?", "9?"), encoding="utf-8")
        with pytest.raises(DataError, match=r"other settings .*content"):
            ask(root, out, questions="many.json")
    finally:
        (root / "many.json").write_text(text, encoding="utf-8")
    # A run that failed before its first answer is in nobody's way.
    killed(partial, tmp_path / "a.jsonl.partial", 0, 0)
    assert len(ask(root, out, "--stop", "x", questions="many.json")) == 4


def test_controls(root: Path, once: Any, answers: list[dict], tmp_path: Path) -> None:
    """What is shown instead of the images; text-only rows are as they were."""
    found = {
        kind: ask(root, tmp_path / f"{kind}.jsonl", "--images", kind)
        for kind in ("blank", "noise", "shuffled")
    }
    for kind, rows in found.items():
        assert {row["metadata"]["images"] for row in rows} == {kind}
        unlike = [
            a["metadata"]["router"] != pytest.approx(b["metadata"]["router"], rel=1e-3)
            for a, b in zip(rows, answers, strict=True)
        ]
        assert unlike == [True, False, True, True, True]
    noise = ask(root, tmp_path / "again.jsonl", "--images", "noise", "--batch-size", "2")
    assert content(noise) == content(found["noise"])
    half = ("--num-chunks", "2", "--chunk-idx", "1")
    for kind in ("noise", "shuffled"):
        part = ask(root, tmp_path / f"{kind}_part.jsonl", "--images", kind, *half)
        assert content(part) == content(found[kind])[3:]


def test_pixels_of_controls(root: Path, once: Any) -> None:
    (question, *_) = predict.questions.read_questions(root / "questions.json")
    blank, noise = (
        predict.pixels(question, root / "absent", once.spec, kind) for kind in ("blank", "noise")
    )
    assert blank.shape == noise.shape == (1, 8, 8, 3) and blank.dtype == np.uint8
    assert len(np.unique(blank.reshape(-1, 3), axis=0)) == 1
    assert abs(blank[0, 0, 0] / 255 - np.array(once.spec.mean)).max() < 1 / 255
    assert len(np.unique(noise)) > 50


def test_draws_belong_to_questions(root: Path, once: Any, tmp_path: Path) -> None:
    how = ("--temperature", "1.5", "--seed", "4")
    one, two = (ask(root, tmp_path / f"{n}.jsonl", *how, "--batch-size", str(n)) for n in (5, 2))
    assert content(one) == content(two)
    other = ask(root, tmp_path / "o.jsonl", "--temperature", "1.5", "--seed", "5")
    assert content(one) != content(other)


def test_beams_and_stops(root: Path, once: Any, answers: list[dict], tmp_path: Path) -> None:
    found = ask(root, tmp_path / "b.jsonl", "--num-beams", "2")
    assert [row["question_id"] for row in found] == [f"r{i}" for i in range(5)]
    text = max((row["text"] for row in answers), key=len)
    stopped = ask(root, tmp_path / "s.jsonl", "--stop", text[2:5])
    assert text[:2].strip() in [row["text"] for row in stopped]
    assert not any(text[2:5] in row["text"] for row in stopped)


def test_bad_rows_and_exit_status(root: Path, tmp_path: Path) -> None:
    """As a process: two images that cannot be read; their rows hold the reason, others the
    answers; the summary and the exit status tell."""
    tiny_data.save_image(tmp_path / "images/good.png")
    (tmp_path / "images/broken.png").write_bytes(b"no image")
    names = ["good.png", "broken.png", "absent.png", None]
    rows = [{"question_id": i, "image": name, "text": "Why?"} for i, name in enumerate(names)]
    tiny_data.save_rows(tmp_path / "q.jsonl", rows)
    (tmp_path / "model").symlink_to(root / "model")

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        command = arguments(tmp_path, tmp_path / "a.jsonl", *more, questions="q.jsonl")
        return subprocess.run(
            [sys.executable, "-m", "medmoe_jax.predict", *command],
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).parents[1],
        )

    done = run()
    assert done.returncode == 1, done.stderr
    assert "2 answers in" in done.stdout and "2 questions were not answered" in done.stdout
    assert "not answered: 1: image 'broken.png' cannot be read" in done.stdout
    found = read(tmp_path / "a.jsonl")
    assert [row["question_id"] for row in found] == [0, 1, 2, 3]
    for row, fault in zip(found, (False, True, True, False), strict=True):
        assert list(row) == KEYS and ("error" in row["metadata"]) == fault
        if fault:
            assert row["text"] == "" and row["metadata"]["confidence"] is None
            assert names[row["question_id"]] in row["metadata"]["error"]
    failed = run("--batch-size", "0")
    assert failed.returncode == 1 and "error: --batch-size is 0" in failed.stderr
    assert "Traceback" not in failed.stderr


@pytest.mark.parametrize(
    ("more", "kind", "message"),
    [
        (("--temperature", "-1"), ConfigError, "temperature"),
        (("--num-beams", "2", "--temperature", "1"), ConfigError, "does not draw"),
        (("--batch-size", "0"), ConfigError, "--batch-size"),
        (("--question-file", "absent.json"), DataError, r"absent\.json"),
    ],
)
def test_errors_come_before_the_model(
    root: Path, tmp_path: Path, more: tuple[str, ...], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        ask(root, tmp_path / "a.jsonl", *more)
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_told_first(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place, reason in ((tmp_path, "it is a folder"), (tmp_path / "file" / "a.jsonl", "File ex")):
        with pytest.raises(DataError, match=rf"cannot be written \({reason}.*--answers-file"):
            ask(root, place)


def test_questions_are_not_written_over(root: Path, tmp_path: Path) -> None:
    asked = tmp_path / "asked.json"
    asked.write_text(json.dumps([{"id": 1, "text": "Why?"}]))
    with pytest.raises(ConfigError, match="is the file of the questions"):
        ask(root, asked, "--question-file", str(asked))
    assert json.loads(asked.read_text()) and len(list(tmp_path.iterdir())) == 1


def test_too_long_a_question_is_a_row(root: Path, once: Any, tmp_path: Path) -> None:
    rows = [{"id": 0, "text": "what " * 3000}, {"id": 1, "text": "Why?"}]
    tiny_data.save_rows(root / "long.json", rows)
    command = arguments(root, tmp_path / "a.jsonl", questions="long.json")
    assert predict.predict(predict.arguments().parse_args(command)) == 1
    first, second = read(tmp_path / "a.jsonl")
    assert "2048 positions" in first["metadata"]["error"] and "error" not in second["metadata"]


def test_classification_from_questions_to_figures(root: Path, once: Any, tmp_path: Path) -> None:
    """Rows with options and a label: each row's likeliest option is what the figures count."""
    options, rows = ["lung", "liver", "knee"], []
    for i in range(6):
        talk = [{"from": "human", "value": f"<image>\nOrgan {i}?"}, {"from": "gpt", "value": "x"}]
        row = {"id": i, "image": f"i{i % 5}.png", "answer_type": "CLOSED", "conversations": talk}
        rows.append(row | {"task": "organ", "options": options, "label": i % 3})
    tiny_data.save_rows(root / "classify.json", rows)
    out = tmp_path / "answers.jsonl"
    said = ask(root, out, "--score-options", questions="classify.json")
    likely = [max(r["metadata"]["options"], key=r["metadata"]["options"].get) for r in said]
    right = [choice == options[row["label"]] for choice, row in zip(likely, rows, strict=True)]
    found = evaluate.evaluate(root / "classify.json", out, samples=20)["classification"]["organ"]
    assert found["classes"] == options and found["n"] == 6
    assert found["likelihood"]["accuracy_percent"] == pytest.approx(100 * np.mean(right))
    for row, reply in zip(rows, said, strict=True):
        asked = row["conversations"][0]["value"].removeprefix("<image>\n")
        given = once.score([asked], [root / "images" / row["image"]], [options])[0]
        shares = np.exp(given) / np.exp(given).sum()
        np.testing.assert_allclose(list(reply["metadata"]["options"].values()), shares, atol=1e-4)
