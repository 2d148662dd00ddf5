"""LLaVA-Med's images, from PubMed Central: `python -m medmoe_jax.data.prepare llava_med_images
--source llava_med_image_urls.jsonl --out images [--rows llava_med_instruct_60k.json ...]`.

A line of the URL list is {"pmc_tar_url", "image_file_path", "pair_id"}. The archives it names no
longer exist, but the article and the name of the figure are told by them, and `pmc.py` knows where
the bucket has it now. An image is stored byte for byte as <pair_id>.jpg, which is what LLaVA-Med's
JSON files call it, whatever its format.

A run goes on where the last one stopped: an image that has its name is complete. What could not be
had is in missing.jsonl, with the reason and its kind:

    row       the line of the URL list, or the row asked for, cannot be used
    absent    the bucket has no such article, or no such figure in it
    damaged   what came is no image that can be read
    failed    the server did not answer as it should

The next run tries the failed ones again, the others only with --retry-missing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

from tqdm import tqdm

from medmoe_jax.data import images
from medmoe_jax.data.prepare import pmc
from medmoe_jax.data.problems import DataError
from medmoe_jax.data.sources import image_names, records

MISSING = "missing.jsonl"
PARTIAL = ".partial"
GIVE_UP = 20  # articles that fail in a row: the server, or the connection, is down
SUFFIX = ".jpg"
ROW, ABSENT, DAMAGED, FAILED = "row", "absent", "damaged", "failed"
_PAIR = re.compile(r"[A-Za-z0-9_.,()+ -]{1,200}")  # a file name on every system
_ARTICLE = re.compile(r"PMC[0-9]+")


@dataclass(frozen=True)
class Figure:
    """An image that is wanted."""

    pair_id: str
    article: str  # 'PMC5388087'
    file: str  # its name in the article


@dataclass(frozen=True)
class Missing:
    """An image that could not be had."""

    pair_id: str
    article: str
    file: str
    kind: str
    reason: str


def parse_line(line: Any) -> Figure:
    """Article and figure that a line of the URL list means.

    Raises:
      DataError: a field is missing, names no article or no safe file name, or the fields disagree.
    """
    if not isinstance(line, dict):
        raise DataError("a line must be an object")
    url, path, pair = (
        str(line.get(key) or "") for key in ("pmc_tar_url", "image_file_path", "pair_id")
    )
    if not _PAIR.fullmatch(pair) or pair.startswith("."):
        raise DataError(f"pair_id {pair!r} is no file name")
    file = PurePosixPath(path)
    if file.name in ("", "..") or path.endswith("/"):
        raise DataError(f"image_file_path {path!r} names no file")
    told = {
        match[0]
        for match in (_ARTICLE.match(url.rpartition("/")[2]), _ARTICLE.fullmatch(file.parts[0]))
        if match
    }
    if len(told) != 1:
        raise DataError(
            f"pmc_tar_url {url!r} and image_file_path {path!r} name "
            f"{'different articles' if told else 'no article'}"
        )
    return Figure(pair, told.pop(), file.name)


def plan(source: Path, rows: Sequence[Path] = ()) -> tuple[list[Figure], list[Missing]]:
    """What to fetch.

    Args:
      source: the URL list.
      rows: LLaVA-Med JSON files; only the images that their rows name are wanted. None: all.

    Returns:
      Figures in the order of the list, each pair_id once, and what cannot be asked for.

    Raises:
      DataError: a file cannot be read, or two lines give one pair_id to different figures.
    """
    wanted = _wanted(rows) if rows else None
    figures: dict[str, Figure] = {}
    missing: dict[str, Missing] = {}
    for place, line, fault in records(source):
        try:
            if fault:
                raise DataError(fault)
            figure = parse_line(line)
        except DataError as error:
            pair = str(line.get("pair_id") or "") if isinstance(line, dict) else ""
            if wanted is None or pair in wanted:
                name = pair or f"{source.name}:{place}"
                missing[name] = Missing(name, "", "", ROW, f"{source.name} row {place}: {error}")
            continue
        if wanted is not None and figure.pair_id not in wanted:
            continue
        if figures.setdefault(figure.pair_id, figure) != figure:
            raise DataError(
                f"{source} row {place}: pair_id {figure.pair_id!r} was {figures[figure.pair_id]} "
                f"before and is {figure} now; correct the list"
            )
    for pair in wanted or ():
        if pair not in figures and pair not in missing:
            missing[pair] = Missing(pair, "", "", ROW, f"not in {source.name}")
    kept = [problem for pair, problem in missing.items() if pair not in figures]
    if not figures and not kept:
        raise DataError(f"{source} and --rows name no image")
    return list(figures.values()), kept


def _wanted(files: Sequence[Path]) -> dict[str, None]:
    """pair_ids that the rows name, in order."""
    found: dict[str, None] = {}
    for file in files:
        for place, row, fault in records(file):
            if fault or not isinstance(row, dict):
                raise DataError(f"{file} row {place}: {fault or 'a row must be an object'}")
            for name in image_names(row.get("image")):
                found[PurePosixPath(name).stem if name.endswith(SUFFIX) else name] = None
    return found


def fetch_article(
    bucket: pmc.Bucket, article: str, figures: Sequence[Figure], out: Path
) -> list[Missing]:
    """Stores the wanted figures of one article; returns those that could not be had."""
    try:
        files = bucket.files(article)
    except pmc.Unavailable as error:
        return [_missing(figure, FAILED, str(error)) for figure in figures]
    found = []
    for figure in figures:
        entry = pmc.choose(files, figure.file)
        try:
            if entry is None:
                what = f"{article} has no {figure.file!r}" if files else f"no {article}"
                raise pmc.Absent(f"{what} in the bucket")
            _store(bucket.read(entry), out / f"{figure.pair_id}{SUFFIX}")
        except pmc.Absent as error:
            found.append(_missing(figure, ABSENT, str(error)))
        except pmc.Unavailable as error:
            found.append(_missing(figure, FAILED, str(error)))
        except DataError as error:
            found.append(_missing(figure, DAMAGED, str(error)))
    return found


def _missing(figure: Figure, kind: str, reason: str) -> Missing:
    return Missing(figure.pair_id, figure.article, figure.file, kind, reason)


def _store(content: bytes, path: Path) -> None:
    """Writes an image that can be decoded; its name appears only then."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        partial.write_bytes(content)
        images.open_image(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def download(
    figures: Sequence[Figure],
    known: Sequence[Missing],
    out: Path,
    bucket: pmc.Bucket,
    *,
    workers: int = 4,
    retry_missing: bool = False,
    progress: bool = False,
) -> list[Missing]:
    """Fetches what is not there yet.

    Args:
      figures: from `plan`.
      known: from `plan`; they go into missing.jsonl as they are.
      out: folder of the images; made if absent. One run at a time may write to it.
      bucket: where from.
      workers: articles that are fetched at a time.
      retry_missing: also try what a former run found absent or damaged.
      progress: show a bar.

    Returns:
      All that is missing now, as in missing.jsonl.

    Raises:
      DataError: GIVE_UP articles failed one after the other. What came is kept.
    """
    out.mkdir(parents=True, exist_ok=True)
    for partial in out.glob(f"*{PARTIAL}"):
        partial.unlink()
    asked = {figure.pair_id for figure in figures}
    before = {} if retry_missing else _settled(out / MISSING, asked)
    have = {name.name for name in os.scandir(out)}
    articles: dict[str, list[Figure]] = defaultdict(list)
    done = 0
    missing = list(known)
    for figure in figures:
        if f"{figure.pair_id}{SUFFIX}" in have:
            done += 1
        elif figure.pair_id in before:
            missing.append(before[figure.pair_id])
        else:
            articles[figure.article].append(figure)
    bar = tqdm(
        total=len(figures),
        initial=done + len(missing) - len(known),
        unit=" images",
        disable=None if progress else True,
    )
    partial = out / f"{MISSING}{PARTIAL}"
    with partial.open("w", encoding="utf-8", newline="\n") as log:
        _log(log, missing)
    partial.replace(out / MISSING)
    fetched = _in_parallel(
        lambda article: fetch_article(bucket, article, articles[article], out),
        list(articles),
        bucket,
        workers,
    )
    with (
        (out / MISSING).open("a", encoding="utf-8", newline="\n") as log,
        closing(fetched),
        bar,
    ):
        for article, lost in fetched:
            bar.update(len(articles[article]))
            missing += lost
            _log(log, lost)
            bar.set_postfix(missing=len(missing), refresh=False)
    return missing


def _in_parallel(
    fetch: Callable[[str], list[Missing]],
    articles: Sequence[str],
    bucket: pmc.Bucket,
    workers: int,
) -> Generator[tuple[str, list[Missing]], None, None]:
    """Articles as they are done, with what they lack; a few wait in line and no more."""
    failed = 0  # articles in a row
    pool = ThreadPoolExecutor(workers, thread_name_prefix="article")
    try:
        waiting = iter(articles)
        running: dict[Future[list[Missing]], str] = {}
        while True:
            for article in waiting:
                running[pool.submit(fetch, article)] = article
                if len(running) >= 2 * workers:
                    break
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                article, lost = running.pop(future), future.result()
                failed = failed + 1 if any(m.kind == FAILED for m in lost) else 0
                yield article, lost
                if failed >= GIVE_UP:
                    raise DataError(
                        f"{failed} articles failed one after the other, the last with: "
                        f"{lost[-1].reason}. Is {bucket.base_url} within reach? Start again later: "
                        "what came is kept"
                    )
    finally:
        bucket.pace.stop()
        pool.shutdown(cancel_futures=True)


def _log(log: TextIO, missing: Sequence[Missing]) -> None:
    log.writelines(json.dumps(asdict(problem), ensure_ascii=False) + "\n" for problem in missing)
    log.flush()


def _settled(file: Path, asked: set[str]) -> dict[str, Missing]:
    """What a former run found missing for good; a line that was cut short is no such finding."""
    found = {}
    if file.is_file():
        for _, line, fault in records(file):
            try:
                problem = Missing(**line)
            except TypeError as error:
                if fault:
                    continue
                raise DataError(f"{file} is no list of this command: {error}") from error
            if problem.kind in (ABSENT, DAMAGED) and problem.pair_id in asked:
                found[problem.pair_id] = problem
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    add = parser.add_argument
    add("--source", type=Path, required=True, help="llava_med_image_urls.jsonl")
    add("--out", type=Path, required=True, help="folder of the images; goes on where it was")
    add("--rows", type=Path, nargs="+", default=(), help="only what the rows of these JSON ask for")
    add("--workers", type=int, default=4, help="connections")
    add("--rate", type=float, default=10.0, help="requests a second at most")
    add("--contact", default="", help="your address, told to the server with every request")
    add("--base-url", default=pmc.BASE_URL, help="the bucket, or a mirror of it")
    add("--retry-missing", action="store_true", help="also try what was absent or damaged before")


def run(options: argparse.Namespace) -> int:
    """Fetches. Returns 0 if every image is there, 1 if some are missing."""
    if options.workers < 1 or options.rate <= 0:
        raise DataError("--workers and --rate must be positive")
    figures, known = plan(options.source, options.rows)
    bucket = pmc.Bucket(options.base_url, options.rate, options.contact)
    missing = download(
        figures,
        known,
        options.out,
        bucket,
        workers=options.workers,
        retry_missing=options.retry_missing,
        progress=True,
    )
    print(f"{len(figures) + len(known) - len(missing)} images in {options.out}")
    for kind, number in sorted(Counter(problem.kind for problem in missing).items()):
        print(f"{number:8d}  {kind}")
    if missing:
        print(f"{len(missing)} missing: {options.out / MISSING}", file=sys.stderr)
    return 1 if missing else 0
