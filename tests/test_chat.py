"""The terminal conversation: commands, piped input, the saved file."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_runs
from tiny_data import save_image

import medmoe_jax
from medmoe_jax import chat
from medmoe_jax.config import MoeConfig
from medmoe_jax.responder import Reply

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("chat")
    save_image(root / "a.png", seed=1)
    save_image(root / "b.png", seed=2)
    tiny_runs.save_start(root / "model", moe=MoeConfig())
    return root


@pytest.fixture(scope="module")
def model(folder: Path) -> medmoe_jax.Model:
    return medmoe_jax.load(folder / "model")


def say(model: medmoe_jax.Model, lines: list[str]) -> tuple[str, chat.Session, int]:
    """What is printed for these lines, the session, and the number of faults."""
    out = io.StringIO()
    session = chat.Session(model, medmoe_jax.Sampling(max_new_tokens=4), out)
    faults = chat.run(session, lines)
    return out.getvalue(), session, faults


def test_answers_are_those_of_the_model(folder: Path, model: medmoe_jax.Model) -> None:
    image = folder / "a.png"
    text, session, faults = say(model, [f"/image {image}\n", "Is there a lesion?\n", "\n"])
    reply = model.generate("Is there a lesion?", image, medmoe_jax.Sampling(max_new_tokens=4))
    assert faults == 0 and session.history[0]["answer"] == reply.text
    assert session.history[0]["confidence"] == pytest.approx(reply.confidence, rel=1e-4)
    assert reply.text in text and chat.certainty(session.chat.reply) in text
    assert "modality" in text and session.history[0]["images"] == [str(image)]


def test_commands(folder: Path, model: medmoe_jax.Model, tmp_path: Path) -> None:
    saved = tmp_path / "turns.json"
    lines = [
        "What is it?",
        "/reset",
        f"/image {folder / 'a.png'}",
        f"/image {folder / 'b.png'}",
        "And this?",
        "And now?",
        f"/save {saved}",
        "/help",
        "/quit",
        "never asked",
    ]
    text, session, faults = say(model, lines)
    assert faults == 0 and chat.HELP in text
    written = json.loads(saved.read_text())
    assert written["notice"] == chat.NOTICE
    assert [len(turn["images"]) for turn in written["turns"]] == [2, 0]
    assert [turn["question"] for turn in written["turns"]] == ["And this?", "And now?"]
    assert session.chat.turns[::2] == ["And this?", "And now?"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/image none.png", "none.png"),
        ("/image", "needs a file"),
        ("/save", "needs a file"),
        ("/save /no/such/folder/x.json", "No such file"),
        ("/unknown", "unknown command /unknown"),
        ("word " * 9000, "positions"),
        ("Is there a l\udce9sion?", r"half a character: 'Is there a l\udce9'"),
    ],
)
def test_faults_are_said_and_the_session_goes_on(
    model: medmoe_jax.Model, line: str, message: str
) -> None:
    text, session, faults = say(model, [line, "What is it?"])
    assert faults == 1 and message in text
    assert [turn["question"] for turn in session.history] == ["What is it?"]


def test_certainty() -> None:
    reply = Reply("yes", (1, 2), (0.0, -0.6931472), False, {"CT": 0.2, "MRI": 0.8})
    said = "[confidence 50%, modality MRI 80%, cut at --max-new-tokens]"
    assert chat.certainty(reply) == said
    assert chat.certainty(Reply("", (2,), (0.0,), True, None)) == "[confidence 100%]"


def test_piped(folder: Path) -> None:
    words = [sys.executable, "-m", "medmoe_jax.chat", "--model-path", folder / "model"]
    words += ["--image", folder / "a.png", "--max-new-tokens", "2"]
    done = subprocess.run(
        words,
        input="Is there a l\udce9sion?\nIs there a lesion?\n/image x.png\n",
        capture_output=True,
        text=True,
        errors="surrogateescape",
        check=False,
    )
    assert "half a character: 'Is there a l\\udce9'" in done.stdout
    assert done.stdout.startswith(chat.NOTICE), done.stderr
    assert "confidence" in done.stdout and done.returncode == 1
    words[4] = folder / "nothing"
    done = subprocess.run(words, input="", capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "does not exist" in done.stderr
    assert "Traceback" not in done.stderr
