"""Mixtures of prepared folders: the paper's for phase 3, its scaling run, and the router's set.

    stage3    train of VQA-RAD, SLAKE, PathVQA (27K), PneumoniaMNIST and OrganCMNIST (17K): 44K rows
    scaling   train of the four MedMNIST sets, 36.7K rows of classification (Table 11)
    router    so many rows of each modality (200 in the paper), drawn by --seed from the train rows
              of what is given: LLaVA-Med's instruct rows, or SLAKE and PathVQA

Which of the two the authors drew the router's rows from is not published.

A mixture is a prepared folder itself. Ids and images get the name of their data set in front, so
that they stay different; images are copied, as links do not work on all file systems.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medmoe_jax.config import MODALITIES, natural
from medmoe_jax.data.images import find_image
from medmoe_jax.data.prepare import folders
from medmoe_jax.data.prepare.types import (
    Bad,
    DataSet,
    Draft,
    Event,
    Licence,
    Opened,
    Picture,
    Published,
)
from medmoe_jax.data.problems import DataError, Problem
from medmoe_jax.data.sources import image_names

NAME = "mix"
PER_MODALITY = 200  # paper, section 2
VQA = {"vqa_rad": 1797, "slake": 4919, "path_vqa": 19654}  # rows of train, SLAKE in English
CLASSES = {"pneumoniamnist": 4708, "organcmnist": 12975}
MORE_CLASSES = {"dermamnist": 7007, "bloodmnist": 11959}
LAYOUTS = """  prepared folders, in any number; each part of the mixture must be in one of them:
    stage3:  vqa_rad slake path_vqa pneumoniamnist organcmnist
    scaling: pneumoniamnist organcmnist dermamnist bloodmnist
    router:  any with modalities, such as llava_med (instruct), or slake and path_vqa"""


@dataclass(frozen=True)
class Part:
    """A row that was chosen."""

    folder: Path
    place: int
    row: dict[str, Any]


RECIPES = {
    "stage3": ("phase 3, 44K in the paper", VQA | CLASSES),
    "scaling": ("the scaling run, 36.7K in the paper", CLASSES | MORE_CLASSES),
}


def read(sources: Sequence[Path], options: argparse.Namespace) -> Opened:
    """Chooses the rows; see `types.DataSet`."""
    found = [
        Part(folder, place, row)
        for folder in sources
        for place, row in folders.rows(folder)
        if row["split"] == "train"
    ]
    if options.recipe == "router":
        chosen = draw(found, options.per_modality, options.seed)
        published = [
            Published(
                f"{options.per_modality} of each modality",
                {"train": options.per_modality * len(MODALITIES)},
            )
        ]
    else:
        title, numbers = RECIPES[options.recipe]
        chosen = _parts(found, tuple(numbers), options)
        published = [_expected(title, numbers, chosen)]
    rows = Counter(part.row["source"] for part in chosen)
    used = [folder for folder in sources if any(part.folder == folder for part in chosen)]
    return Opened(
        f"{options.recipe}" + f", seed {options.seed}" * (options.recipe == "router"),
        _events(chosen),
        _licences(used),
        published,
        len(chosen),
        (" + ".join(f"{name} {number}" for name, number in rows.items()),),
    )


def draw(found: Sequence[Part], number: int, seed: int) -> list[Part]:
    """So many rows with each modality, in their order.

    Raises:
      DataError: there are fewer of some; the message names them.
    """
    if number < 1:
        raise DataError(f"--per-modality is {number}; 1 is the least")
    places = {
        name: [i for i, part in enumerate(found) if part.row.get("modality") == name]
        for name in MODALITIES
    }
    few = {name: len(at) for name, at in places.items() if len(at) < number}
    if few:
        lacking = ", ".join(f"{name} {have}" for name, have in few.items())
        raise DataError(
            f"too few train rows with a modality ({lacking}; needed: {number} each); give more "
            "folders by --source, or lower --per-modality"
        )
    rng = np.random.default_rng(seed)
    chosen = [rng.choice(at, number, replace=False) for at in places.values()]
    return [found[i] for i in sorted(np.concatenate(chosen).tolist())]


def _parts(found: Sequence[Part], names: Sequence[str], options: argparse.Namespace) -> list[Part]:
    where: dict[str, set[Path]] = {}
    for part in found:
        where.setdefault(part.row["source"], set()).add(part.folder)
    lacking = [name for name in names if name not in where]
    if lacking and not options.allow_counts:
        raise DataError(
            f"no --source has train rows of {', '.join(lacking)}; prepare them, or take what is "
            "there with --allow-counts"
        )
    extra = [name for name in where if name not in names]
    if extra:
        raise DataError(
            f"{', '.join(extra)} is no part of {options.recipe!r} ({', '.join(names)}); leave it "
            "out of --source"
        )
    for name, places in where.items():
        if len(places) > 1:
            several = ", ".join(sorted(map(str, places)))
            raise DataError(f"{name} is in several folders ({several}); give one of them")
    return [part for name in names for part in found if part.row["source"] == name]


def _expected(title: str, numbers: Mapping[str, int], chosen: Sequence[Part]) -> Published:
    """Rows that the mixture should have. Of a part whose source was found to be a published version
    (a mirror, say, or one with a bad row less) those that it has, else those of the original."""
    have = Counter(part.row["source"] for part in chosen)
    agree = {part.row["source"] for part in chosen if folders.train_agrees(part.folder)}
    wanted = {name: have[name] if name in agree else numbers[name] for name in numbers}
    terms = " + ".join(f"{name} {number}" for name, number in wanted.items())
    return Published(f"{title}: {terms}", {"train": sum(wanted.values())})


def _licences(used: Sequence[Path]) -> list[Licence]:
    return list(dict.fromkeys(licence for folder in used for licence in folders.licences(folder)))


def _events(chosen: Sequence[Part]) -> Iterator[Event]:
    for part in chosen:
        file = str(part.folder / folders.MANIFEST)
        row, name = part.row, part.row["source"]
        try:
            pictures = [
                Picture(f"{name}/{image}", file=find_image(part.folder / folders.IMAGES, image))
                for image in image_names(row.get("image"))
            ]
        except DataError as error:
            yield Bad(Problem(file, part.place, str(row["id"]), str(error)), row["split"])
            continue
        mixed = {key: value for key, value in row.items() if key != "image"}
        mixed |= {"id": f"{name}-{row['id']}", "rules": row.get("rules") or {}}
        yield Draft(file, part.place, mixed, tuple(pictures))


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--recipe", choices=(*RECIPES, "router"), required=True, help="what to mix, see above")
    add("--seed", type=natural, default=0, help="of the rows that router draws")
    add("--per-modality", type=int, default=PER_MODALITY, help="rows that router draws")


DATA_SET = DataSet(
    NAME,
    "Mixtures of prepared folders: phase 3, scaling run, router",
    LAYOUTS,
    read,
    _add_arguments,
)
