"""Stream of rows -> folder with images, manifest, summary, licence and contact sheet.

    images/            as the source has them; DICOM and NIfTI as PNG
    manifest.jsonl     all rows; train.jsonl, val.jsonl, test.jsonl are the same rows by split
    summary.json       counts, what was put right, differences from the published numbers
    problems.jsonl     rows that could not be used, if there are any
    licence.txt        terms of the data set
    sheet.png          a sample of the rows, to be looked at

Rows keep the order of the source whatever the number of workers. A run that was killed goes on
where it was: images that are complete are not written again, and the other files appear under
their names only at the end.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from medmoe_jax.config import ViewConfig
from medmoe_jax.data.prepare import counts
from medmoe_jax.data.prepare.folders import IDENTITY, IMAGES
from medmoe_jax.data.prepare.pictures import Store
from medmoe_jax.data.prepare.sheet import Sample, draw_sheet
from medmoe_jax.data.prepare.types import SPLITS, Bad, Draft, Event, LeftOut, Licence, Opened
from medmoe_jax.data.problems import DataError, Problem, settle, write_problems

PARTIAL = ".partial"


@dataclass
class Result:
    """What became of a source."""

    layout: str
    rows: Counter[str] = field(default_factory=Counter)  # written: 'train', 'train CLOSED'
    found: Counter[str] = field(default_factory=Counter)  # in the source, as `rows`
    modalities: Counter[str] = field(default_factory=Counter)
    handled: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    rules: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)
    images_written: int = 0
    images_kept: int = 0
    comparison: counts.Comparison = field(default_factory=counts.none_known)

    @property
    def total(self) -> int:
        """Rows written."""
        return sum(self.rows[split] for split in SPLITS)


class _Ids:
    """Makes ids unique, and finds rows that are there twice."""

    def __init__(self) -> None:
        self._seen: dict[str, list[bytes]] = {}  # id of the source -> contents of its rows
        self._given: set[str] = set()

    def __call__(self, draft: Draft) -> str:
        """The id to write, '' where the whole row was there before."""
        own = draft.row["id"]
        content = {k: v for k, v in draft.row.items() if k not in ("origin", "rules")}
        text = json.dumps([content, [picture.name for picture in draft.pictures]], sort_keys=True)
        digest = hashlib.sha256(text.encode()).digest()[:12]
        before = self._seen.setdefault(own, [])
        if digest in before:
            return ""
        before.append(digest)
        name, number = own, 1
        while name in self._given:
            number += 1
            name = f"{own}-{number}"
        self._given.add(name)
        return name


def begin(out: Path, identity: dict[str, Any]) -> None:
    """Makes the folder, or sees that it was begun from the same source.

    Raises:
      DataError: it holds something else.
    """
    out.mkdir(parents=True, exist_ok=True)
    file = out / IDENTITY
    if file.is_file():
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            before = None
        if before != identity:
            raise DataError(
                f"{out} was begun from {before}, not from {identity}; take another --out, or "
                "remove it"
            )
        return
    if any(out.iterdir()):
        raise DataError(f"{out} is not empty and holds no prepared data set; take another --out")
    file.write_text(json.dumps(identity, ensure_ascii=False) + "\n", encoding="utf-8")


def write(
    opened: Opened,
    out: Path,
    *,
    workers: int = 1,
    on_error: str = "error",
    splits: Sequence[str] = SPLITS,
    progress: bool = False,
    view: ViewConfig | None = None,
) -> Result:
    """Writes images, rows, problems, licence and sheet; `summary.write` does the summary.

    Args:
      opened: the source.
      out: folder that was begun by `begin`.
      workers: threads that read and check images; the result does not depend on it.
      on_error: 'error' or 'skip', as in `problems.settle`.
      splits: those to write.
      progress: show a bar.
      view: of DICOM and NIfTI files, which become PNG.

    Raises:
      DataError: rows cannot be used (on_error='error'; problems.jsonl is written all the same),
        none is left, or splits that were written before would be lost.
    """
    result = Result(opened.layout)
    lost = [s for s in SPLITS if s not in splits and (out / f"{s}.jsonl").exists()]
    if lost:
        raise DataError(
            f"{out} holds rows of {', '.join(lost)}, which --splits {','.join(splits)} would "
            "remove; take another --out, or prepare all splits at once"
        )
    names = ["manifest", *SPLITS]
    sample = Sample()
    for name in names:
        (out / f"{name}.jsonl").unlink(missing_ok=True)
    (out / "problems.jsonl").unlink(missing_ok=True)
    with ExitStack() as stack:
        store = stack.enter_context(Store(out / IMAGES, workers, view))
        files = {
            name: stack.enter_context(
                (out / f"{name}.jsonl{PARTIAL}").open("w", encoding="utf-8", newline="\n")
            )
            for name in names
        }
        bar = stack.enter_context(
            tqdm(total=opened.total, unit=" rows", disable=None if progress else True)
        )
        for row in _rows(_chosen(opened.events, splits, bar), store, workers, result):
            _put(files, row)
            result.rows.update([row["split"], f"{row['split']} {row['answer_type']}"])
            result.modalities[row["modality"]] += 1
            result.rules.update(f"{key}: {rule}" for key, rule in row["rules"].items())
            sample.add(row)
    result.images_written, result.images_kept = store.written, store.kept
    result.comparison = counts.compare(result.found, opened.published, splits)
    if result.problems:
        write_problems(result.problems, out / "problems.jsonl")
    try:
        _judge(result, on_error)
    except DataError:
        for name in names:
            (out / f"{name}.jsonl{PARTIAL}").unlink()
        raise
    for name in names:
        partial = out / f"{name}.jsonl{PARTIAL}"
        if name == "manifest" or result.rows[name]:
            partial.replace(out / f"{name}.jsonl")
        else:
            partial.unlink()
    _write_licence(opened.licences, out / "licence.txt")
    draw_sheet(sample.rows(), out / IMAGES).save(out / "sheet.png")
    return result


def _judge(result: Result, on_error: str) -> None:
    """Raises DataError where the rows may not be written: see `write`."""
    settle(
        result.problems,
        on_error,
        result.total + len(result.problems),
        remedy="--on-error skip",
        place="--source",
    )
    if not result.total:
        left = ", ".join(f"{reason} ({n})" for reason, n in result.left_out.items()) or "no rows"
        raise DataError(f"nothing is left to write: {left}")


def _put(files: Mapping[str, TextIO], row: dict[str, Any]) -> None:
    line = json.dumps(row, ensure_ascii=False) + "\n"
    for name in ("manifest", row["split"]):
        files[name].write(line)


def _chosen(events: Iterator[Event], splits: Sequence[str], bar: tqdm) -> Iterator[Event]:
    for event in events:
        bar.update()
        split = event.row["split"] if isinstance(event, Draft) else event.split
        if not split or split in splits:
            yield event


def _rows(
    events: Iterator[Event], store: Store, workers: int, result: Result
) -> Iterator[dict[str, Any]]:
    """Finished rows in order; everything else goes into `result`. So many rows are under way at a
    time that all workers are busy, and no more, as their images may be in memory."""
    window: deque[tuple[Draft, str]] = deque()
    ids = _Ids()
    for event in events:
        if isinstance(event, Bad):
            result.problems.append(event.problem)
            if event.split:
                result.found[event.split] += 1
        elif isinstance(event, LeftOut):
            result.left_out[event.reason] += 1
            if event.counted:
                result.found.update([event.split, f"{event.split} {event.answer_type}"])
        else:
            split = event.row["split"]
            result.found.update([split, f"{split} {event.row['answer_type']}"])
            name = ids(event)
            if not name:
                result.left_out["a row that is there twice, id and all"] += 1
                continue
            for picture in event.pictures:
                store.start(picture)
            window.append((event, name))
            if len(window) > 4 * workers:
                yield from _finished(*window.popleft(), store, result)
    while window:
        yield from _finished(*window.popleft(), store, result)


def _finished(draft: Draft, name: str, store: Store, result: Result) -> Iterator[dict[str, Any]]:
    stored, faults = [], []
    for picture in draft.pictures:
        try:
            stored.append(store.name(picture))
            if stored[-1] != picture.name and Path(picture.name).suffix:
                result.handled["image: suffix of its format added"] += 1
        except DataError as error:
            faults.append(str(error))
    if faults:
        result.problems.append(Problem(draft.file, draft.place, name, "; ".join(faults)))
        return
    result.handled.update(draft.handled)
    if name != draft.row["id"]:
        result.handled["id: made unique"] += 1
    yield {"id": name, "image": stored[0] if len(stored) == 1 else stored or ""} | {
        key: value for key, value in draft.row.items() if key != "id"
    }


def _write_licence(licences: Sequence[Licence], path: Path) -> None:
    parts = [
        "\n".join(part for part in (f"{x.name}\n{x.link}", x.note, x.citation) if part)
        for x in licences
    ]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
