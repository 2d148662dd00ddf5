"""The addresses of the server, who may use them, and how faults are told.

Texts and images of requests are never logged; an image is in a file only while a DICOM file is
decoded.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from medmoe_jax.config import ConfigError
from medmoe_jax.data.problems import DataError
from medmoe_jax.responder import Reply, Responder
from medmoe_jax.serve import fields, messages, replies
from medmoe_jax.serve.batching import Batcher, Failed, Job, Stopping, log_fault
from medmoe_jax.serve.fields import Fault

BODY_SECONDS = 60  # for the body of a request to arrive
READERS = 4  # requests whose images are decoded at once, which may take gigabytes
LEFT = 499  # status of an answer that nobody waits for any more; it is seen in the log alone


@dataclass(frozen=True)
class Settings:
    """How the server is run.

    Attributes:
      name: of the model.
      key: that clients must know; "" = none.
      rows: of the largest batch.
      waiting: requests that may wait behind it.
      limits: of one request.
    """

    name: str
    key: str = ""
    rows: int = 8
    waiting: int = 64
    limits: messages.Limits = field(default_factory=messages.Limits)


def build(model: Responder, settings: Settings) -> Starlette:
    """The application; its lifespan is that of the thread that answers."""
    service = Service(model, settings)
    return Starlette(
        routes=[
            Route("/health", service.health),
            Route("/v1/models", service.models),
            Route("/v1/models/{name:path}", service.model),
            Route("/v1/chat/completions", service.chat, methods=["POST"]),
        ],
        middleware=[Middleware(Gate, settings=settings)],
        exception_handlers={Fault: told, HTTPException: told},
        lifespan=service.lifespan,
    )


def told(_: Request, error: Exception) -> Response:
    """An error in OpenAI's form."""
    if isinstance(error, HTTPException):
        error = Fault(
            f"{error.detail}; ask GET /health, GET /v1/models or POST /v1/chat/completions",
            error.status_code,
        )
    assert isinstance(error, Fault)
    waits = {"Retry-After": "1"} if error.status in (429, 503) else None
    return JSONResponse({"error": described(error)}, error.status, waits)


def described(error: Fault) -> dict[str, Any]:
    """The error as JSON."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    if error.status == 429:
        kind = "rate_limit_error"
    return {"message": str(error), "type": kind, "param": error.param, "code": error.code}


class Gate:
    """Lets in who knows the key, and no more questions than there are places. Nothing of a body is
    read before."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._key = app, settings.key.encode()
        self._free = settings.rows + settings.waiting

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            return await self._app(scope, receive, send)
        request = Request(scope)
        word, _, key = request.headers.get("authorization", "").partition(" ")
        known = word.lower() == "bearer" and hmac.compare_digest(key.encode("latin-1"), self._key)
        if self._key and not known:
            fault = Fault(
                "the API key is missing or wrong; send Authorization: Bearer KEY",
                status=401,
                code="invalid_api_key",
            )
            return await told(request, fault)(scope, receive, send)
        if scope["method"] != "POST":
            return await self._app(scope, receive, send)
        if not self._free:
            fault = Fault("all places are taken; ask again", status=429, code="queue_full")
            return await told(request, fault)(scope, receive, send)
        self._free -= 1
        try:
            return await self._app(scope, receive, send)
        finally:
            self._free += 1


