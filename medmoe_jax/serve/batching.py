"""One thread owns the device: requests that wait at the same time are answered in one batch."""

from __future__ import annotations

import logging
import threading
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax

from medmoe_jax.responder import Reply, Request, Responder
from medmoe_jax.sampling import Sampling

_log = logging.getLogger("medmoe_jax.serve")


class Stopping(RuntimeError):
    """Nothing new is taken any more."""


class Failed(RuntimeError):
    """A request could not be answered; the log has the reason."""


@dataclass(eq=False)
class Job:
    """A request on its way.

    Attributes:
      request: what is asked.
      how: settings of generation.
      stream: every id is told as it comes; otherwise the whole reply alone.
      tell: called in the worker's thread with the reply so far, or that it failed, and with whether
        nothing more will come.
      heard: something was told.
      over: nothing more is to be told: all was, or nobody waits for it.
    """

    request: Request
    how: Sampling
    stream: bool
    tell: Callable[[Reply | Failed, bool], Any]
    heard: bool = field(default=False, init=False)
    over: bool = field(default=False, init=False)

    @property
    def kind(self) -> tuple[Any, ...]:
        """What the jobs of a batch have in common: settings, and what decides their memory."""
        return self.how, self.stream, len(self.request.pictures), len(self.request.options)

    def hear(self, told: Reply | Failed, last: bool) -> None:
        """Tells it to whoever waits."""
        if not self.over:
            self.heard, self.over = True, last
            self.tell(told, last)


class Batcher:
    """Takes jobs from any thread and answers them in its own.

    Batches are filled up to `rows`, or have one row, so that few programs are compiled.
    """

    def __init__(self, model: Responder, rows: int) -> None:
        self._model, self._rows = model, rows
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="answers", daemon=True)

    def start(self) -> None:
        """Begins to answer."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Puts a job at the end of those that wait. Raises Stopping after `stop`."""
        with self._changed:
            if self._stopping:
                raise Stopping("the server is stopping; ask again when it is back")
            self._waiting.append(job)
            self._changed.notify()

    def leave(self, job: Job) -> None:
        """Nobody waits for the job any more: its place is free, and nothing is told."""
        with self._changed:
            job.over = True
            if job in self._waiting:
                self._waiting.remove(job)

    def stop(self) -> None:
        """Takes nothing new, and returns when all that was taken is answered."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def counts(self) -> dict[str, int]:
        """How many jobs are running and waiting."""
        with self._changed:
            return {"running": len(self._running), "waiting": len(self._waiting)}

    @property
    def works(self) -> bool:
        """Whether jobs are taken and answered."""
        return self._thread.is_alive() and not self._stopping

    def _places(self, job: Job) -> int:
        """Rows of the largest batch with this job: every option takes the memory of a row."""
        options = max(1, len(job.request.options))
        return max(1, self._rows >> (options - 1).bit_length())

    def _work(self) -> None:
        while True:
            with self._changed:
                self._running = []
                while not self._waiting:
                    if self._stopping:
                        return
                    self._changed.wait()
                first = self._waiting[0]
                alike = [job for job in self._waiting if job.kind == first.kind]
                self._running = alike[: self._places(first)]
                for job in self._running:
                    self._waiting.remove(job)
            self._answer(self._running)

    def _answer(self, jobs: list[Job]) -> None:
        """Answers a batch. Where it fails, those who heard nothing yet are asked alone, so that one
        request that cannot be answered costs the others no more than time."""
        try:
            return self._batch(jobs)
        except Exception as error:
            log_fault(f"a batch of {len(jobs)}", error)
        # Behind the handler, which keeps the arrays of the batch.
        for job in jobs:
            if len(jobs) > 1 and not (job.heard or job.over):
                self._answer([job])
            else:
                job.hear(Failed(), True)

    def _batch(self, jobs: list[Job]) -> None:
        first, replies = jobs[0], []
        rows = self._places(first) if len(jobs) > 1 else 1
        requests, every = [job.request for job in jobs], 1 if first.stream else 0
        for replies in self._model.growing(requests, first.how, rows, every):
            for job, reply in zip(jobs, replies, strict=True):
                if job.stream or reply.finished:
                    job.hear(reply, reply.finished)
            if all(job.over for job in jobs):
                return
        for job, reply in zip(jobs, replies, strict=True):
            job.hear(reply, True)


def log_fault(what: str, error: Exception) -> None:
    """Logs where something failed; not the error's text, which may repeat what was asked, unless it
    is the device's."""
    said = f": {error}" if isinstance(error, jax.errors.JaxRuntimeError) else ""
    place = "".join(traceback.format_tb(error.__traceback__))
    _log.error(f"{what} failed, {type(error).__name__}{said}\n{place}")
