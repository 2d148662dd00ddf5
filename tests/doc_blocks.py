"""Code blocks of the documentation: where they are, and which commands a shell makes of them."""

from __future__ import annotations

import ast
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *(ROOT / name for name in ("benchmarks/README.md", "notebooks/README.md")),
]
# Each of them is replaced by a program that only writes down how it was called.
PROGRAMS = (
    *("python", "python3", "pip", "make", "bash", "sh", "git", "tensorboard", "xprof", "jupyter"),
    *("sbatch", "srun", "scancel", "gcloud", "xpk", "kubectl", "sky", "docker", "nvidia-smi"),
    *("mkdir", "head", "cat", "cp", "mv", "ls", "diff", "tar", "unzip", "curl", "wget", "jupytext"),
)
SHELL = ("sh", "bash", "shell", "console")
BEGINNINGS = ("python", "pip ", "make ", "launch/", "bash ", "sbatch ", "--config", ". .venv")


@dataclass(frozen=True)
class Block:
    """One block of code."""

    page: str  # path in the repository
    line: int  # of its first line of code, from 1
    language: str  # as the fence says; "" where there is none
    text: str
    note: str = ""  # the HTML comment in front of it

    @property
    def place(self) -> str:
        """Where it is, for messages."""
        return f"{self.page}:{self.line}"

    @property
    def kind(self) -> str:
        """Language; a block without one is shell where it begins like a command, else text."""
        if self.language:
            return "sh" if self.language in SHELL else self.language
        first = self.text.lstrip().partition("\n")[0]
        return "sh" if first.startswith(BEGINNINGS) else "text"


def _tokens(text: str) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(text)


def blocks(text: str, page: str) -> Iterator[Block]:
    """The blocks of a page, fenced and indented ones."""
    note = ""
    for token in _tokens(text):
        if token.type in ("fence", "code_block"):
            assert token.map is not None
            first = token.map[0] + (2 if token.type == "fence" else 1)
            words = token.info.split()
            yield Block(page, first, words[0] if words else "", token.content, note)
        note = token.content.strip() if token.type == "html_block" else ""


def spans(text: str) -> Iterator[tuple[int, str]]:
    """(line, content) of each piece of code within a line of text."""
    for token in _tokens(text):
        for child in token.children or ():
            if child.type == "code_inline":
                yield (token.map or [0])[0] + 1, child.content.replace("\\|", "|")


def page_blocks() -> list[Block]:
    """All blocks of all pages, and of the docstrings that begin the modules and the configs."""
    found = [
        block
        for page in PAGES
        for block in blocks(page.read_text(encoding="utf-8"), str(page.relative_to(ROOT)))
    ]
    for file in [*(ROOT / "configs").glob("*.py"), *(ROOT / "medmoe_jax").rglob("*.py")]:
        document = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        found += [
            block
            for block in blocks(document, str(file.relative_to(ROOT)))
            if block.kind == "sh"  # others are drawings of files and formulas
        ]
    return found


def commands(script: str, folder: Path) -> list[list[str]]:
    """How a shell calls programs when it runs `script`, loops, variables and quotes resolved.

    Args:
      script: shell commands. Options alone are taken as those of a training run.
      folder: an empty folder to run in.

    Raises:
      AssertionError: the shell cannot run it, or a program is none of PROGRAMS and launch/.
    """
    if script.lstrip().startswith("--config"):
        script = f"python -m medmoe_jax.train --config configs/stage3.py:tiny --workdir w {script}"
    log, programs = folder / "log", folder / "programs"
    programs.mkdir()
    (programs / "stub").write_text(
        f'#!/bin/bash\nprintf "%s\\0" "$0" "$@" >>{log}\nprintf "\\1\\0" >>{log}\n'
    )
    (programs / "stub").chmod(0o755)
    for name in PROGRAMS:
        (programs / name).symlink_to("stub")
    (folder / "launch").mkdir()
    for file in (ROOT / "launch").iterdir():
        if file.suffix == ".sh":
            (folder / "launch" / file.name).symlink_to(programs / "stub")
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/activate").touch()
    done = subprocess.run(
        ["/bin/bash", "-eu", "-o", "pipefail", "-c", script],
        cwd=folder,
        env={"PATH": str(programs), "HOME": str(folder), "PWD": str(folder)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    written = log.read_text().split("\0")[:-1] if log.exists() else []
    found: list[list[str]] = [[]]
    for word in written:
        if word == "\1":
            found.append([])
        else:
            found[-1].append(word if found[-1] else word.removeprefix(f"{programs}{os.sep}"))
    return found[:-1]
