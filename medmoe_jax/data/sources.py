"""LLaVA-Med and Med-MoE JSON files -> `Sample`s; rows that cannot be used -> `Problem`s.

What is read of a row (everything else is ignored):

* `conversations` (or the misspelt `conversatons`): [{'from': 'human' | 'gpt', 'value': text}, ...],
  human first (a leading gpt turn is dropped), in turn, gpt last. Numbers are taken as text.
* `image`: a path relative to the image folder, a list of paths, or absent / null / '' for text.
  There is one `<image>` a path, in order. A row with images but no `<image>` gets them before its
  first question, as prompts at inference have them; the official code would train such a row
  without ever showing the image.
* `answer_type`: see ANSWER_TYPES. `modality`: see MODALITY_NAMES; else the flags in `domain`
  (LLaVA-Med): one modality if all flags that are set agree, none otherwise.
* `id` (or `qid`, `question_id`), `question_type` (or `content_type`).
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from medmoe_jax.config import MODALITIES
from medmoe_jax.data.images import find_image
from medmoe_jax.data.problems import DataError, Problem, settle
from medmoe_jax.data.records import Records, is_records
from medmoe_jax.data.templates import GPT, HUMAN, IMAGE_TOKEN, Turn, from_human

OPEN, CLOSED = "open", "closed"
ANSWER_TYPES = {
    "open": OPEN,
    "other": OPEN,
    "number": OPEN,
    "close": CLOSED,
    "closed": CLOSED,
    "yes/no": CLOSED,
    "yes": CLOSED,
    "no": CLOSED,
}  # lower case, outer white space removed
MODALITY_NAMES = {
    "ct": 0,
    "ctscan": 0,
    "mr": 1,
    "mri": 1,
    "xray": 2,
    "chestxray": 2,
    "pathology": 3,
    "histology": 3,
    "histopathology": 3,
    "gross": 3,
}  # lower case, letters only -> index in config.MODALITIES
UNKNOWN = -1  # modality index of a row without a usable label


@dataclass(frozen=True)
class Sample:
    """One usable row."""

    id: str
    images: tuple[str, ...]  # relative to the image folder; empty = text only
    turns: tuple[Turn, ...]  # (role, text), human first, gpt last
    answer_type: str  # OPEN | CLOSED | '' where the row does not tell
    modality: int  # index in config.MODALITIES, UNKNOWN without a label
    question_type: str
    file: str
    row: int  # 0-based position in the file


@dataclass
class Loaded:
    """What a set of files holds."""

    samples: list[Sample]
    problems: list[Problem]
    notes: Counter[str] = field(default_factory=Counter)  # what was read in a lenient way: times

    @property
    def total(self) -> int:
        """Rows looked at."""
        return len(self.samples) + len(self.problems)


def read_rows(files: Sequence[str | Path], image_folder: str | Path) -> Loaded:
    """Reads all rows of all files, in order; what cannot be used becomes a problem.

    Args:
      files: .json (a list) or .jsonl (a row a line), or folders with records (`data/records.py`),
        which hold their images.
      image_folder: image paths are relative to it (see `image_folder_of`); the images' existence
        is checked.

    Raises:
      DataError: no files, a file that cannot be read, or no rows.
    """
    if not files:
        raise DataError("no data files; name them with --config.data.files")
    loaded = Loaded([], [])
    checked: dict[tuple[Path, str], str] = {}  # image -> what is wrong with it, '' = nothing
    for file in files:
        if is_records(file):
            _read_record_folder(file, loaded)
            continue
        folder = image_folder_of(file, image_folder)
        for row, record, fault in records(Path(file)):
            try:
                if fault:
                    raise DataError(fault)
                sample = _sample(record, str(file), row, loaded.notes)
                for image in sample.images:
                    if (folder, image) not in checked:
                        checked[folder, image] = _image_fault(folder, image)
                    if checked[folder, image]:
                        raise DataError(checked[folder, image])
                loaded.samples.append(sample)
            except DataError as error:
                name = _first(record, ("id", "qid", "question_id"))
                loaded.problems.append(Problem(str(file), row, name, str(error)))
    if not loaded.total:
        raise DataError(f"no rows in {', '.join(map(str, files))}")
    return loaded


def _read_record_folder(file: str | Path, loaded: Loaded) -> None:
    for row, record in enumerate(Records(file)):
        try:
            sample = _sample(record.row, str(file), row, loaded.notes)
            if len(record.images) != len(sample.images):
                raise DataError(f"{len(record.images)} images are in the record, not those named")
            loaded.samples.append(sample)
        except DataError as error:
            name = _first(record.row, ("id", "qid", "question_id"))
            loaded.problems.append(Problem(str(file), row, name, str(error)))


def image_folder_of(file: str | Path, image_folder: str | Path = "") -> Path:
    """Where the images of a data file lie: `image_folder`, or, where that is '', the folder
    `images` beside the file, as in prepared sets, or else the current folder."""
    beside = Path(file).parent / "images"
    return beside if not str(image_folder) and beside.is_dir() else Path(image_folder)


def read_samples(
    files: Sequence[str | Path], image_folder: str | Path, on_error: str = "error"
) -> Loaded:
    """`read_rows` with the `on_error` rule ('error' or 'skip') applied.

    Raises:
      DataError: as `read_rows`, and as `problems.settle` for rows that cannot be used.
    """
    loaded = read_rows(files, image_folder)
    settle(loaded.problems, on_error, loaded.total)
    return loaded


def belongs(samples: Sequence[Sample], files: Sequence[str | Path]) -> list[np.ndarray]:
    """For each of the files, i64: the numbers of the samples that came from it."""
    return [
        np.array([i for i, s in enumerate(samples) if s.file == str(file)], np.int64)
        for file in files
    ]


def choose_per_modality(samples: Sequence[Sample], n: int, seed: int) -> list[Sample]:
    """Draws rows for the router phase, the same number for each modality.

    Args:
      samples: rows with and without a modality.
      n: rows for each modality; 0 = all rows that have one.
      seed: same seed, same rows.

    Returns:
      The rows drawn, in their order in `samples`.

    Raises:
      DataError: modalities have fewer than n rows (or none); the message names them.

    Source: paper section 2, 200 labelled examples a modality.
    """
    places = [[i for i, s in enumerate(samples) if s.modality == m] for m in range(len(MODALITIES))]
    few = {m: len(at) for m, at in zip(MODALITIES, places, strict=True) if len(at) < max(n, 1)}
    if few:
        found = ", ".join(f"{name} {count}" for name, count in few.items())
        raise DataError(
            f"too few rows with a modality label ({found}; needed: {max(n, 1)} each). Label more "
            "rows ('modality' or 'domain') or lower --config.data.labels_per_modality"
        )
    rng = np.random.default_rng(seed)
    chosen = [rng.choice(at, n, replace=False) if n else np.asarray(at) for at in places]
    return [samples[i] for i in sorted(np.concatenate(chosen).tolist())]


def records(file: Path) -> Iterator[tuple[int, Any, str]]:
    """Number, content and '' of each row; a row that is no JSON or no text as None, reason."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data file {file} cannot be read: {error}") from error
    halves = re.search(r"\\u[dD][89a-fA-F]", text) is not None
    for row, record, fault in _parsed(file, text):
        if halves and not fault:
            fault = _text_fault(record)
        yield row, None if fault else record, fault


