"""The messages that the package can end with, read off its source.

A message's pattern is its fixed text, with `…` for what is filled in.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "medmoe_jax"
LISTS = ("problems", "faults", "wrong")  # what is collected there is told in one error
ENDS = ("error", "exit", "stop")  # parser.error, sys.exit, distributed.stop
FRAGMENTS = ("layouts.unknown",)  # its text is one part of a message of its own


def pattern(node: ast.expr) -> str:
    """The fixed text of a string expression; "" where there is none."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(pattern(v) if isinstance(v, ast.Constant) else "…" for v in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (pattern(node.left) or "…") + (pattern(node.right) or "…")
    if isinstance(node, ast.BoolOp):
        return next((found for value in node.values if (found := pattern(value))), "")
    return ""


def plain(text: str) -> str:
    """A pattern as it is compared: one line, one `…` for several, without backticks."""
    return re.sub(r"…+", "…", re.sub(r"\s+", " ", text.replace("`", ""))).strip()


def says_something(text: str) -> bool:
    """Whether there are words in it besides what is filled in."""
    return re.search(r"[A-Za-z]{3}", text) is not None


def exceptions() -> set[str]:
    """Names of the package's exceptions and of the built-in ones that it raises."""
    found = {"ValueError", "IndexError", "AttributeError", "FileNotFoundError", "Timeout"}
    found |= {"ArgumentTypeError", "RuntimeError", "TypeError", "KeyError", "OSError"}
    for _, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and any(
                ast.unparse(base).endswith(("Error", "Exception")) for base in node.bases
            ):
                found.add(node.name)
    return found


def trees() -> Iterator[tuple[str, ast.Module]]:
    """(path in the package, parsed source) of every module."""
    for file in sorted(PACKAGE.rglob("*.py")):
        yield file.relative_to(PACKAGE).as_posix(), ast.parse(file.read_text(encoding="utf-8"))


def calls(tree: ast.Module, errors: set[str]) -> Iterator[ast.Call]:
    """Calls that make or end with a message."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            yield node.exc
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        last = name.rpartition(".")[2]
        listed = last == "append" and name.split(".")[-2] in LISTS
        if last in errors or last in ENDS or listed:
            yield node


def returned(tree: ast.Module) -> Iterator[ast.expr]:
    """What functions named `...fault` return: the reason why a row cannot be used."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name.endswith("fault"):
            for inner in ast.walk(node):
                if isinstance(inner, ast.Return) and inner.value is not None:
                    yield inner.value


def of(tree: ast.Module, errors: set[str]) -> Iterator[tuple[str, int]]:
    """(pattern, line) of each message in a module.

    Args:
      tree: the module.
      errors: names of exceptions.
    """
    made = [call for call in calls(tree, errors) if ast.unparse(call.func) not in FRAGMENTS]
    for node in [*(argument for call in made for argument in call.args[:1]), *returned(tree)]:
        text = plain(pattern(node))
        if says_something(text):
            yield text, node.lineno


def messages() -> dict[str, str]:
    """Pattern -> where the first message of that pattern is made, as FILE:LINE."""
    found: dict[str, str] = {}
    errors = exceptions()
    for path, tree in trees():
        for text, line in of(tree, errors):
            found.setdefault(text, f"{path}:{line}")
    return dict(sorted(found.items(), key=lambda item: item[1]))
