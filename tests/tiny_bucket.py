"""A bucket on this machine with the layout of PubMed Central's, and with its moods."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

PAGE = 3  # names on a page of a listing
Mood = Callable[[BaseHTTPRequestHandler, int], bool]  # (request, its number) -> was it answered


class TinyBucket:
    """Its files, what it was asked for, and how it answers some of it."""

    def __init__(self, files: dict[str, bytes]):
        self.files = files
        self.moods: dict[str, Mood] = {}  # key, or prefix of a listing -> what it does at first
        self.asked: Counter[str] = Counter()
        self.agents: set[str] = set()
        self.times: list[float] = []
        self.under_way = self.most = 0
        self.lock = threading.Lock()
        self.url = ""

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Listing or file, after the mood."""
        parts = urlsplit(request.path)
        query = parse_qs(parts.query)
        name = query["prefix"][0] if query.get("list-type") == ["2"] else unquote(parts.path[1:])
        with self.lock:
            self.asked[name] += 1
            number = self.asked[name]
            self.agents.add(request.headers["User-Agent"])
            self.times.append(time.monotonic())
            self.under_way += 1
            self.most = max(self.most, self.under_way)
        try:
            if name in self.moods and self.moods[name](request, number):
                return
            if "list-type" in query:
                send(request, 200, self._listing(name, query.get("continuation-token", [""])[0]))
            elif name in self.files:
                send(request, 200, self.files[name])
            else:
                send(request, 404, b"<Error><Code>NoSuchKey</Code></Error>")
        finally:
            with self.lock:
                self.under_way -= 1

    def _listing(self, prefix: str, token: str) -> bytes:
        keys = [key for key in sorted(self.files) if key.startswith(prefix) and key > token]
        page, more = keys[:PAGE], len(keys) > PAGE
        inner = "".join(
            f'<Contents><Key>{escape(key)}</Key><ETag>"x"</ETag>'
            f"<Size>{len(self.files[key])}</Size></Contents>"
            for key in page
        )
        if more:
            inner += f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>"
        return (
            '<?xml version="1.0" encoding="UTF-8"?>'
            '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<IsTruncated>{str(more).lower()}</IsTruncated>{inner}</ListBucketResult>"
        ).encode()


def send(
    request: BaseHTTPRequestHandler,
    status: int,
    content: bytes,
    length: int | None = None,
    **headers: str,
) -> None:
    """An answer, whose length may be a lie."""
    request.send_response(status)
    for name, value in headers.items():
        request.send_header(name.replace("_", "-"), value)
    request.send_header("Content-Length", str(len(content) if length is None else length))
    request.end_headers()
    request.wfile.write(content)
    if length is not None:
        request.close_connection = True


@contextmanager
def serve(files: dict[str, bytes]) -> Iterator[TinyBucket]:
    """Runs it."""
    bucket = TinyBucket(files)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            try:
                bucket.answer(self)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    bucket.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield bucket
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
