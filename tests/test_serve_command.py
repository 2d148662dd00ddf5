"""The command line of the server, and the server as a process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import tiny_service
import uvicorn
from tiny_server import body, shown

import medmoe_jax
from medmoe_jax.config import MoeConfig
from medmoe_jax.conversation import NOTICE
from medmoe_jax.sampling import Sampling
from medmoe_jax.serve import __main__ as command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("serve") / "model"
    return tiny_service.save(path, tiny_service.config("phi", MoeConfig()))


def run(monkeypatch: pytest.MonkeyPatch, *words: Any) -> list[tuple[Any, dict[str, Any]]]:
    """The applications that the command would serve, and how."""
    served: list[tuple[Any, dict[str, Any]]] = []
    monkeypatch.setattr(sys, "argv", ["serve", *map(str, words)])
    monkeypatch.setattr(uvicorn, "run", lambda app, **how: served.append((app, how)))
    command.main()
    return served


def test_the_command(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model-path", folder, "--port", 1, "--max-body", 3, "--served-name", "me"]
    [(_, how)] = run(monkeypatch, *words)
    assert (how["host"], how["port"]) == ("127.0.0.1", 1)
    said = capsys.readouterr()
    assert NOTICE in said.out and "warning" not in said.err
    run(monkeypatch, *words, "--host", "0.0.0.0")
    assert "warning: anyone who reaches 0.0.0.0 may ask" in capsys.readouterr().err
    monkeypatch.setenv(command.KEY, "secret")
    run(monkeypatch, *words, "--host", "0.0.0.0")
    said = capsys.readouterr()
    assert "warning" not in said.err and "secret" not in said.out
    with pytest.raises(SystemExit, match="does not exist"):
        run(monkeypatch, "--model-path", folder / "absent")
    with pytest.raises(SystemExit):
        run(monkeypatch, *words, "--batch", "0")
    assert "0 is below 1" in capsys.readouterr().err


def test_without_the_extra_the_command_names_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.setattr(sys, "argv", ["serve", "--model-path", str(folder)])
    with pytest.raises(SystemExit, match=r"needs uvicorn: pip install 'medmoe_jax\[serve\]'"):
        command.main()


@pytest.mark.slow
def test_the_process(folder: Path, tmp_path: Path) -> None:
    """A real server: warm from the start; told to end, it finishes the answer that it gives."""
    question, how = "Is there a lesion in the left lung?", Sampling(max_new_tokens=12)
    picture = np.random.default_rng(0).integers(0, 256, (10, 12, 3), np.uint8)
    words = [sys.executable, "-m", "medmoe_jax.serve", "--model-path", folder, "--port", "0"]
    log = tmp_path / "log"
    with (
        log.open("w") as out,
        subprocess.Popen(
            [*words, "--warm-up", "--batch", "2"],
            stderr=subprocess.PIPE,
            stdout=out,
            text=True,
            env=os.environ | {command.KEY: "key"},
        ) as server,
        requests.Session() as client,
    ):
        assert server.stderr
        lines = iter(server.stderr.readline, "")
        said = next(line for line in lines if "running on" in line)
        place = said.split(" running on ")[1].split()[0]
        client.headers["Authorization"] = "Bearer key"
        assert client.get(f"{place}/health", timeout=300).json()["status"] == "ok"
        sent = body(shown(question, picture), max_tokens=12) | {"model": "model"}
        want = medmoe_jax.load(folder).generate(question, picture, how)
        chat = f"{place}/v1/chat/completions"
        answer = client.post(chat, json=sent, timeout=300).json()
        assert answer["choices"][0]["message"]["content"] == want.text
        assert requests.get(f"{place}/v1/models", timeout=300).status_code == 401
        long = sent | {"max_tokens": 64, "stream": True}
        with client.post(chat, json=long, stream=True, timeout=300) as stream:
            pieces = stream.iter_lines()
            next(pieces)
            server.send_signal(signal.SIGTERM)
            rest = [line for line in pieces if line]
        assert rest[-1] == b"data: [DONE]"
        told = "".join(lines)
        assert server.wait(timeout=300) == -signal.SIGTERM and question not in told
    assert "warm for 2 at once" in log.read_text()
