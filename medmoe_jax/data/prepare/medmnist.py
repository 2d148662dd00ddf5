"""MedMNIST as questions with options: pneumonia, organs (coronal CT), skin and blood cells, at 28,
64, 128 or 224 pixels (Yang et al. 2023).

The npz files are read as they are distributed, with numpy alone. They hold no names of classes:
CLASSES has them in the order of the labels, as `medmnist/info.py` does.

The Med-MoE paper trains on such questions, but states neither the prompts nor the size that it
used. The question of a set is in SETS, the options follow in the order of the labels, and the row
has them as `options` and `label`, which `predict --score-options` and `evaluate` read.
"""

from __future__ import annotations

import argparse
import io
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from medmoe_jax.data.prepare import layouts
from medmoe_jax.data.prepare.texts import Reading
from medmoe_jax.data.prepare.types import (
    SPLITS,
    Bad,
    DataSet,
    Event,
    Licence,
    Opened,
    Picture,
    Published,
)
from medmoe_jax.data.problems import DataError, Problem

NAME = "medmnist"
SIZES = (28, 64, 128, 224)  # pixels
CITATION = (
    "Yang et al., MedMNIST v2: A large-scale lightweight benchmark for 2D and 3D biomedical image "
    "classification, Scientific Data 2023."
)
PAGE = "https://medmnist.com"
BY = Licence("CC-BY-4.0", PAGE, "As MedMNIST states it for this set; name the authors.", CITATION)
BY_NC = Licence(
    "CC-BY-NC-4.0", PAGE, "As MedMNIST states it for DermaMNIST; not for commercial use.", CITATION
)
BY_SET = "the modality of the whole data set"
NO_LABEL = "{} is none of the router's modalities: no label"
PROMPT = "a prompt of medmoe_jax: the paper does not state its own"
ANSWER_TYPE = "a choice among options is CLOSED"
LAYOUTS = """  one file of MedMNIST: pneumoniamnist.npz, organcmnist_224.npz, dermamnist_64.npz,
    bloodmnist_128.npz, ..., or a folder that holds it (--set and --size choose among several)"""
_FILE = re.compile(r"(?P<flag>[a-z]+mnist)(_(?P<size>64|128|224))?\.npz")


@dataclass(frozen=True)
class Set:
    """One of the data sets."""

    question: str
    classes: tuple[str, ...]  # in the order of the labels
    counts: tuple[int, int, int]  # train, val, test
    colour: bool
    modality: str  # '' where it is none of the router's
    rule: str
    licence: Licence


SETS = {
    "pneumoniamnist": Set(
        "What does this chest X-ray show?",
        ("normal", "pneumonia"),
        (4708, 524, 624),
        False,
        "X-ray",
        BY_SET,
        BY,
    ),
    "organcmnist": Set(
        "Which organ is in the centre of this coronal CT image?",
        (
            "bladder",
            "femur-left",
            "femur-right",
            "heart",
            "kidney-left",
            "kidney-right",
            "liver",
            "lung-left",
            "lung-right",
            "pancreas",
            "spleen",
        ),
        (12975, 2392, 8216),
        False,
        "CT",
        BY_SET,
        BY,
    ),
    "dermamnist": Set(
        "Which skin lesion does this dermatoscopic image show?",
        (
            "actinic keratoses and intraepithelial carcinoma",
            "basal cell carcinoma",
            "benign keratosis-like lesions",
            "dermatofibroma",
            "melanoma",
            "melanocytic nevi",
            "vascular lesions",
        ),
        (7007, 1003, 2005),
        True,
        "",
        NO_LABEL.format("dermatoscopy"),
        BY_NC,
    ),
    "bloodmnist": Set(
        "Which blood cell does this microscopic image show?",
        (
            "basophil",
            "eosinophil",
            "erythroblast",
            "immature granulocytes(myelocytes, metamyelocytes and promyelocytes)",
            "lymphocyte",
            "monocyte",
            "neutrophil",
            "platelet",
        ),
        (11959, 1712, 3421),
        True,
        "",
        NO_LABEL.format("microscopy of blood cells"),
        BY,
    ),
}


def prompt(chosen: Set) -> str:
    """The question with its options."""
    return f"{chosen.question}\nChoose one of these options: {'; '.join(chosen.classes)}."


