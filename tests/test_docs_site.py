"""docs/build.py: what becomes of links, and that no page and no module is left out."""

from __future__ import annotations

import runpy
from pathlib import Path

import griffe
import pytest
import yaml
from doc_blocks import ROOT

build = runpy.run_path(str(ROOT / "docs/build.py"))
KNOWN = {"docs/data.md": "data.md", "README.md": "index.md", "docs/phases.md": "phases.md"}


@pytest.mark.parametrize(
    ("text", "source", "wanted"),
    [
        ("[x](docs/data.md#rules)", "README.md", "[x](data.md#rules)"),
        ("[x](../README.md#limits)", "docs/data.md", "[x](index.md#limits)"),
        ("[x](data.md)", "docs/phases.md", "[x](data.md)"),
        ("[x](#here) [y](https://a.org)", "README.md", "[x](#here) [y](https://a.org)"),
        ("![x](docs/assets/architecture.svg)", "README.md", "![x](assets/architecture.svg)"),
        ("[x](../medmoe_jax/train.py)", "docs/data.md", "[x](api/medmoe_jax.train.md)"),
        ("[`launch/`](../launch)", "docs/data.md", "`launch`"),
        ("[the recipe](../Makefile)", "docs/data.md", "the recipe (`Makefile`)"),
        ("```\n[x](nowhere.md)\n```\n", "README.md", "```\n[x](nowhere.md)\n```\n"),
        ("| a | `x\\|y<z>` |", "README.md", "| a | <code>x&#124;y&lt;z&gt;</code> |"),
    ],
)
def test_links_and_tables_work_in_the_site(text: str, source: str, wanted: str) -> None:
    assert build["relinked"](text, source, KNOWN) == wanted


def test_a_link_that_leads_nowhere_is_an_error() -> None:
    with pytest.raises(FileNotFoundError, match=r"docs/data.md: the link to phase.md"):
        build["relinked"]("[x](phase.md)", "docs/data.md", KNOWN)


def test_every_page_and_every_module_has_its_place(tmp_path: Path) -> None:
    file = build["gather"](tmp_path / "site")
    config = yaml.safe_load(file.read_text())
    written = {p.relative_to(tmp_path / "site/pages") for p in (tmp_path / "site").rglob("*.md")}
    named = str(config["nav"])
    assert all(f"'{path}'" in named for path in map(str, written))
    modules = {p for p in (ROOT / "medmoe_jax").rglob("*.py") if not p.name.startswith("__main")}
    assert len(modules) == sum(path.parent.name == "api" for path in written)
    assert (tmp_path / "site/pages/assets/architecture.svg").is_file()


def test_a_field_is_described_by_the_comment_behind_it(tmp_path: Path) -> None:
    fields = '    a: str = "\u00e4 # b"  # what it is\n    b: int = 0\n'
    (tmp_path / "sample.py").write_text(f"class C:\n{fields}\nc: int = 1  # not a field\n")
    extensions = griffe.load_extensions(str(ROOT / "docs/field_comments.py"))
    module = griffe.load("sample", search_paths=[tmp_path], extensions=extensions)
    said = {name: module[name].docstring for name in ("C.a", "C.b", "c")}
    assert said.pop("C.a").value == "what it is"
    assert said == {"C.b": None, "c": None}
