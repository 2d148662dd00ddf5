"""A server in this process: a client of ASGI, and a model whose answers are held back."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import io
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from starlette.applications import Starlette

from medmoe_jax.model import Model, Reply, Request
from medmoe_jax.serve import app as serving

SECONDS = 60.0  # after which a test that waits has failed


class Held(Model):
    """A model that answers `answer to QUESTION` where `permits` allow it, a batch at a time.

    Attributes:
      permits: released once for each batch, and once more for each id of a stream.
      batches: the questions of each batch, in order, and for how many rows.
    """

    permits: threading.Semaphore
    batches: list[tuple[list[str], int]]

    def growing(
        self, requests: Sequence[Request], sampling: Any = None, rows: int = 0, every: int = 0
    ) -> Iterator[list[Reply]]:
        self.batches.append(([r.question for r in requests], rows))
        assert self.permits.acquire(timeout=SECONDS)
        if any("broken" in r.question for r in requests):
            raise ValueError(requests[0].question)
        texts = [f"answer to {r.question}" for r in requests]
        for cut in range(8, max(map(len, texts)), 8) if every else ():
            yield [Reply(text[:cut], (5,), (-0.5,), False, None) for text in texts]
            assert self.permits.acquire(timeout=SECONDS)
        yield [
            Reply(
                text,
                (5, 0),
                (-0.5, -0.25),
                "endless" not in text,
                {"CT": 0.75, "MRI": 0.25},
                dict.fromkeys(r.options, 0.5) if r.options else None,
            )
            for text, r in zip(texts, requests, strict=True)
        ]


def held(model: Model, permits: int = 0) -> Held:
    """A stand-in with the tokenizer and the sizes of a model."""
    fields = {f.name: getattr(model, f.name) for f in dataclasses.fields(model)}
    stand_in = Held(**fields)
    stand_in.permits, stand_in.batches = threading.Semaphore(permits), []
    return stand_in


def data_url(pixels: np.ndarray, kind: str = "png") -> str:
    """A picture, uint8[H, W, 3], as clients send it."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def image(url: str) -> dict[str, Any]:
    """A part of a message that shows it."""
    return {"type": "image_url", "image_url": {"url": url}}


def shown(question: str, *pictures: np.ndarray) -> list[dict[str, Any]]:
    """The content of a message, its images last."""
    return [{"type": "text", "text": question}, *(image(data_url(p)) for p in pictures)]


def body(question: Any = "What is it?", **other: Any) -> dict[str, Any]:
    """A request with one question, or with whole messages."""
    said = {"model": "tiny", "messages": [{"role": "user", "content": question}]}
    return said | other


class Answer(NamedTuple):
    """What came back."""

    status: int
    headers: dict[str, str]
    content: bytes

    @property
    def json(self) -> Any:
        """The content as JSON."""
        return json.loads(self.content)

    @property
    def error(self) -> dict[str, Any]:
        """The error in it."""
        return self.json["error"]

    @property
    def text(self) -> str:
        """The answer of the model."""
        return self.json["choices"][0]["message"]["content"]

    @property
    def events(self) -> list[str]:
        """What a stream's events hold."""
        *events, rest = self.content.decode().split("\n\n")
        assert not rest and all(event.startswith("data: ") for event in events)
        return [event.removeprefix("data: ") for event in events]


class Client:
    """Calls an application, without a network; every call is one connection."""

    def __init__(self, app: Starlette) -> None:
        self._app = app

    async def ask(
        self,
        sent: Any = None,
        path: str = "/v1/chat/completions",
        *,
        key: str = "",
        leave: asyncio.Event | None = None,
        sends: bool = True,
        listen: Callable[[bytes], Any] = lambda piece: None,
    ) -> Answer:
        """The answer to a request.

        Args:
          sent: JSON or bytes to post; None: a GET.
          path: address.
          key: of the API.
          leave: when it is set, the client closes the connection.
          sends: the body comes at all.
          listen: hears every piece of the answer as it comes.
        """
        content = sent if isinstance(sent, bytes) else json.dumps(sent).encode()
        headers = [(b"authorization", f"Bearer {key}".encode())] if key else []
        scope = {
            **{"type": "http", "http_version": "1.1", "path": path, "headers": headers},
            **{"method": "GET" if sent is None else "POST", "query_string": b"", "root_path": ""},
            **{"scheme": "http", "server": ("test", 80), "client": ("test", 1)},
            "asgi": {"version": "3.0", "spec_version": "2.3"},
        }
        leave, parts, started = leave or asyncio.Event(), [content] if sends else [], []

        async def receive() -> dict[str, Any]:
            if parts:
                return {"type": "http.request", "body": parts.pop(), "more_body": False}
            await leave.wait()
            return {"type": "http.disconnect"}

        pieces: list[bytes] = []

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                started.append(message)
            else:
                pieces.append(message["body"])
                listen(message["body"])

        async with asyncio.timeout(SECONDS):
            await self._app(scope, receive, send)
        sent_headers = {k.decode(): v.decode() for k, v in started[0]["headers"]}
        return Answer(started[0]["status"], sent_headers, b"".join(pieces))

    async def until(self, **counts: Any) -> None:
        """Waits until `/health` tells these numbers."""
        async with asyncio.timeout(SECONDS):
            while not counts.items() <= (await self.ask(path="/health")).json.items():
                await asyncio.sleep(0.01)


@asynccontextmanager
async def running(model: Model, **settings: Any) -> AsyncIterator[Client]:
    """A server of this model, named tiny, and its client."""
    app = serving.build(model, serving.Settings("tiny", **settings))
    async with app.router.lifespan_context(app):
        yield Client(app)


def alone(model: Model, sent: Any, path: str = "/v1/chat/completions", **settings: Any) -> Answer:
    """The answer of a server that is asked once."""
    key = settings.pop("send_key", "")

    async def once() -> Answer:
        async with running(model, **settings) as client:
            return await client.ask(sent, path, key=key)

    return asyncio.run(once())
