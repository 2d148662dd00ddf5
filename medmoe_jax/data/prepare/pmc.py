"""PubMed Central's open-data bucket: where an article's files lie in it, and a polite way to fetch
them.

The layout, as published in 2026 (pmc.ncbi.nlm.nih.gov/tools/pmcaws and the bucket's README):

    PMC5388087.1/PMC5388087.1.xml    version 1 of an article
    PMC5388087.1/gr1.jpg             its figures, under the names that they have in the article
    PMC5388087.2/...                 a later version: all files again
    metadata/PMC5388087.1.json       licence and addresses

The bucket is read over HTTPS without an account; `?list-type=2&prefix=PMC5388087.` lists what an
article has (S3 ListObjectsV2, 1,000 names a page). The archives `oa_package/.../PMC5388087.tar.gz`
of the old service no longer exist. Everything that depends on the layout is in `listing_query`,
`parse_listing` and `choose`.
"""

from __future__ import annotations

import email.utils
import random
import re
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import quote
from xml.etree import ElementTree

import requests

import medmoe_jax

BASE_URL = "https://pmc-oa-opendata.s3.amazonaws.com"
TRIES = 6  # of a request, before its file counts as failed for this run
FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds between tries: doubled every time, with a lot drawn
LONGEST_PAUSE = 900.0  # seconds; a server that asks for more (Retry-After) has failed for this run
CONNECT_SECONDS, READ_SECONDS = 10.0, 60.0  # without an answer, without another byte
WHOLE_SECONDS = 300.0  # for one file
MAX_BYTES = 256 << 20  # of one file
AGAIN = {408, 425, 429, 500, 502, 503, 504}  # statuses after which a request is tried again
ABSENT = {404, 410}
_KEY = re.compile(r"(PMC[0-9]+)\.([0-9]+)/(.+)")


class Absent(Exception):
    """The server says that there is no such thing."""


class Unavailable(Exception):
    """The server gave no whole answer in all tries."""


class Stopped(Exception):
    """The run was told to end."""


@dataclass(frozen=True)
class Entry:
    """One file of an article."""

    key: str
    version: int
    size: int  # bytes


def listing_query(article: str, token: str = "") -> dict[str, str]:
    """Query of a page of the files of all versions of an article, 'PMC5388087' say; the full stop
    keeps PMC53880871 out."""
    query = {"list-type": "2", "prefix": f"{article}."}
    return query | {"continuation-token": token} if token else query


def parse_listing(content: bytes, article: str) -> tuple[list[Entry], str]:
    """Files on a page of a listing, and the token of the next page, '' on the last.

    Raises:
      ValueError: the content is no listing.
    """
    try:
        root = ElementTree.fromstring(content)
    except ElementTree.ParseError as error:
        raise ValueError(f"no XML: {error}") from error
    if root.tag.rpartition("}")[2] != "ListBucketResult":
        raise ValueError(f"<{root.tag}> in place of a listing")
    found = []
    for entry in root.iterfind("{*}Contents"):
        key = entry.findtext("{*}Key") or ""
        match = _KEY.fullmatch(key)
        if match and match[1] == article:
            found.append(Entry(key, int(match[2]), int(entry.findtext("{*}Size") or -1)))
    more = (root.findtext("{*}IsTruncated") or "").strip() == "true"
    return found, (root.findtext("{*}NextContinuationToken") or "") if more else ""


def choose(entries: Iterable[Entry], name: str) -> Entry | None:
    """The file `name` of the newest version that has it; its case counts only if two differ in
    nothing else."""
    best, rank = None, (-1, False)
    for entry in entries:
        own = entry.key.rpartition("/")[2]
        if own.lower() == name.lower() and (entry.version, own == name) > rank:
            best, rank = entry, (entry.version, own == name)
    return best


