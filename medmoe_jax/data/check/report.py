"""A check as Markdown with pictures, and as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from medmoe_jax.config import ViewConfig
from medmoe_jax.data import images
from medmoe_jax.data.check.findings import ERROR, WARNING, WHOLE, Finding
from medmoe_jax.data.check.leakage import Pair

SHOWN = 20  # findings of a kind in the Markdown; the JSON has all
PAIRS = 12  # pairs of pictures drawn
CELL = 200  # pixels
CHART = (720, 240)  # pixels
BARS = 48


@dataclass
class Result:
    """All that a check has found."""

    files: list[str]
    total: int  # rows looked at
    usable: int  # rows without an error of their own
    pictures: int  # image files looked at
    findings: list[Finding]
    balance: dict[str, dict[str, Counter[str]]]
    pairs: list[Pair]
    shared: dict[str, int]
    lengths: np.ndarray | None = None  # tokens of each row; None without a tokenizer
    padding: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)  # what was not checked

    def of(self, level: str) -> list[Finding]:
        """The findings of one level."""
        return [finding for finding in self.findings if finding.level == level]


def write(result: Result, folder: Path, view: ViewConfig | None = None) -> list[Path]:
    """Writes report.md, report.json and the pictures they name; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "report.md", folder / "report.json"]
    pictures = []
    if result.pairs:
        pictures.append("pairs.png")
        draw_pairs(result.pairs[:PAIRS], view).save(folder / pictures[-1])
    if result.lengths is not None and (result.lengths > 0).any():
        pictures.append("lengths.png")
        draw_lengths(result.lengths[result.lengths > 0]).save(folder / pictures[-1])
    files[0].write_text(markdown(result, pictures), encoding="utf-8")
    text = json.dumps(_plain(result), indent=1, ensure_ascii=False)
    files[1].write_text(text + "\n", encoding="utf-8")
    return files + [folder / name for name in pictures]


def markdown(result: Result, pictures: Sequence[str] = ()) -> str:
    """The report; `pictures` are those that exist beside it."""
    errors, warned = len(result.of(ERROR)), len(result.of(WARNING))
    lines = ["# Data check", ""]
    lines += [f"- {file}" for file in result.files]
    lines += ["", f"{result.total} rows, {result.usable} of them usable; {result.pictures} images."]
    lines += [f"**{errors} errors, {warned} warnings.**", ""]
    lines += [f"- {note}" for note in result.notes] + [""] * bool(result.notes)
    if result.findings:
        kinds = Counter((finding.level, finding.kind) for finding in result.findings)
        lines += ["| level | kind | number |", "|---|---|---|"]
        lines += [f"| {lv} | {kind} | {n} |" for (lv, kind), n in sorted(kinds.items())] + [""]
    for level, title in ((ERROR, "Errors"), (WARNING, "Warnings")):
        found: dict[str, list[Finding]] = {}
        for finding in result.of(level):
            found.setdefault(finding.kind, []).append(finding)
        lines += [f"## {title}", ""] if found else []
        for kind, those in sorted(found.items()):
            lines += [f"### {kind[0].upper()}{kind[1:]} ({len(those)})", ""]
            lines += [f"- {_one_line(str(finding))}" for finding in those[:SHOWN]]
            lines += [f"- ... and {len(those) - SHOWN} more"] * (len(those) > SHOWN) + [""]
    if result.shared:
        lines += ["## Pictures in two splits", "", "| splits | pictures |", "|---|---|"]
        lines += [f"| {key} | {n} |" for key, n in result.shared.items()] + [""]
    if "pairs.png" in pictures:
        lines += [
            "![pairs](pairs.png)",
            "",
            "Each pair: left the earlier split. 1.000: the same",
            "",
        ]
    lines += ["## Balance", ""]
    for name, splits in result.balance.items():
        values = sorted({value for counts in splits.values() for value in counts})
        lines += [f"| {name} | {' | '.join(splits)} |", "|---" * (1 + len(splits)) + "|"]
        for value in values:
            numbers = [_share(counts[value], counts.total()) for counts in splits.values()]
            lines.append(f"| {_one_line(value)} | {' | '.join(numbers)} |")
        lines.append("")
    lines += _length_lines(result, pictures)
    return "\n".join(lines).rstrip() + "\n"


