"""LLaVA-Med: captions (alignment) and conversations (instruct) on figures of PubMed Central.

Layouts: the released JSON files with a folder of images (`prepare llava_med_images` fetches them),
and parquet files with the images inside, as mirrors have them. The alignment files spell the key
`conversatons`.

Many images are lost for good, so a row without its image is left out and counted, not an error.
What is left is written in the original format, too, as <name>_filter.json (Med-MoE trains on
files of that name), and the images that lack are listed in missing_images.txt.

The modality comes from the flags in `domain`, which only the instruct files have.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from medmoe_jax.config import MODALITIES
from medmoe_jax.data.prepare import layouts, tables
from medmoe_jax.data.prepare.texts import Reading, modality_name
from medmoe_jax.data.prepare.types import (
    Bad,
    DataSet,
    Event,
    LeftOut,
    Licence,
    Opened,
    Picture,
    Published,
    from_bytes,
    from_folder,
)
from medmoe_jax.data.problems import DataError, Problem
from medmoe_jax.data.sources import image_names
from medmoe_jax.data.templates import GPT, HUMAN, IMAGE_TOKEN

NAME = "llava_med"
TALK = ("conversations", "conversatons")
MISSING = "missing_images.txt"
LICENCE = Licence(
    "CC-BY-NC-4.0",
    "https://github.com/microsoft/LLaVA-Med",
    "Of the texts: research only, not for commercial use, OpenAI's terms apply. Each image has the "
    "licence of its article in PubMed Central.",
    "Li et al., LLaVA-Med: Training a Large Language-and-Vision Assistant for Biomedicine in One "
    "Day, NeurIPS 2023.",
)
RELEASED = {
    "llava_med_alignment_500k": 500_000,
    "llava_med_instruct_60k_inline_mention": 60_017,
    "llava_med_instruct_60k": 60_088,
    "llava_med_instruct_10k": 10_712,
}  # rows
LEFT_OUT = f"the image is missing ({MISSING})"
OPEN = "captions and conversations are OPEN"
BY_DOMAIN = "the modality that the flags in 'domain' agree on"
DISAGREE = "flags in 'domain' that disagree, or none: unknown"
LAYOUTS = """  a JSON file (llava_med_alignment_500k.json, llava_med_instruct_60k.json, ...)
    and its images by --images, or a folder that holds both
  a folder with parquet files of image, id, and conversations or conversatons"""


def read(sources: Sequence[Path], options: argparse.Namespace) -> Opened:
    """Recognises the layout; see `types.DataSet`."""
    source = layouts.only(sources)
    parquet = layouts.files(source, ".parquet")
    if parquet:
        return Opened(
            "parquet mirror",
            _mirror(parquet),
            (LICENCE,),
            (),
            tables.count(parquet),
            ("mirrors come in pieces, so no number of rows is known",),
        )
    found = []
    for path in layouts.files(source, ".json"):
        rows = layouts.read_json(path)
        if isinstance(rows, list) and any(isinstance(r, dict) and _talk(r) for r in rows):
            found.append((path, rows))
    if len(found) != 1:
        several = f"; several fit: {', '.join(p.name for p, _ in found)}" if found else ""
        raise layouts.unknown(source, f"one JSON list of conversations{several}\n{LAYOUTS}")
    path, rows = found[0]
    names = [_name(row) for row in rows]
    folder = layouts.image_folder(source, names, options.images)
    own = [name for name in RELEASED if path.stem == name]
    others = [name for name in RELEASED if name not in own]
    return Opened(
        "alignment JSON" if _alignment(path, rows) else "instruct JSON",
        _original(path, rows, folder, options.out),
        (LICENCE,),
        [Published(f"{name}.json", {"train": RELEASED[name]}) for name in (*own, *others)],
        len(rows),
    )


def _talk(row: dict[str, Any]) -> Any:
    return next((row[key] for key in TALK if row.get(key) is not None), None)


def _alignment(path: Path, rows: Sequence[Any]) -> bool:
    spelt = any(isinstance(row, dict) and TALK[1] in row for row in rows)
    return spelt or "alignment" in path.stem


def _name(row: Any) -> str:
    image = row.get("image") if isinstance(row, dict) else ""
    return image if isinstance(image, str) else ""


def _original(path: Path, rows: Sequence[Any], folder: Path, out: Path) -> Iterator[Event]:
    kind = "alignment" if _alignment(path, rows) else "instruct"
    lacking = _missing(rows, folder)
    kept = [row for row in rows if not set(_images(row)) & lacking]
    filtered = out / f"{path.stem.removesuffix('_filter')}_filter.json"
    filtered.write_text(json.dumps(kept))  # rows that cannot be used are in it, whatever they hold
    names = (name.encode(errors="backslashreplace") for name in sorted(lacking))
    (out / MISSING).write_bytes(b"".join(name + b"\n" for name in names))
    for place, row in enumerate(rows):
        if set(_images(row)) & lacking:
            yield LeftOut(LEFT_OUT, "train", "OPEN")
        else:
            pictures = [(lambda n=name: from_folder(folder, n)) for name in _images(row)]
            yield _event(row, str(path), place, kind, pictures)


def _images(row: Any) -> tuple[str, ...]:
    """Names of the row's images, none where they cannot be told (`_event` tells why)."""
    try:
        return image_names(row.get("image")) if isinstance(row, dict) else ()
    except DataError:
        return ()