class Pace:
    """When requests may start: some a second over all threads, none while the server wants rest."""

    def __init__(self, rate: float):
        """`rate`: requests a second."""
        self._gap = 1 / rate
        self._next = 0.0
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def wait(self) -> None:
        """Until it is one's turn. Raises Stopped after `stop`."""
        with self._lock:
            start = max(time.monotonic(), self._next)
            self._next = start + self._gap
        self.sleep(start - time.monotonic())

    def pause(self, seconds: float) -> None:
        """No request starts for so long."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)

    def sleep(self, seconds: float) -> None:
        """Sleeps. Raises Stopped after `stop`, at once."""
        if self._stop.wait(max(0.0, seconds)):
            raise Stopped

    def stop(self) -> None:
        """Ends all waiting, now and later."""
        self._stop.set()


class Bucket:
    """Reads listings and files; may be used by several threads, with one connection each."""

    def __init__(self, base_url: str = BASE_URL, rate: float = 10.0, contact: str = ""):
        """Opens no connection yet.

        Args:
          base_url: of the bucket or a mirror with its layout.
          rate: requests a second at most.
          contact: an address for the server's keepers, sent with every request.
        """
        self.base_url = base_url.rstrip("/")
        self.pace = Pace(rate)
        self._agent = f"medmoe_jax/{medmoe_jax.__version__}" + f" ({contact})" * bool(contact)
        self._own = threading.local()

    def files(self, article: str) -> list[Entry]:
        """All files of all versions of an article, none where the bucket lacks it.

        Raises:
          Unavailable, Stopped: see above.
        """
        found: list[Entry] = []
        token = ""
        while True:
            try:
                page, token = parse_listing(self._get("", listing_query(article, token)), article)
            except (Absent, ValueError) as error:  # of an article that it lacks the list is empty
                raise Unavailable(f"the listing of {article}: {error}") from error
            found += page
            if not token:
                return found

    def read(self, entry: Entry) -> bytes:
        """Content of a file.

        Raises:
          Absent, Unavailable, Stopped: see above.
        """
        return self._get(quote(entry.key), {}, entry.size)

    def _get(self, path: str, query: dict[str, str], size: int = -1) -> bytes:
        reason = ""
        for attempt in range(TRIES):
            if attempt:
                wait = min(FIRST_WAIT * 2 ** (attempt - 1), LONGEST_WAIT)
                self.pace.sleep(wait * random.uniform(0.5, 1.5))
            self.pace.wait()
            try:
                with self._session().get(
                    f"{self.base_url}/{path}",
                    params=query,
                    stream=True,
                    timeout=(CONNECT_SECONDS, READ_SECONDS),
                ) as answer:
                    if answer.status_code in ABSENT:
                        raise Absent(f"the server answers {answer.status_code}")
                    if answer.status_code == 200:
                        content = self._content(answer)
                        if size in (-1, len(content)):
                            return content
                        reason = f"{len(content)} bytes came, the listing says {size}"
                    else:
                        reason = f"the server answers {answer.status_code}"
                        rest = _retry_after(answer.headers.get("Retry-After", ""))
                        if answer.status_code not in AGAIN or rest > LONGEST_PAUSE:
                            break
                        self.pace.pause(rest)
            except requests.RequestException as error:
                reason = f"{type(error).__name__}: {error}"
        raise Unavailable(reason)

    def _content(self, answer: requests.Response) -> bytes:
        end = time.monotonic() + WHOLE_SECONDS
        parts, size = [], 0
        for part in answer.iter_content(1 << 16):
            size += len(part)
            parts.append(part)
            if size > MAX_BYTES:
                raise Absent(f"the file has more than {MAX_BYTES} bytes")
            if time.monotonic() > end:
                raise requests.Timeout(f"not all there after {WHOLE_SECONDS:.0f} s")
            self.pace.sleep(0)
        return b"".join(parts)

    def _session(self) -> requests.Session:
        if not hasattr(self._own, "session"):
            self._own.session = requests.Session()
            # The bytes as they are: sizes are compared with the listing's.
            self._own.session.headers.update(
                {"User-Agent": self._agent, "Accept-Encoding": "identity"}
            )
        return self._own.session


def _retry_after(value: str) -> float:
    """Seconds to wait that a Retry-After header asks for, 0 without one."""
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0
