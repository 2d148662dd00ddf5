"""A conversation as clients of OpenAI send it -> a row for the model."""

from __future__ import annotations

import base64
import binascii
import re
import secrets
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from medmoe_jax.data import images
from medmoe_jax.responder import Request, Responder, tagged
from medmoe_jax.sampling import Sampling
from medmoe_jax.serve.fields import Body, Fault, Message

SYSTEM = ("system", "developer")
LETTERS = 64  # of a conversation for each position of the model; a token has fewer
DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+)(?:;[^;,]{0,99}){0,9};base64,", re.ASCII)
DICOM = "application/dicom"


@dataclass(frozen=True)
class Limits:
    """What one request may hold.

    Attributes:
      body: bytes.
      images: of all turns together.
      pixels: of an image as it is sent; a DICOM file may have `data.size.MAX_PIXELS`.
    """

    body: int = 32 << 20
    images: int = 4
    pixels: int = 25_000_000


@dataclass(frozen=True)
class Asked:
    """A request that can be answered.

    Attributes:
      request: the row.
      how: settings of generation.
      tokens: of the prompt, images included.
      warnings: to be told with the answer.
    """

    request: Request
    how: Sampling
    tokens: int
    warnings: tuple[str, ...]


def read(body: Body, model: Responder, limits: Limits) -> Asked:
    """What a request asks of the model.

    The images of a message come before its text, as in training. The system text of the templates
    is fixed, so that of a client goes in front of the first question. Without a seed, every
    request draws anew; with one, as `Sampling.seed` does.

    Raises:
      Fault: the conversation has another form, or is larger than the limits.
      DataError: an image cannot be read, or the prompt does not fit the model.
      ConfigError: a setting is out of its range.
    """
    positions = model.config.llm.max_positions
    preface, turns = _turns(body.messages)
    texts = [turn.text for turn in turns]
    if sum(map(len, [*preface, *texts])) > LETTERS * positions:
        raise Fault(
            f"the texts have more than {LETTERS * positions} letters, and the model {positions} "
            "positions; send less",
            param="messages",
        )
    texts[0] = "\n".join([*preface, texts[0]])
    pictures, tags, shown = _pictures(body.messages, model, limits)
    most = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    how = Sampling(
        temperature=body.temperature,
        top_k=body.top_k,
        top_p=body.top_p,
        repetition_penalty=body.repetition_penalty,
        max_new_tokens=Sampling.max_new_tokens if most is None else min(most, positions),
        stop=tuple(body.stop),
        seed=body.seed or 0,
    )
    drawn = how.temperature > 0
    if not drawn:  # settings without effect keep no requests apart
        how = replace(how, top_k=0, top_p=1.0, seed=0)
    row = Request(
        question=texts[-1],
        pictures=pictures,
        options=tuple(body.options),
        seed=secrets.randbits(32) if drawn and body.seed is None else 0,
        tagged=tags,
        earlier=tuple(texts[:-1]),
        shown=shown,
    )
    warnings = ("the system message was put in front of the first question",) if preface else ()
    return Asked(row, how, model.check_request(row), warnings)


def _turns(messages: Sequence[Message]) -> tuple[list[str], list[Message]]:
    """The texts of the system messages, and the turns behind them."""
    preface = [m for m in messages if m.role in SYSTEM]
    turns = list(messages[len(preface) :])
    wanted = ["user", "assistant"] * len(turns)
    if len(turns) % 2 == 0 or [m.role for m in turns] != wanted[: len(turns)]:
        raise Fault(
            "messages: behind those of the system, user and assistant take turns, beginning and "
            "ending with the user; join messages of the same role",
            param="messages",
        )
    for place, message in enumerate(messages):
        if message.role == "user" and not message.content:
            raise Fault(f"messages.{place} is empty; ask something", param=f"messages.{place}")
        if message.role != "user" and message.urls:
            raise Fault(
                f"messages.{place} is of the {message.role} and holds an image; show images in "
                "messages of the user",
                param=f"messages.{place}",
            )
    return [m.text for m in preface], turns


def _pictures(
    messages: Sequence[Message], model: Responder, limits: Limits
) -> tuple[np.ndarray, tuple[str, ...], tuple[int, ...]]:
    """The images of a conversation, what DICOM files say they are, and how many images each message
    of the user has."""
    urls = {
        f"messages.{place}.content.{part}": url
        for place, message in enumerate(messages)
        for part, url in message.urls.items()
    }
    if len(urls) > limits.images:
        raise Fault(
            f"the conversation shows {len(urls)} images; {limits.images} are allowed",
            param="messages",
        )
    shown = tuple(len(message.urls) for message in messages if message.role == "user")
    found = [_picture(url, name, model, limits) for name, url in urls.items()]
    pixels = np.stack([picture for picture, _ in found]) if found else model.pixels(None)
    return pixels, tuple(sorted({tag for _, tags in found for tag in tags})), shown


def _picture(
    url: str, name: str, model: Responder, limits: Limits
) -> tuple[np.ndarray, tuple[str, ...]]:
    """An image as the tower sees it, and what a DICOM file says it is."""
    param = f"{name}.image_url.url"
    head = DATA_URL.match(url)
    if head is None:
        raise Fault(
            f"{param} is no data URL. This server fetches no addresses and opens no files; send "
            "the image itself, as in data:image/png;base64,...",
            param=param,
        )
    try:
        content = base64.b64decode("".join(url[head.end() :].split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise Fault(f"{param} is broken base64: {error}", param=param) from error
    if head[1].lower() != DICOM:
        return images.load_encoded(content, name, model.spec, limits.pixels), ()
    with tempfile.TemporaryDirectory() as folder:  # pydicom decodes files
        file = Path(folder) / f"{name}.dcm"
        file.write_bytes(content)
        return images.load_image(file, model.spec), tagged(file)
