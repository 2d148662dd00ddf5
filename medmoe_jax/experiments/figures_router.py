"""Figures 3, 6 and 10: how well routers of some depth, or trained with few labels, tell modalities
apart."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medmoe_jax import losses
from medmoe_jax.analyse.routing import Trace
from medmoe_jax.config import MODALITIES, ConfigError
from medmoe_jax.experiments import figure_drawing as drawing
from medmoe_jax.experiments import looks
from medmoe_jax.experiments.cells import Cell, Store
from medmoe_jax.experiments.figure_tables import (
    IMAGE,
    NO_LABEL,
    TEXT,
    level_table,
    over_seeds,
    rows_as_json,
)
from medmoe_jax.experiments.result import Result, claim
from medmoe_jax.experiments.statistics import Scores, as_json, differences, levels
from medmoe_jax.experiments.study import Study
from medmoe_jax.metrics import MissingExtra

DEPTHS = (1, 2, 3)  # linear layers of a router
SAMPLE, IMAGE_TOKEN, TEXT_TOKEN, SILHOUETTE = (
    *("samples", "image tokens", "text tokens"),
    "silhouette x 100",
)
DEPTH_NOTE = (
    "The paper: routers of one or two layers separate the modalities clearly, with high accuracy "
    "and silhouette score; three layers bring no consistent improvement and may overfit. It prints "
    "the scores in its picture alone.",
    "Held-out rows of phase 2. A sample's modality is the router's posterior over image tokens and "
    "MoE layers; a token's is its first choice. The embedding of a sample is the mean of the "
    "router's scores over the same tokens and layers: the silhouette is taken there, and the "
    "picture shows its first two principal components (first seed).",
)


def router_scores(found: Trace, images: list[str]) -> Scores:
    """How well a router tells modalities apart, sample by sample.

    Returns:
      Columns: right sample; share of right image tokens and of right text tokens over the layers
      (NaN where there are none); silhouette coefficient, -1..1.

    Raises:
      MissingExtra: scikit-learn is absent.
      ConfigError: no sample has a label.
    """
    known = found.modality >= 0
    if not known.any():
        raise ConfigError(NO_LABEL.format("instruct_heldout"))
    modality, n = found.modality[known], int(known.sum())
    expert = losses.expert_of(modality, found.experts)
    right = (found.posterior[known].argmax(-1) == expert).astype(float)
    own = found.first[known][np.arange(n), :, :, expert]
    total = found.first[known].sum(-1)  # [n, Lm, K]
    columns = [right]
    for places in (IMAGE, TEXT):
        tokens = total[:, :, places].sum((1, 2))
        hits = own[:, :, places].sum((1, 2))
        columns.append(np.divide(hits, tokens, out=np.full(n, np.nan), where=tokens > 0))
    columns.append(silhouette(found.scores[known], modality))
    names = (SAMPLE, IMAGE_TOKEN, TEXT_TOKEN, SILHOUETTE)
    kept = [image for image, labelled in zip(images, known, strict=True) if labelled]
    return Scores(names, np.stack(columns, 1), kept)


def silhouette(points: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Silhouette coefficient of each point, f64[n]; zeros where there is one label only."""
    try:
        from sklearn.metrics import silhouette_samples
    except ImportError as error:
        raise MissingExtra(
            "The silhouette needs scikit-learn: pip install 'medmoe_jax[eval]'"
        ) from error
    if not 1 < len(np.unique(labels)) < len(labels):
        return np.zeros(len(labels))
    return np.asarray(silhouette_samples(points, labels))


def router_cell(study: Study, llm: str, seed: int, changes: dict[str, Any], mark: str) -> Cell:
    """A router phase with changes, looked at with held-out rows."""
    phase = study.router(llm, seed, changes, mark)
    return looks.cell(study, phase, llm, seed, "instruct_heldout")


def _title(depth: int) -> str:
    return f"{depth} layer{'s' if depth > 1 else ''}"