def _length_lines(result: Result, pictures: Sequence[str]) -> list[str]:
    if result.lengths is None or result.padding is None or not (result.lengths > 0).any():
        return []
    known = result.lengths[result.lengths > 0]
    low, middle, high = np.percentile(known, [5, 50, 95])
    lines = ["## Lengths", "", "Tokens of a row, images expanded: "]
    lines[-1] += f"5 % {low:.0f}, median {middle:.0f}, 95 % {high:.0f}, most {known.max()}."
    lines += ["", "![lengths](lengths.png)", ""] if "lengths.png" in pictures else [""]
    if result.padding["rows"]:
        lines += ["| batches of up to | rows that fit |", "|---|---|"]
        lines += [f"| {size} | {n} |" for size, n in result.padding["rows"].items()] + [""]
        lines += ["| batching | padding |", "|---|---|"]
        for mode, share in result.padding["waste"].items():
            chosen = " (configured)" if mode == result.padding["batching"] else ""
            lines.append(f"| {mode}{chosen} | {share:.1%} |")
    return lines


def draw_pairs(pairs: Sequence[Pair], view: ViewConfig | None = None) -> Image.Image:
    """The two pictures of each pair side by side with their names below."""
    row = CELL + 36
    sheet = Image.new("RGB", (2 * CELL + 12, len(pairs) * row), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for place, pair in enumerate(pairs):
        for side, path in enumerate((pair.first, pair.second)):
            picture = images.open_image(path, view)
            picture.thumbnail((CELL, CELL))
            sheet.paste(picture, (side * (CELL + 12), place * row))
            pen.text((side * (CELL + 12), place * row + CELL + 2), path.name[:34], "black", font)
        text = f"similarity {pair.similarity:.3f}"
        pen.text((0, place * row + CELL + 16), text, "black", font)
    return sheet


def draw_lengths(lengths: np.ndarray) -> Image.Image:
    """Histogram of lengths in tokens."""
    counts, edges = np.histogram(lengths, BARS)
    chart = Image.new("RGB", CHART, "white")
    pen, font = ImageDraw.Draw(chart), ImageFont.load_default(12)
    wide, floor, top = (CHART[0] - 40) / BARS, CHART[1] - 24, 24
    for bar, count in enumerate(counts):
        height = round((floor - top) * count / counts.max())
        left = 20 + bar * wide
        pen.rectangle((left, floor - height, left + wide - 2, floor), fill=(70, 110, 160))
    pen.line((20, floor, CHART[0] - 20, floor), fill="black")
    for share in (0, 0.25, 0.5, 0.75, 1):
        value = edges[0] + share * (edges[-1] - edges[0])
        pen.text((20 + share * (CHART[0] - 60), floor + 4), f"{value:.0f}", "black", font)
    pen.text((20, 4), f"rows by tokens; tallest bar {counts.max()} rows", "black", font)
    return chart


def _plain(result: Result) -> dict[str, Any]:
    """For JSON; rows of findings about a whole file are null."""
    findings = [dataclasses.asdict(finding) for finding in result.findings]
    for finding in findings:
        finding["row"] = None if finding["row"] == WHOLE else finding["row"]
    return {
        "files": result.files,
        "rows": result.total,
        "usable": result.usable,
        "images": result.pictures,
        "errors": len(result.of(ERROR)),
        "warnings": len(result.of(WARNING)),
        "notes": result.notes,
        "findings": findings,
        "balance": {k: {s: dict(c) for s, c in v.items()} for k, v in result.balance.items()},
        "shared": result.shared,
        "pairs": [
            {"first": str(p.first), "second": str(p.second), "similarity": p.similarity}
            for p in result.pairs
        ],
        "lengths": None if result.lengths is None else result.lengths.tolist(),
        "padding": result.padding,
    }


def _share(count: int, total: int) -> str:
    return f"{count} ({count / total:.0%})" if total else "0"


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
