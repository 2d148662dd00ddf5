"""What a phase of training leaves behind about itself in its model folder: data with their
licences, settings and outcome (`ModelMeta.phases`). `card/` makes a model card of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from medmoe_jax.config import MODALITIES, RunConfig
from medmoe_jax.data.sources import Sample

SUMMARY = "summary.json"  # of a prepared folder: name and licences
RECORDS_LICENCE = "LICENSE"  # of a folder of records
LIBRARIES = ("medmoe_jax", "jax", "flax", "optax")
CHUNK = 2**20  # bytes read at once

Record = dict[str, Any]


def data_set(file: str | Path) -> Record:
    """What is known of the data set that a file belongs to.

    Args:
      file: a data file in a prepared folder, or a folder of records.

    Returns:
      name (None where unknown), licences (dicts with name, link, note, citation; None where
      unknown) and, where something is unknown, why.
    """
    file = Path(file)
    folder = file if file.is_dir() else file.parent
    for licence in (folder / RECORDS_LICENCE, folder.parent / RECORDS_LICENCE):
        if not file.is_file() and licence.is_file():
            text = licence.read_text(encoding="utf-8", errors="replace").strip()
            whole = {"name": text, "link": "", "note": "", "citation": ""}
            return {"name": folder.name, "licences": [whole]}
    summary = folder / SUMMARY
    try:
        content = json.loads(summary.read_text(encoding="utf-8"))
        licences = [
            {key: str(one.get(key, "")) for key in ("name", "link", "note", "citation")}
            for one in content["licences"]
        ]
        return {"name": str(content["name"]), "licences": licences}
    except FileNotFoundError:
        why = f"no {SUMMARY} beside the file"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"{SUMMARY} beside the file cannot be read: {error!r}"
    return {"name": None, "licences": None, "why": why}


def sizes(flat: Mapping[str, Any], trained: Sequence[str]) -> dict[str, int]:
    """How many numbers 'trained' and 'all' leaves have; `flat` is path -> array."""
    size = {path: int(leaf.size) for path, leaf in flat.items()}
    return {"trained": sum(size[path] for path in trained), "all": sum(size.values())}


def phase(
    cfg: RunConfig,
    *,
    steps: int,
    samples: Sequence[Sample],
    left_out: int,
    parameters: Mapping[str, int],
    outcome: Mapping[str, Any],
) -> Record:
    """The record of a phase that has ended, as JSON holds it.

    Args:
      cfg: of the run.
      steps: optimiser steps taken.
      samples: rows that were trained on.
      left_out: rows that could not be used.
      parameters: see `sizes`.
      outcome: what was measured at the end.
    """
    rows = Counter(sample.file for sample in samples)
    seen = Counter(sample.modality for sample in samples)
    modalities = {name: seen[i] for i, name in enumerate(MODALITIES) if seen[i]}
    if unknown := len(samples) - sum(modalities.values()):
        modalities["unknown"] = unknown
    devices = Counter(device.device_kind for device in jax.devices())
    return {
        "phase": cfg.phase,
        "init": cfg.init,
        "steps": steps,
        "rows": {"used": len(samples), "left_out": left_out, "modalities": modalities},
        "files": [
            {"file": str(file), "sha256": digest(Path(file)), "rows": rows[str(file)]}
            | data_set(file)
            for file in cfg.data.files
        ],
        "parameters": dict(parameters),
        "outcome": dict(outcome),
        "settings": json.loads(json.dumps(dataclasses.asdict(cfg))),
        "devices": " + ".join(f"{n} x {kind}" for kind, n in sorted(devices.items())),
        "versions": {name: _version(name) for name in LIBRARIES}
        | {"python": platform.python_version()},
    }


def digest(file: Path) -> str | None:
    """SHA-256 of a file; None of a folder."""
    if not file.is_file():
        return None
    found = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            found.update(chunk)
    return found.hexdigest()


def _version(name: str) -> str | None:
    if name == "medmoe_jax":
        import medmoe_jax

        return medmoe_jax.__version__  # also of a clone that is not installed
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
