"""Cells that look at routers: what each sample's tokens chose, kept as arrays."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from medmoe_jax import checkpoint
from medmoe_jax import model as loaded
from medmoe_jax.analyse import inputs, routing
from medmoe_jax.analyse.routing import Trace
from medmoe_jax.config import MoeConfig
from medmoe_jax.data import sources
from medmoe_jax.data.image_store import ImageStore
from medmoe_jax.experiments.cells import Cell, Json
from medmoe_jax.experiments.study import Study

FILE = "trace.npz"
IMAGES = "images"  # name of the samples' images among the arrays


def look(
    model: Path,
    files: tuple[str, ...],
    image_folder: str,
    rows: int,
    batch_size: int,
    mixture: MoeConfig,
    out: Path,
) -> None:
    """Writes what a router does with rows to `out`/trace.npz.

    Args:
      model: folder of a MoE model, or of a dense one with a router beside it.
      files: of rows with answers.
      image_folder: "" = `images` beside each file.
      rows: so many, each modality alike; 0 = all.
      batch_size: rows of a forward pass.
      mixture: for a dense model, at which layers the router is read.
      out: folder.
    """
    ready = loaded.load(model)
    params = dict(ready.params)
    if ready.config.moe is None:
        params["router"] = checkpoint.load_model(model)[0]["router"]
    samples = inputs.draw(sources.read_samples(files, image_folder).samples, rows, seed=0)
    store = ImageStore(image_folder, ready.spec, keep=True)
    batches = inputs.batches((inputs.of_sample(ready, s, store) for s in samples), batch_size)
    found = routing.trace(params, ready.config, batches, ready.dtype, mixture)
    arrays = {f.name: np.asarray(getattr(found, f.name)) for f in dataclasses.fields(found)}
    names = np.array([",".join(s.images) or f"row {s.id}" for s in samples])
    np.savez_compressed(out / FILE, **arrays, **{IMAGES: names}, allow_pickle=False)


def read(folder: Path) -> tuple[Trace, list[str]]:
    """A trace, and the images of its samples."""
    with np.load(folder / FILE, allow_pickle=False) as found:
        arrays: dict[str, Any] = {f.name: found[f.name] for f in dataclasses.fields(Trace)}
        arrays["layers"] = tuple(arrays["layers"].tolist())
        return Trace(**arrays), found[IMAGES].tolist()


def cell(study: Study, model: Cell, llm: str, seed: int, role: str, rows: int = 0) -> Cell:
    """The cell that looks at a model's router with the files of a role.

    Args:
      study: whose data are used.
      model: a phase.
      llm: its language model.
      seed: of the data.
      role: of the files, see `StudyConfig.files`.
      rows: see `look`.
    """
    mixture = study.cfg.phases(llm).router.model.moe
    assert mixture is not None
    spec: Json = {
        "kind": "look",
        "files": study.content(role),
        "images": study.cfg.files.image_folder,
        "rows": rows,
        "mixture": [mixture.placement, mixture.top_k],
    }
    size = study.cfg.answers.batch_size

    def make(folder: Path, parents: list[Path]) -> None:
        data = parents[1] if study.phantoms else None
        files, images = study.paths(role, data), study.images(data)
        look(parents[0] / "model", files, images, rows, size, mixture, folder)

    return Cell(f"look-{model.name}", spec, (model, *study.data(seed)), make)
