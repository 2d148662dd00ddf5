"""Figures 4, 5 and 11: which experts speak for image and text tokens, and for which modality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medmoe_jax.analyse import routing
from medmoe_jax.analyse.routing import Trace
from medmoe_jax.config import MODALITIES, ConfigError
from medmoe_jax.experiments import figure_drawing as drawing
from medmoe_jax.experiments import looks
from medmoe_jax.experiments.cells import Cell, Store
from medmoe_jax.experiments.figure_tables import (
    IMAGE,
    NO_LABEL,
    TEXT,
    Rows,
    level_table,
    over_seeds,
    rows_as_json,
)
from medmoe_jax.experiments.result import Claim, Result, Table, claim
from medmoe_jax.experiments.statistics import Scores, as_json, differences, level, levels
from medmoe_jax.experiments.study import Study

SAMPLES = 200  # of the tests, that Figures 4, 5 and 11 look at
ROUTERS = {"moe": "pretrained router", "learned": "learned router"}  # variants of Figure 5
SHARE_NOTE = (
    "The paper, of MRI: expert 1 handles mainly text, expert 2 text and images alike, expert 3 "
    "images, expert 4 text; it prints no figures. Its experts have no names; here expert e is the "
    "one whose modality the router was trained on.",
    f"First choices over all MoE layers of {SAMPLES} test rows, each modality alike, answers "
    "included; the words of the template count as text.",
)


def experts_cell(study: Study, variant: str, seed: int, llm: str = "phi") -> Cell:
    """What the tokens of some test rows choose in a model of phase 3."""
    return looks.cell(study, study.stage3(llm, seed, variant), llm, seed, "tests", SAMPLES)


def _of(found: Trace, modality: int) -> np.ndarray:
    """First choices of the samples of a modality: [n, Lm, K, E]. Raises ConfigError: none."""
    rows = found.modality == modality
    if not rows.any():
        raise ConfigError(f"{NO_LABEL.format('tests')}: nothing is {MODALITIES[modality]}")
    return found.first[rows]


@dataclass(frozen=True)
class Shares:
    """Figures 4 and 11: how many image and text tokens each expert takes, by modality."""

    title: str
    modalities: tuple[str, ...]

    def cells(self, study: Study) -> list[Cell]:
        """All seeds."""
        return [experts_cell(study, "moe", seed) for seed in study.seeds]

    def result(self, name: str, study: Study, store: Store, folder: Path) -> Result:
        """Shares of tokens, and whether the modality's expert prefers its images' tokens."""
        seeds = [looks.read(store.place(cell)) for cell in self.cells(study)]
        n_experts = seeds[0][0].experts
        experts = routing.names(n_experts)
        found: Rows = {}
        claims: list[Claim] = []
        for modality in map(MODALITIES.index, self.modalities):
            each = {}
            for kind, places in (("image", IMAGE), ("text", TEXT)):
                counts = [_of(t, modality)[:, :, places].sum((0, 1, 2)) for t, _ in seeds]
                each[kind] = 100 * np.stack([routing.share(c) for c in counts])  # [seeds, E]
            for e, expert in enumerate(experts):
                found[f"{MODALITIES[modality]}: expert {expert}"] = {
                    "of image tokens": level(each["image"][:, e].tolist()),
                    "of text tokens": level(each["text"][:, e].tolist()),
                    "image less text": level((each["image"] - each["text"])[:, e].tolist()),
                }
            if n_experts == len(MODALITIES):
                claims.append(self._preference(modality, seeds, study))
        columns = ("of image tokens", "of text tokens", "image less text")
        picture = drawing.shares(folder / f"{name}.png", found, self.modalities, experts)
        return Result(
            name,
            self.title,
            (level_table(f"Tokens that an expert takes, {over_seeds(study)}", found, columns),),
            tuple(claims),
            SHARE_NOTE,
            (picture.name,),
            {"levels": rows_as_json(found)},
        )

    def _preference(
        self, modality: int, seeds: Sequence[tuple[Trace, list[str]]], study: Study
    ) -> Claim:
        own = []
        for trace, images in seeds:
            rows = trace.modality == modality
            shares = [
                routing.share(trace.first[rows][:, :, places].sum((1, 2)))[:, modality]
                for places in (IMAGE, TEXT)
            ]
            kept = [image for image, here in zip(images, rows, strict=True) if here]
            own.append([Scores(("share",), s[:, None], kept) for s in shares])
        apart = differences([one for one, _ in own], [two for _, two in own], study.cfg.bootstrap)[
            "share"
        ]
        name = MODALITIES[modality]
        text = f"the {name} expert takes more of the image tokens of {name} than of its text tokens"
        return claim(text, apart, of_paper=False)


@dataclass(frozen=True)
class Leaders:
    """Figure 5: the busiest expert of each sample at each layer, with a pretrained and with a
    learned router."""

    title: str

    def cells(self, study: Study) -> list[Cell]:
        """Both routers, all seeds."""
        return [experts_cell(study, v, seed) for v in ROUTERS for seed in study.seeds]

    def result(self, name: str, study: Study, store: Store, folder: Path) -> Result:
        """How far the busiest expert tells the modality, and by which expert it is told."""
        traces = {
            title: [looks.read(store.place(experts_cell(study, v, s))) for s in study.seeds]
            for v, title in ROUTERS.items()
        }
        scores = {title: [told(*one) for one in each] for title, each in traces.items()}
        first, second = ROUTERS.values()
        apart = differences(scores[first], scores[second], study.cfg.bootstrap)["told"]
        found = {
            title: {
                "modality told by the busiest expert": levels(scores[title])["told"],
                "information, % of the most": level([_information(t) for t, _ in each]),
            }
            for title, each in traces.items()
        }
        table = level_table(over_seeds(study), found, tuple(found[first]))
        rows = _busiest({title: each[0][0] for title, each in traces.items()})
        return Result(
            name,
            self.title,
            (table, Table("Busiest expert of most samples, first seed", *rows)),
            (
                claim(
                    "with a pretrained router the experts specialise in modalities, with a learned"
                    " one they do not",
                    apart,
                ),
            ),
            (
                "The paper: its router gives experts 1 and 2 to CT, 2 and 3 to MRI, 4 to pathology "
                "and 1 to X-rays; with a learned router the patterns are fused.",
                f"{SAMPLES} test rows, each modality alike. Told: every busiest expert stands for "
                "the modality that it is most often the busiest of, at its layer; 25 % is what one "
                "expert for all gives. Information: of modality and busiest expert, mean over "
                "layers; 100 % where each modality has experts of its own.",
            ),
            (
                drawing.leaders(
                    folder / f"{name}.png", {title: each[0][0] for title, each in traces.items()}
                ).name,
            ),
            {"levels": rows_as_json(found), "difference": as_json(apart)},
        )


def told(found: Trace, images: list[str]) -> Scores:
    """Whether the busiest expert tells a sample's modality, mean over layers: column "told"."""
    known = found.modality >= 0
    if not known.any():
        raise ConfigError(NO_LABEL.format("tests"))
    modality, busiest = found.modality[known], routing.leaders(found)[known]
    right = np.zeros(busiest.shape)
    for layer in range(busiest.shape[1]):
        counts = _counts(modality, busiest[:, layer], found.experts)
        right[:, layer] = counts.argmax(0)[busiest[:, layer]] == modality
    kept = [image for image, labelled in zip(images, known, strict=True) if labelled]
    return Scores(("told",), right.mean(1)[:, None], kept)