def _parsed(file: Path, text: str) -> Iterator[tuple[int, Any, str]]:
    """As `records`, whatever text the rows hold."""
    if text.lstrip().startswith("["):
        try:
            records = json.loads(text)
        except (ValueError, RecursionError) as error:  # also a number of too many digits
            raise DataError(f"data file {file} is no JSON: {error}") from error
        yield from ((row, record, "") for row, record in enumerate(records))
        return
    for row, line in enumerate(text.split("\n")):
        if line.strip():
            try:
                yield row, json.loads(line), ""
            except (ValueError, RecursionError) as error:
                yield row, None, f"the line is no JSON: {error}"


def _text_fault(record: Any) -> str:
    """Why a row cannot be used where it holds halves of characters, '' where it does not: JSON can
    write them, a tokenizer and a text file cannot."""
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        return f"the row holds half a character ({half}); remove it, or write it whole"
    return ""


def _sample(record: Any, file: str, row: int, notes: Counter[str]) -> Sample:
    if not isinstance(record, dict):
        raise DataError(f"a row must be an object, not {type(record).__name__}")
    images = image_names(record.get("image"))
    turns = read_turns(record)
    found = sum(text.count(IMAGE_TOKEN) for _, text in turns)
    if images and not found:
        turns[0] = (HUMAN, f"{IMAGE_TOKEN}\n" * len(images) + turns[0][1])
        notes["<image> added before the first question"] += 1
    elif found != len(images):
        raise DataError(f"{found} <image> in the text, but {len(images)} image(s)")
    return Sample(
        id=_first(record, ("id", "qid", "question_id")) or f"{Path(file).name}:{row}",
        images=images,
        turns=tuple(turns),
        answer_type=_answer_type(record.get("answer_type"), notes),
        modality=read_modality(record, notes),
        question_type=_first(record, ("question_type", "content_type")),
        file=file,
        row=row,
    )


