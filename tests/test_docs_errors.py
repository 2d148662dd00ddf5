"""docs/troubleshooting.md has every message that the package can end with, and no other."""

from __future__ import annotations

import ast

import error_messages
import pytest
from doc_blocks import ROOT
from markdown_it import MarkdownIt

PAGE = ROOT / "docs/troubleshooting.md"
SHORTEST = 25  # characters of a remedy


def entries(text: str) -> list[tuple[list[str], str]]:
    """(messages, remedy) of each row of the page's tables."""
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    cells = [
        tokens[i + 1] for i, token in enumerate(tokens) if token.type == "td_open"
    ]  # two a row
    return [
        ([c.content for c in message.children or () if c.type == "code_inline"], remedy.content)
        for message, remedy in zip(cells[::2], cells[1::2], strict=True)
    ]


def differences(page: str, made: dict[str, str]) -> list[str]:
    """Messages without an entry, and entries without a message."""
    listed = [error_messages.plain(m) for messages, _ in entries(page) for m in messages]
    absent = [
        f"{where} has a message that docs/troubleshooting.md lacks; add a row:\n| `{m}` | remedy |"
        for m, where in made.items()
        if m not in listed
    ]
    stale = [f"the code has no message `{m}` any more" for m in listed if m not in made]
    twice = [f"listed twice: `{m}`" for m in sorted(set(listed)) if listed.count(m) > 1]
    return absent + stale + twice


def test_every_message_has_its_remedy_and_every_remedy_its_message() -> None:
    made = error_messages.messages()
    assert len(made) > 300
    found = differences(PAGE.read_text(encoding="utf-8"), made)
    assert not found, "\n".join(found)


def test_remedies_are_sentences() -> None:
    for messages, remedy in entries(PAGE.read_text(encoding="utf-8")):
        assert messages and len(remedy) >= SHORTEST and remedy.endswith("."), (messages, remedy)


def test_a_missing_a_stale_and_a_doubled_entry_are_found() -> None:
    page = "| message | what to do |\n|---|---|\n| `a … b` | Do. |\n| `a … b`<br>`old` | Do. |\n"
    found = differences(page, {"a … b": "x.py:1", "new …": "y.py:2"})
    assert [text.splitlines()[0].partition(" has ")[0] for text in found] == [
        "y.py:2",
        "the code",
        "listed twice: `a … b`",
    ]


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("raise DataError(f'file {x} is {y}{z} bad')", ["file … is … bad"]),
        ("raise DataError('two ' f'parts {x}') from error", ["two parts …"]),
        ("raise DataError(fault or 'none given')", ["none given"]),
        ("def make():\n    return ConfigError('made, not raised')", ["made, not raised"]),
        ("problems.append(f'{x}: key is missing')", ["…: key is missing"]),
        ("report.notes.append('not an error')", []),
        ("parser.error('give --out')", ["give --out"]),
        ("def sample_fault(row):\n    return 'nothing to learn'", ["nothing to learn"]),
        ("raise DataError(f'{x}: {y}')", []),
    ],
)
def test_messages_are_read_off_the_source(source: str, wanted: list[str]) -> None:
    tree = ast.parse(source)
    found = error_messages.of(tree, {"DataError", "ConfigError"})
    assert sorted({text for text, _ in found}) == wanted
