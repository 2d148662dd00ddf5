"""Results as files: JSON and Markdown of each experiment, and one page of all.

The page is HTML that holds its pictures and needs no network, and Markdown beside the pictures.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medmoe_jax.experiments.cells import DONE
from medmoe_jax.experiments.result import Claim, Result, Table, markdown

FOLDER = "results"
PAGE, TEXT = "report.html", "report.md"
STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
h1,h2{line-height:1.2} h2{margin-top:3rem;border-top:1px solid #ccc;padding-top:1rem}
table{border-collapse:collapse;font-size:.8rem;margin:.5rem 0 1rem;display:block;overflow-x:auto}
td,th{padding:.2rem .6rem;text-align:right;border-bottom:1px solid #ddd;white-space:nowrap}
td:first-child,th:first-child{text-align:left;white-space:normal;min-width:9rem}
caption{text-align:left;font-weight:600;white-space:nowrap} img{max-width:100%}
.v1{color:#00704f}.v-1{color:#b04000}.v0{color:#666} .note{color:#444;font-size:.9rem}
"""


def save(result: Result, folder: Path, setting: dict[str, Any]) -> None:
    """Writes NAME.json and NAME.md; the pictures are there already.

    Args:
      result: what was found.
      folder: of the results.
      setting: what the study was run with.
    """
    whole = dataclasses.asdict(result) | {"setting": setting}
    text = json.dumps(whole, indent=1, ensure_ascii=False) + "\n"
    (folder / f"{result.name}.md").write_text(as_markdown(result, setting), encoding="utf-8")
    partial = folder / f"{result.name}.json.partial"
    partial.write_text(text, encoding="utf-8")
    partial.replace(folder / f"{result.name}.json")


def load(path: Path) -> tuple[Result, dict[str, Any]]:
    """A result and the setting it was made with."""
    found = json.loads(path.read_text(encoding="utf-8"))
    tables = tuple(
        Table(t["title"], tuple(t["columns"]), tuple(tuple(row) for row in t["rows"]))
        for t in found["tables"]
    )
    claims = tuple(Claim(**c) for c in found["claims"])
    result = Result(
        found["name"],
        found["title"],
        tables,
        claims,
        tuple(found["notes"]),
        tuple(found["pictures"]),
        found["data"],
    )
    return result, found["setting"]


def as_markdown(result: Result, setting: dict[str, Any]) -> str:
    """One experiment."""
    return "\n".join([f"# {result.title}", "", sentence(setting), *_body(result)]) + "\n"


def _body(result: Result) -> list[str]:
    """Claims, tables, notes and pictures, as lines of Markdown."""
    lines = [""] if result.claims else []
    lines += [f"* **{c.text}**: {c.words()} ({c.evidence})" for c in result.claims]
    for table in result.tables:
        lines += ["", f"{table.title}:", "", markdown(table)]
    lines += [part for note in result.notes for part in ("", note)]
    lines += [part for name in result.pictures for part in ("", f"![{result.title}]({name})")]
    return lines


def all_as_markdown(found: Sequence[tuple[Result, dict[str, Any]]]) -> str:
    """All experiments; what was run is said again where it is something else than before."""
    lines, before = ["# Med-MoE: the paper's experiments"], ""
    for result, setting in found:
        lines += ["", f"## {result.title}"]
        if sentence(setting) != before:
            before = sentence(setting)
            lines += ["", before]
        lines += _body(result)
    return "\n".join(lines) + "\n"


def sentence(setting: dict[str, Any]) -> str:
    """What was run, in words."""
    data = (
        "phantom data (synthetic images; each seed draws its own)"
        if setting["phantoms"]
        else "the files of the config"
    )
    return (
        f"{setting['seeds']} seed(s), {data}, models {' and '.join(setting['models'])}. Seeds vary "
        + ("the data, " if setting["phantoms"] else "")
        + "the order of rows and the start of what is drawn at random; pretrained parts are the "
        f"same. Made by `{setting['command']}`."
    )


def write_page(workdir: Path, order: Sequence[str]) -> Path:
    """Puts all results of a run directory into `report.html`, and into `results/report.md`.

    Args:
      workdir: the run directory.
      order: names of experiments, as they should stand; others follow.

    Raises:
      FileNotFoundError: nothing has been run.
    """
    folder = workdir / FOLDER
    names = {path.stem: path for path in sorted(folder.glob("*.json"))}
    if not names:
        raise FileNotFoundError(f"{folder} holds no result: run an experiment first")
    ordered = [*(n for n in order if n in names), *(n for n in names if n not in order)]
    found = [load(names[name]) for name in ordered]
    parts = [_summary([result for result, _ in found], workdir)]
    parts += [_section(result, setting, folder) for result, setting in found]
    page = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width'><title>Med-MoE experiments</title>"
        f"<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )
    (folder / TEXT).write_text(all_as_markdown(found), encoding="utf-8")
    path = workdir / PAGE
    path.write_text(page, encoding="utf-8")
    return path


def cost(workdir: Path) -> tuple[int, float]:
    """Number of finished cells of a run directory, and their seconds."""
    every = [json.loads(path.read_text()) for path in (workdir / "cells").glob(f"*/{DONE}")]
    return len(every), sum(cell["seconds"] for cell in every)


def _summary(results: Sequence[Result], workdir: Path) -> str:
    cells, seconds = cost(workdir)
    rows = [
        f"<tr><td><a href='#{result.name}'>{_safe(result.name)}</a>: {_safe(claim.text)}</td>"
        f"<td class='v{claim.verdict}'>{_safe(claim.words())}</td></tr>"
        for result in results
        for claim in result.claims
    ]
    return (
        "<h1>Med-MoE: the paper's experiments</h1>"
        "<p>Verdicts come from 95 % intervals: a claim is reproduced where the interval of its "
        "difference lies above zero, not reproduced where it lies below, else undecided. Tiny "
        "models on phantom images say how the method behaves at their size. They cannot say how "
        "a full-size model reads medical images; an effect that is absent here may exist there. "
        "Not for clinical use.</p>"
        f"<p>{cells} cells (data, trained models, sets of answers), {seconds / 60:.0f} minutes of "
        f"computation.</p><table><tr><th>claim</th><th>verdict</th></tr>{''.join(rows)}</table>"
    )


def _section(result: Result, setting: dict[str, Any], folder: Path) -> str:
    parts = [f"<h2 id='{result.name}'>{_safe(result.title)}</h2>"]
    parts.append(f"<p class='note'>{_safe(sentence(setting))}</p><ul>")
    parts += [
        f"<li>{_safe(claim.text)}: <b class='v{claim.verdict}'>{_safe(claim.words())}</b> "
        f"({_safe(claim.evidence)})</li>"
        for claim in result.claims
    ]
    parts.append("</ul>")
    for name in result.pictures:
        picture = base64.b64encode((folder / name).read_bytes()).decode()
        parts.append(f"<img alt='{_safe(result.title)}' src='data:image/png;base64,{picture}'>")
    parts += [_table(table) for table in result.tables]
    parts += [f"<p class='note'>{_safe(note)}</p>" for note in result.notes]
    return "".join(parts)


def _table(table: Table) -> str:
    head = "".join(f"<th>{_safe(name)}</th>" for name in table.columns)
    rows = "".join(
        f"<tr>{''.join(f'<td>{_safe(cell)}</td>' for cell in row)}</tr>" for row in table.rows
    )
    return f"<table><caption>{_safe(table.title)}</caption><tr>{head}</tr>{rows}</table>"


def _safe(text: str) -> str:
    return html.escape(text, quote=True)