def read(sources: Sequence[Path], options: argparse.Namespace) -> Opened:
    """Recognises the file; see `types.DataSet`."""
    file, flag, size = _choose(layouts.only(sources), options.set, options.size)
    labels = {split: _labels(file, split) for split in SPLITS}
    chosen = SETS[flag]
    published: dict[str, int] = dict(zip(SPLITS, chosen.counts, strict=True))
    return Opened(
        f"{flag} at {size} pixels" if size else flag,
        _events(file, flag, size, labels),
        (chosen.licence,),
        (Published(f"MedMNIST's {flag}", published),),
        sum(map(len, labels.values())),
        ("the prompts of the Med-MoE paper and its image size are unpublished; these are ours",),
    )


def _choose(source: Path, flag: str | None, size: int | None) -> tuple[Path, str, int]:
    """File, its set and its size (0 where the name tells none)."""
    found = []
    for path in layouts.files(source, ".npz"):
        match = _FILE.fullmatch(path.name.lower())
        if match and match["flag"] in SETS:
            found.append((path, match["flag"], int(match["size"] or SIZES[0])))
        elif flag and match is None and path == source:  # a file of another name
            found.append((path, flag, 0))
    fitting = [f for f in found if flag in (None, f[1]) and size in (None, f[2], f[2] or size)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = ", ".join(path.name for path, _, _ in fitting)
        raise DataError(f"{source} has several files that fit: {names}; choose by --set and --size")
    raise layouts.unknown(source, f"one npz file that fits --set and --size\n{LAYOUTS}")


def _array(file: Path, key: str) -> np.ndarray:
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            if key not in arrays.files:
                raise DataError(f"{file} has no array {key!r}; it has {', '.join(arrays.files)}")
            return arrays[key]
    except DataError:
        raise
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{file}, array {key!r}, cannot be read: {error}") from error


def _labels(file: Path, split: str) -> np.ndarray:
    """int[N]; the files have [N, 1]."""
    labels = _array(file, f"{split}_labels")
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape not in (
        labels.shape[:1],
        (*labels.shape[:1], 1),
    ):
        raise DataError(
            f"{file}: {split}_labels must be integers [N, 1], not {labels.dtype} "
            f"{list(labels.shape)}"
        )
    return labels.reshape(-1)


def _images(file: Path, flag: str, split: str, size: int, number: int) -> np.ndarray:
    """uint8[N, S, S], or [N, S, S, 3] of a set in colour."""
    images = _array(file, f"{split}_images")
    if images.shape[3:] == (1,):  # a grey channel of its own
        images = images[..., 0]
    side = images.shape[1] if images.ndim > 1 else 0
    shape = (number, side, side, 3) if SETS[flag].colour else (number, side, side)
    if images.dtype != np.uint8 or images.shape != shape or side not in SIZES:
        raise DataError(
            f"{file}: {split}_images must be uint8 {[number, 'S', 'S', *shape[3:]]} with S one of "
            f"{', '.join(map(str, SIZES))}, not {images.dtype} {list(images.shape)}"
        )
    if size not in (0, side):
        raise DataError(f"{file} has images of {side} pixels, but its name says {size}")
    return images


def _events(file: Path, flag: str, size: int, labels: dict[str, np.ndarray]) -> Iterator[Event]:
    chosen = SETS[flag]
    question = prompt(chosen)
    rules = {"modality": chosen.rule, "answer_type": ANSWER_TYPE, "conversations": PROMPT}
    for split in SPLITS:
        images = _images(file, flag, split, size, len(labels[split]))
        folder = f"{flag}_{images.shape[1]}/{split}"
        for place, label in enumerate(labels[split].tolist()):
            name = f"{flag}_{split}_{place}"
            if not 0 <= label < len(chosen.classes):
                fault = f"label {label} is none of 0 to {len(chosen.classes) - 1}"
                yield Bad(Problem(f"{file}:{split}", place, name, fault), split)
                continue
            reading = Reading(split, flag, chosen.licence.name, rules=dict(rules))
            yield reading.draft(
                file=f"{file.name}:{split}",
                place=place,
                id=name,
                turns=[(question, chosen.classes[label])],
                answer_type="CLOSED",
                modality=chosen.modality,
                question_type="classification",
                pictures=[_picture(images[place], f"{folder}/{place:05d}.png")],
                more={"task": flag, "options": list(chosen.classes), "label": label},
            )


def _picture(pixels: np.ndarray, name: str) -> Picture:
    def encode() -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        return buffer.getvalue()

    return Picture(name, read=encode)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--set", choices=sorted(SETS), help="which of several files")
    parser.add_argument("--size", type=int, choices=SIZES, help="which of several files, pixels")


DATA_SET = DataSet(
    NAME,
    "MedMNIST: pneumonia, organc, derma or blood, as questions with options",
    LAYOUTS,
    read,
    _add_arguments,
)