def question_id(record: dict[str, Any], row: int) -> Any:
    """How a row of questions is named, in question files and in answers to them: by what it says
    itself, as the file has it, else by its number."""
    return next((record[k] for k in ("question_id", "id") if record.get(k) is not None), row)


def _first(record: Any, keys: Sequence[str]) -> str:
    """Text of the first key that has a value, '' where none has."""
    if isinstance(record, dict):
        for key in keys:
            if record.get(key) not in (None, ""):
                return str(record[key])
    return ""


def image_names(value: Any) -> tuple[str, ...]:
    names = [] if value in (None, "") else value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) and name for name in names):
        raise DataError(f"'image' must be a path or a list of paths, not {value!r}")
    return tuple(names)


def _image_fault(folder: str | Path, name: str) -> str:
    try:
        find_image(folder, name)
    except DataError as error:
        return str(error)
    return ""


def read_turns(record: dict[str, Any]) -> list[Turn]:
    """The conversation of a row, human first.

    Raises:
      DataError: none, a turn that is neither human's nor gpt's, out of order, or empty.
    """
    raw = record.get("conversations", record.get("conversatons"))
    if not isinstance(raw, list) or not raw:
        raise DataError("no 'conversations' list")
    turns: list[Turn] = []
    for place, turn in enumerate(raw):
        if not isinstance(turn, dict) or turn.get("from") not in (HUMAN, GPT):
            raise DataError(f"turn {place} has no 'from' that is '{HUMAN}' or '{GPT}'")
        value = turn.get("value")
        missing = isinstance(value, float) and not math.isfinite(value)  # as pandas writes it
        if missing or isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise DataError(f"turn {place}: 'value' must be text, not {value!r}")
        turns.append((turn["from"], str(value)))
    turns = list(from_human(turns))
    if any(role != (HUMAN, GPT)[place % 2] for place, (role, _) in enumerate(turns)):
        raise DataError("human and gpt must take turns")
    if len(turns) % 2 or not turns:
        raise DataError("the last question has no answer")
    for place, (role, text) in enumerate(turns):
        asked_by_image = place == 0 and record.get("image")
        if not text.strip() and not asked_by_image:
            raise DataError(f"empty {'answer' if role == GPT else 'question'} {place // 2 + 1}")
    return turns


def _answer_type(value: Any, notes: Counter[str]) -> str:
    if value in (None, ""):
        return ""
    known = ANSWER_TYPES.get(str(value).strip().lower(), "")
    if not known:
        notes[f"unknown answer_type {value!r}"] += 1
    return known


def read_modality(record: dict[str, Any], notes: Counter[str]) -> int:
    """Index in config.MODALITIES by `modality` or `domain`, UNKNOWN where they name none or
    several; `notes` counts what was not understood."""
    value, domain = record.get("modality"), record.get("domain")
    if value not in (None, ""):
        names = [str(value)]
    else:
        names = [name for name, on in domain.items() if on] if isinstance(domain, dict) else []
    known = set()
    for name in names:
        letters = "".join(c for c in name.lower() if c.isalpha())
        if letters in MODALITY_NAMES:
            known.add(MODALITY_NAMES[letters])
        else:
            notes[f"unknown modality {name!r}"] += 1
    if len(known) > 1:
        notes["several modalities in 'domain'"] += 1
    return known.pop() if len(known) == 1 else UNKNOWN