def _counts(modality: np.ndarray, expert: np.ndarray, n_experts: int) -> np.ndarray:
    """Samples by modality and busiest expert: i64[M, E]."""
    counts = np.zeros((len(MODALITIES), n_experts), np.int64)
    np.add.at(counts, (modality, expert), 1)
    return counts


def _information(found: Trace) -> float:
    """Mutual information of modality and busiest expert, mean over layers, percent of the most."""
    known = found.modality >= 0
    modality, busiest = found.modality[known], routing.leaders(found)[known]
    each = [
        routing.information(_counts(modality, busiest[:, layer], found.experts))
        for layer in range(busiest.shape[1])
    ]
    most = routing.information(_counts(modality, modality, len(MODALITIES)))
    return 100 * float(np.mean(each)) / most if most else 0.0


def _busiest(traces: dict[str, Trace]) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Columns and rows: router and modality against layers, with the share of samples."""
    layers = next(iter(traces.values())).layers
    rows = []
    for title, found in traces.items():
        busiest = routing.leaders(found)
        for m, modality in enumerate(MODALITIES):
            here = busiest[found.modality == m]
            counts = [np.bincount(column, minlength=found.experts) for column in here.T]
            cells = [f"{c.argmax()} ({100 * c.max() / max(c.sum(), 1):.0f} %)" for c in counts]
            rows.append((f"{title}, {modality}", *cells))
    return ("", *(f"layer {n}" for n in layers)), tuple(rows)