@dataclass(frozen=True)
class Depths:
    """Figures 3 and 10: routers of one, two and three layers."""

    llm: str
    title: str

    def cell(self, study: Study, depth: int, seed: int) -> Cell:
        """What a router of this depth does with held-out rows."""
        changes = {"model.moe.router_layers": depth}
        return router_cell(study, self.llm, seed, changes, f"-{depth}layers")

    def cells(self, study: Study) -> list[Cell]:
        """All depths and seeds."""
        return [self.cell(study, depth, seed) for depth in DEPTHS for seed in study.seeds]

    def result(self, name: str, study: Study, store: Store, folder: Path) -> Result:
        """Levels, differences of the deepest and the plain router, embeddings."""
        traces = {
            depth: [looks.read(store.place(self.cell(study, depth, s))) for s in study.seeds]
            for depth in DEPTHS
        }
        scores = {depth: [router_scores(*one) for one in each] for depth, each in traces.items()}
        found = {_title(depth): levels(each) for depth, each in scores.items()}
        apart = differences(scores[DEPTHS[-1]], scores[1], study.cfg.bootstrap)
        columns = (SAMPLE, IMAGE_TOKEN, TEXT_TOKEN, SILHOUETTE)
        claims = tuple(
            claim(f"three layers are better than one ({column})", apart[column], of_paper=False)
            for column in (SAMPLE, IMAGE_TOKEN, SILHOUETTE)
        )
        shown = {name: {c: row[c] for c in columns} for name, row in found.items()}
        picture = drawing.embeddings(
            folder / f"{name}.png", {_title(d): traces[d][0][0] for d in DEPTHS}, shown
        )
        return Result(
            name,
            self.title,
            (level_table(f"Right, {over_seeds(study)}", found, columns),),
            claims,
            DEPTH_NOTE,
            (picture.name,),
            {
                "levels": rows_as_json(found),
                "three minus one": {c: as_json(apart[c]) for c in columns},
                "embeddings": {
                    str(depth): [
                        {"modality": t.modality.tolist(), "scores": t.scores.tolist()}
                        for t, _ in each
                    ]
                    for depth, each in traces.items()
                },
            },
        )


@dataclass(frozen=True)
class Labels:
    """Figure 6: routers trained with fewer and fewer labels, for equally many steps."""

    title: str
    llm: str = "phi"

    def counts(self, study: Study) -> tuple[int, ...]:
        """Labels of a modality, ascending; the last is what the config of the router phase has."""
        full = study.cfg.phases(self.llm).router.data.labels_per_modality
        if not full:
            raise ConfigError("Figure 6 needs labels_per_modality in the router's config, not 0")
        return tuple(sorted({*(n for n in study.cfg.labels if n < full), full}))

    def cell(self, study: Study, labels: int, seed: int) -> Cell:
        """A router trained with so many labels, looked at with held-out rows."""
        run = study.cfg.phases(self.llm).router
        rows = len(MODALITIES) * run.data.labels_per_modality
        steps = run.optim.steps or -(-int(rows * run.optim.epochs) // run.optim.batch_size)
        changes = {"data.labels_per_modality": labels, "optim.steps": steps}
        return router_cell(study, self.llm, seed, changes, f"-{labels}labels")

    def cells(self, study: Study) -> list[Cell]:
        """All numbers of labels and seeds."""
        return [self.cell(study, n, seed) for n in self.counts(study) for seed in study.seeds]

    def result(self, name: str, study: Study, store: Store, folder: Path) -> Result:
        """Accuracy against the number of labels; what each number loses against all labels."""
        counts = self.counts(study)
        scores = {
            n: [
                router_scores(*looks.read(store.place(self.cell(study, n, s)))) for s in study.seeds
            ]
            for n in counts
        }
        found = {str(n): levels(each) for n, each in scores.items()}
        columns = (SAMPLE, IMAGE_TOKEN, TEXT_TOKEN, SILHOUETTE)
        most, apart, claims = counts[-1], {}, []
        for n in counts[:-1]:
            apart[n] = differences(scores[most], scores[n], study.cfg.bootstrap)
            for column in (SAMPLE, IMAGE_TOKEN):
                text = f"{most} labels of a modality are better than {n} ({column})"
                claims.append(claim(text, apart[n][column], of_paper=False))
        picture = drawing.curve(folder / f"{name}.png", found, (SAMPLE, IMAGE_TOKEN, TEXT_TOKEN))
        notes = (
            "The paper: the router needs few modality labels (it uses 200 of each); the figures are"
            " in its picture alone. Where more labels are not seen to help, fewer are enough.",
            "All routers are trained for as many steps, on held-out rows they are judged.",
        )
        return Result(
            name,
            self.title,
            (level_table(f"Right by labels of a modality, {over_seeds(study)}", found, columns),),
            tuple(claims),
            notes,
            (picture.name,),
            {
                "levels": rows_as_json(found),
                "all minus fewer": {
                    str(n): {c: as_json(row[c]) for c in columns} for n, row in apart.items()
                },
            },
        )