class Service:
    """What is done at each address."""

    def __init__(self, model: Responder, settings: Settings) -> None:
        self._model, self._settings = model, settings
        self._batcher = Batcher(model, settings.rows)
        self._reading = asyncio.Semaphore(READERS)
        self._created = int(time.time())

    @asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        """At the end, all that was taken is answered."""
        self._batcher.start()
        yield
        await asyncio.to_thread(self._batcher.stop)

    async def health(self, _: Request) -> Response:
        """Whether requests are answered, by which model, and how many there are."""
        works, counts = self._batcher.works, self._batcher.counts()
        content = {"status": "ok" if works else "stopping", "model": self._settings.name, **counts}
        return JSONResponse(content | {"busy": counts["running"] > 0}, 200 if works else 503)

    async def models(self, _: Request) -> Response:
        """The list of one model."""
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def model(self, request: Request) -> Response:
        """The model by its name."""
        self._check_name(request.path_params["name"])
        return JSONResponse(self._described())

    def _described(self) -> dict[str, Any]:
        described = {"id": self._settings.name, "object": "model", "created": self._created}
        return {**described, "owned_by": "medmoe_jax"}

    def _check_name(self, name: str) -> None:
        if name != self._settings.name:
            raise Fault(
                f"this server has no model of that name; it has {self._settings.name}",
                status=404,
                param="model",
                code="model_not_found",
            )

    async def chat(self, request: Request) -> Response:
        """Answers a conversation, whole or as a stream."""
        try:
            content = await self._content(request)
            async with self._reading:
                body, asked = await asyncio.to_thread(self._read, content)
            writer = replies.Writer(body, asked, self._model)
            looks = self._looks(asked, body.stream, request)
            first = await anext(looks)  # what fails before it is told with its status
            if body.stream:
                head = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
                events = self._events(writer, first, looks)
                return StreamingResponse(events, 200, head, "text/event-stream")
            await looks.aclose()
            return JSONResponse(writer.completion(first[0]))
        except ClientDisconnect:
            return Response(status_code=LEFT)
        except Exception as error:
            raise fault_of(error) from None

    def _read(self, content: bytes) -> tuple[fields.Body, messages.Asked]:
        """What is asked. Raises what `fields.parse` and `messages.read` do."""
        body = fields.parse(content)
        self._check_name(body.model)
        return body, messages.read(body, self._model, self._settings.limits)

    async def _content(self, request: Request) -> bytes:
        """The body of a request, if it comes in time and is not too large."""
        content, most = bytearray(), self._settings.limits.body
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for piece in request.stream():
                    content += piece
                    if len(content) > most:
                        raise Fault(f"the request has more than {most} bytes", status=413)
        except TimeoutError:
            raise Fault(
                f"the request did not arrive within {BODY_SECONDS} seconds", status=408
            ) from None
        return bytes(content)

    async def _looks(
        self, asked: messages.Asked, stream: bool, request: Request
    ) -> AsyncGenerator[tuple[Reply, bool], None]:
        """The reply as it grows, and whether it is whole. The place is given back when nobody
        listens any more.

        Raises:
          ClientDisconnect: the client has left.
          Failed: there is no answer.
          Stopping: there will be none.
        """
        loop = asyncio.get_running_loop()
        heard: asyncio.Queue[tuple[Reply | Failed | ClientDisconnect, bool]] = asyncio.Queue()

        def tell(reply: Reply | Failed, last: bool) -> None:
            loop.call_soon_threadsafe(heard.put_nowait, (reply, last))

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            heard.put_nowait((ClientDisconnect(), True))

        job = Job(asked.request, asked.how, stream, tell)
        watching = asyncio.create_task(watch())
        try:
            self._batcher.submit(job)
            last = False
            while not last:
                reply, last = await heard.get()
                if isinstance(reply, Exception):
                    raise reply
                yield reply, last
        finally:
            watching.cancel()
            self._batcher.leave(job)

    async def _events(
        self,
        writer: replies.Writer,
        first: tuple[Reply, bool],
        looks: AsyncGenerator[tuple[Reply, bool], None],
    ) -> AsyncIterator[bytes]:
        """The stream; a fault ends it, without [DONE]."""
        async with aclosing(looks):
            yield replies.event(writer.opening())
            try:
                for chunk in writer.chunks(*first):
                    yield replies.event(chunk)
                async for look in looks:
                    for chunk in writer.chunks(*look):
                        yield replies.event(chunk)
            except ClientDisconnect:
                return
            except Exception as error:
                yield replies.event({"error": described(fault_of(error))})
                return
            yield replies.event("[DONE]")


def fault_of(error: Exception) -> Fault:
    """What a client is told of an error."""
    if isinstance(error, Fault):
        return error
    if isinstance(error, (DataError, ConfigError)):
        return Fault(str(error))
    if isinstance(error, Stopping):
        return Fault(str(error), status=503)
    if not isinstance(error, Failed):
        log_fault("a request", error)
    return Fault("the request could not be answered; the log of the server says where", status=500)
