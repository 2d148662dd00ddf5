"""Replies of the model -> what OpenAI's chat completions send, with what they have no field for in
`medmoe`."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

from medmoe_jax.conversation import NOTICE, Pieces
from medmoe_jax.responder import UNFINISHED, Reply, Responder
from medmoe_jax.serve.fields import Body
from medmoe_jax.serve.messages import Asked


class Writer:
    """Writes the answer to one request, whole or in chunks."""

    def __init__(self, body: Body, asked: Asked, model: Responder) -> None:
        self._body, self._asked, self._model = body, asked, model
        self._id, self._created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        self._pieces = Pieces(model.with_stop(asked.how).stop)
        self._told = 0  # ids whose probabilities were sent

    def completion(self, reply: Reply) -> dict[str, Any]:
        """The whole answer."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": reply.text, "refusal": None},
            "logprobs": self._log_probs(reply),
            "finish_reason": _reason(reply),
        }
        usage, extras = self._usage(reply), self._extras(reply)
        return {**self._head("chat.completion", [choice]), "usage": usage, "medmoe": extras}

    def opening(self) -> dict[str, Any]:
        """The first chunk of a stream, without text."""
        return self._chunk({"role": "assistant", "content": ""})

    def chunks(self, reply: Reply, last: bool) -> list[dict[str, Any]]:
        """What a growing reply brings: nothing, text, or with the last one all that ends it."""
        piece = self._pieces.more(reply.text, last)
        sent = []
        if piece or last:
            sent.append(self._chunk({"content": piece}, self._log_probs(reply)))
        if last:
            sent.append({**self._chunk({}, reason=_reason(reply)), "medmoe": self._extras(reply)})
            if self._body.stream_options.include_usage:
                usage = self._usage(reply)
                sent.append({**self._head("chat.completion.chunk", []), "usage": usage})
        return sent

    def _head(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        head = {"id": self._id, "object": kind, "created": self._created}
        return {**head, "model": self._body.model, "choices": choices}

    def _chunk(
        self, delta: dict[str, Any], log_probs: dict[str, Any] | None = None, reason: Any = None
    ) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": log_probs, "finish_reason": reason}
        return self._head("chat.completion.chunk", [choice])

    def _usage(self, reply: Reply) -> dict[str, int]:
        """Tokens: an image has one a patch, and the end mark is one."""
        asked, said = self._asked.tokens, len(reply.ids)
        names = ("prompt_tokens", "completion_tokens", "total_tokens")
        return dict(zip(names, (asked, said, asked + said), strict=True))

    def _extras(self, reply: Reply) -> dict[str, Any]:
        return {
            "confidence": reply.confidence,
            "modality": reply.modality,
            "options": reply.options,
            "warnings": [*self._asked.warnings, *reply.warnings],
            "notice": NOTICE,
        }

    def _log_probs(self, reply: Reply) -> dict[str, Any] | None:
        """Of the ids that were not sent yet; None where nobody asked. A token that is not whole
        characters has no bytes of its own."""
        if not self._body.logprobs:
            return None
        first, self._told = self._told, len(reply.ids)
        content = []
        for token, log_prob in zip(reply.ids[first:], reply.log_probs[first:], strict=True):
            text = self._model.tokenizer.decode([token])
            code = None if UNFINISHED in text else list(text.encode())
            content.append({"token": text, "logprob": log_prob, "bytes": code, "top_logprobs": []})
        return {"content": content, "refusal": None}


def _reason(reply: Reply) -> str:
    return "stop" if reply.finished else "length"


def event(content: dict[str, Any] | str) -> bytes:
    """A server-sent event. JSON has no line feeds of its own, so one line holds it."""
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    return f"data: {text}\n\n".encode()
