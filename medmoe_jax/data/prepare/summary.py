"""What a preparation found and did: a JSON file for programs, a table for people."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import medmoe_jax
from medmoe_jax.data.prepare.types import SPLITS, Opened
from medmoe_jax.data.prepare.write import Result

LIBRARIES = ("Pillow", "numpy", "pyarrow", "pydicom", "nibabel")


def describe(result: Result, opened: Opened, identity: dict[str, Any], command: str) -> dict:
    """The content of summary.json."""
    comparison = result.comparison
    return {
        **identity,
        "layout": opened.layout,
        "remarks": list(opened.remarks),
        "licences": [dataclasses.asdict(licence) for licence in opened.licences],
        "rows": {
            split: {"total": result.rows[split]} | _types(result.rows, split)
            for split in SPLITS
            if result.rows[split]
        },
        "modalities": {name or "unknown": n for name, n in sorted(result.modalities.items())},
        "images": {"written": result.images_written, "kept": result.images_kept},
        "handled": dict(sorted(result.handled.items())),
        "left_out": dict(sorted(result.left_out.items())),
        "rules": dict(sorted(result.rules.items())),
        "problems": len(result.problems),
        "published": {
            "version": comparison.version,
            "counts": {key: number for key, number, _ in comparison.table},
            "differences": [
                {"rows": key, "published": number, "found": found}
                for key, number, found in comparison.differences
            ],
            "explanation": comparison.explained,
        },
        "command": command,
        "versions": _versions(),
    }


def _types(rows: Counter[str], split: str) -> dict[str, int]:
    kinds = {"OPEN": "OPEN", "CLOSED": "CLOSED", "": "no type"}
    return {name: rows[f"{split} {key}"] for key, name in kinds.items() if rows[f"{split} {key}"]}


def _versions() -> dict[str, str]:
    found = {"medmoe_jax": medmoe_jax.__version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_summary(content: dict, path: Path) -> None:
    """Writes summary.json."""
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def table(content: dict) -> str:
    """The summary as text for a terminal."""
    lines = [f"{content['name']}: {content['layout']}"]
    for licence in content["licences"]:
        lines.append(f"licence: {licence['name']}, {licence['link']}. {licence['note']}")
    lines += [f"note: {remark}" for remark in content["remarks"]]
    lines += ["", f"{'split':8s}{'rows':>8s}{'open':>8s}{'closed':>8s}{'no type':>9s}"]
    for split, number in content["rows"].items():
        kinds = [number.get(kind, 0) for kind in ("OPEN", "CLOSED", "no type")]
        lines.append(f"{split:8s}{number['total']:8d}{kinds[0]:8d}{kinds[1]:8d}{kinds[2]:9d}")
    lines.append("")
    lines += _block("modality", content["modalities"])
    lines += _block("images", content["images"])
    lines += _block("put right", content["handled"])
    lines += _block("given by rule", content["rules"])
    lines += _block("left out", content["left_out"])
    if content["problems"]:
        lines.append(f"{content['problems']} row(s) could not be used: problems.jsonl")
    published = content["published"]
    if published["differences"]:
        lines.append(f"DIFFERENT from the published numbers ({published['version']}):")
        lines.append(f"  {'rows':14s}{'published':>10s}{'found':>8s}")
        for line in published["differences"]:
            lines.append(f"  {line['rows']:14s}{line['published']:10d}{line['found']:8d}")
    elif published["version"]:
        lines.append(f"numbers agree with the published ones: {published['version']}")
    if published["explanation"]:
        lines.append(f"  {published['explanation']}")
    return "\n".join(lines)


def _block(title: str, numbers: dict[str, int]) -> list[str]:
    return [f"{title}:", *(f"{n:8d}  {name}" for name, n in numbers.items())] if numbers else []