def _missing(rows: Sequence[Any], folder: Path) -> set[str]:
    """Images without a file. One that points out of the folder is no such: its row is wrong."""
    found = set()
    for name in {name for row in rows for name in _images(row)}:
        inside = not Path(name).is_absolute() and ".." not in Path(name).parts
        if inside and not os.path.isfile(folder / name):  # noqa: PTH113, never raises
            found.add(name)
    return found


def _mirror(files: Sequence[Path]) -> Iterator[Event]:
    for file in files:
        for place, row in tables.rows(file, ("image",)):
            plain = {key: value for key, value in row.items() if key != "image"}
            if isinstance(plain.get("domain"), str):
                plain["domain"] = _json(plain["domain"])
            for key in TALK:
                if isinstance(plain.get(key), str):
                    plain[key] = _json(plain[key])
            kind = "instruct" if isinstance(plain.get("domain"), dict) else "alignment"
            yield _event(
                plain | {"image": "inside"},
                str(file),
                place,
                kind,
                [lambda row=row: from_bytes(tables.image_bytes(row["image"]))],
            )


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _event(row: Any, file: str, place: int, kind: str, pictures: Sequence[Any]) -> Event:
    try:
        if not isinstance(row, dict):
            raise DataError(f"a row must be an object, not {type(row).__name__}")
        image_names(row.get("image"))
        reading = Reading("train", NAME, LICENCE.name)
        if row.get(TALK[0]) is None and row.get(TALK[1]) is not None:
            reading.handled.append(f"{TALK[1]} read as {TALK[0]}")
        found: list[Picture] = [picture() for picture in pictures]
        turns = _turns(reading, _talk(row))
        spots = sum(text.count(IMAGE_TOKEN) for turn in turns for text in turn)
        if spots not in (0, len(found)):
            raise DataError(f"{spots} {IMAGE_TOKEN} in the text, but {len(found)} image(s)")
        reading.rules["answer_type"] = OPEN
        domain = row.get("domain")
        return reading.draft(
            file=file,
            place=place,
            id=row["id"] if row.get("id") not in (None, "") else f"row-{place}",
            turns=turns,
            answer_type="OPEN",
            modality=_modality(reading, domain) if isinstance(domain, dict) else "",
            question_type=kind,
            pictures=found,
            more={"domain": domain} if isinstance(domain, dict) else None,
        )
    except DataError as error:
        name = str(row.get("id") or "") if isinstance(row, dict) else ""
        return Bad(Problem(file, place, name, str(error)), "train")


def _turns(reading: Reading, talk: Any) -> list[tuple[str, str]]:
    """Questions and answers.

    Raises:
      DataError: no list of turns, human and gpt do not take turns, or a text is empty.
    """
    if not isinstance(talk, list) or not talk:
        raise DataError(f"no '{TALK[0]}' list (nor '{TALK[1]}')")
    if not all(isinstance(turn, dict) for turn in talk):
        raise DataError("a turn must be an object with 'from' and 'value'")
    if talk[0].get("from") == GPT:  # as LLaVA's trainer does
        reading.handled.append(f"a turn of '{GPT}' before the first question dropped")
        talk = talk[1:]
    if not talk or [turn.get("from") for turn in talk] != [HUMAN, GPT] * (len(talk) // 2):
        raise DataError(f"'{HUMAN}' and '{GPT}' must take turns, '{HUMAN}' first, '{GPT}' last")
    texts = [
        reading.text(turn.get("value"), ("question", "answer")[place % 2], lines=True)
        for place, turn in enumerate(talk)
    ]
    return list(zip(texts[::2], texts[1::2], strict=True))


def _modality(reading: Reading, domain: dict[str, Any]) -> str:
    names = {modality_name(flag) for flag, on in domain.items() if on}
    known = names & set(MODALITIES)
    reading.rules["modality"] = BY_DOMAIN if len(known) == 1 else DISAGREE
    return known.pop() if len(known) == 1 else ""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--images", type=Path, help="folder of the images, if it is not in the source"
    )


DATA_SET = DataSet(
    NAME, "LLaVA-Med: captions and conversations on figures", LAYOUTS, read, _add_arguments
)
