"""The server's answers are those of the model; what it refuses, and how it says so."""

from __future__ import annotations

import asyncio
import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import tiny_service
from tiny_server import Answer, alone, body, data_url, held, image, running, shown

import medmoe_jax
from medmoe_jax.config import MoeConfig
from medmoe_jax.conversation import NOTICE
from medmoe_jax.data import templates, tokens
from medmoe_jax.model import Model, Request
from medmoe_jax.responder import Responder
from medmoe_jax.sampling import Sampling
from medmoe_jax.serve import app as serving
from medmoe_jax.serve import fields, messages

pytestmark = pytest.mark.usefixtures("quick_compile")
HOW = Sampling(max_new_tokens=12)
FIRST, THEN = "Is there a lesion in the left lung?", "What is seen in this image?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("serve") / "model"
    return tiny_service.save(path, tiny_service.config("phi", MoeConfig()))


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return medmoe_jax.load(folder)


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (10, 12, 3), np.uint8)


# --- answers ---


def test_an_answer_is_that_of_generate(model: Model, picture: np.ndarray) -> None:
    """As a whole and as a stream, with all that comes with it."""
    want = model.generate(FIRST, picture, HOW)
    sent = body(shown(FIRST, picture), max_tokens=12, logprobs=True)
    answer = alone(model, sent).json
    assert answer["object"] == "chat.completion" and answer["model"] == "tiny"
    [choice] = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": want.text, "refusal": None}
    assert choice["finish_reason"] == ("stop" if want.finished else "length")
    told = choice["logprobs"]["content"]
    assert [one["logprob"] for one in told] == pytest.approx(want.log_probs, rel=1e-4)
    assert [one["token"] for one in told] == [model.tokenizer.decode([i]) for i in want.ids]
    for one in told:
        half = "\ufffd" in one["token"]
        assert one["bytes"] is None if half else bytes(one["bytes"]).decode() == one["token"]
    asked = len(tokens.encode_prompt(templates.prompt("phi", FIRST), model.tokenizer))
    asked += model.config.vision.patches - 1
    assert answer["usage"] == {
        "prompt_tokens": asked,
        "completion_tokens": len(want.ids),
        "total_tokens": asked + len(want.ids),
    }
    extras = answer["medmoe"]
    assert extras["confidence"] == pytest.approx(want.confidence, rel=1e-4)
    assert extras["modality"] == pytest.approx(want.modality, rel=1e-4)
    assert (extras["options"], extras["warnings"], extras["notice"]) == (None, [], NOTICE)

    stream = alone(model, sent | {"stream": True, "stream_options": {"include_usage": True}})
    assert stream.headers["content-type"].startswith("text/event-stream")
    assert stream.events[-1] == "[DONE]"
    *chunks, last, usage = [json.loads(event) for event in stream.events[:-1]]
    assert {chunk["object"] for chunk in (*chunks, last, usage)} == {"chat.completion.chunk"}
    pieces = [chunk["choices"][0]["delta"]["content"] for chunk in chunks]
    assert "".join(pieces) == want.text and len(pieces) > 3
    assert last["choices"][0]["finish_reason"] == choice["finish_reason"]
    assert last["medmoe"]["modality"] == pytest.approx(want.modality, rel=1e-4)
    assert (usage["choices"], usage["usage"]) == ([], answer["usage"])
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    again = [one for part in parts if part for one in part["content"]]
    assert [one["token"] for one in again] == [one["token"] for one in told]


def test_several_turns_are_one_prompt(model: Model, picture: np.ndarray) -> None:
    """Images are where they were shown; what the model reads is what the chat reads."""
    said = [
        {"role": "user", "content": f"<image> {FIRST}"},
        {"role": "assistant", "content": "yes", "refusal": None, "annotations": []},
        {"role": "user", "content": shown(THEN, picture)},
    ]
    answer = alone(model, body(messages=said, max_completion_tokens=12, max_tokens=3))
    text = templates.prompt("phi", FIRST, 0) + templates.answer("phi", "yes").text
    ids = tokens.encode_prompt(text + templates.follow_up("phi", THEN, 1), model.tokenizer)
    row = Request(THEN, model.pixels(picture), earlier=(FIRST, "yes"), shown=(0, 1))
    assert (
        tokens.IMAGE_ID in ids and model.check_request(row) == answer.json["usage"]["prompt_tokens"]
    )
    rendered = Responder._prompt(model, row)
    assert [i for i, at in zip(rendered.tokens, rendered.image_pos, strict=True) if at < 0] == [
        i for i in ids if i != tokens.IMAGE_ID
    ]
    first = list(rendered.image_pos >= 0).index(True)
    assert first == ids.index(tokens.IMAGE_ID)
    assert answer.text == model.answer([row], HOW)[0].text


def test_options_are_weighed(model: Model) -> None:
    sent = body(FIRST, options=["yes", "no"])
    assert alone(held(model, 1), sent).json["medmoe"]["options"] == {"yes": 0.5, "no": 0.5}


def read(model: Model, **sent: Any) -> messages.Asked:
    """What a request asks."""
    content = json.dumps(body(**{"question": FIRST} | sent)).encode()
    return messages.read(fields.parse(content), model, messages.Limits())


def test_settings_reach_the_model(model: Model) -> None:
    given = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "repetition_penalty": 1.25}
    asked = read(model, **given, seed=-3, stop="x", max_tokens=7, user="me", n=1, tools=None)
    assert asked.how == Sampling(**given, seed=-3, stop=("x",), max_new_tokens=7)
    assert asked.request.seed == 0 and asked.warnings == ()
    # Without a seed rows of one batch draw anew, and settings that play no part keep none apart.
    first, second = (read(model, temperature=1.0, stop=["a", "b"]) for _ in range(2))
    assert first.how == second.how == Sampling(temperature=1.0, stop=("a", "b"))
    assert first.request.seed != second.request.seed
    greedy = read(model, top_p=0.5, top_k=3, seed=4, max_tokens=10**9)
    assert greedy.how == Sampling(max_new_tokens=model.config.llm.max_positions)
    assert greedy.request.seed == 0 and read(model).how == Sampling()


def test_a_system_message_is_put_in_front(model: Model) -> None:
    said = [
        {"role": "system", "content": "Be short."},
        {"role": "developer", "content": [{"type": "text", "text": "One word."}]},
        {"role": "user", "content": FIRST},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": THEN},
    ]
    asked = read(model, messages=said)
    assert asked.request.earlier == (f"Be short.\nOne word.\n{FIRST}", "no")
    assert asked.request.question == THEN and "system message" in asked.warnings[0]


def test_images_come_before_the_text(model: Model, picture: np.ndarray) -> None:
    """In their order, at any size and of any kind."""
    urls = [data_url(picture), data_url(picture[:5], "jpeg").replace(",", ",\n"), data_url(picture)]
    content = [image(urls[0]), {"type": "text", "text": "a"}, image(urls[1])]
    content.append({"type": "text", "text": "b"})
    said = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": [image(urls[2].replace("png;", "png;name=x.png;"))]},
    ]
    request = read(model, messages=said).request
    assert request.earlier == ("a\nb", "") and request.question == "" and request.shown == (2, 1)
    assert request.pictures.shape == (3, 8, 8, 3)
    assert (request.pictures[[0, 2]] == model.pixels(picture)).all()


def test_a_dicom_file_is_an_image(model: Model) -> None:
    file = Path(pydicom.__path__[0]) / "data/test_files/CT_small.dcm"
    url = f"data:application/dicom;base64,{base64.b64encode(file.read_bytes()).decode()}"
    request = read(model, question=[image(url)]).request
    assert (request.pictures == model.pixels(file)).all() and request.tagged == ("CT",)


# --- refusals ---

ASK = {"role": "user", "content": "What?"}
SAY = {"role": "assistant", "content": "This."}


@pytest.mark.parametrize(
    ("sent", "param", "message"),
    [
        ({"n": 2}, "n", "n has no meaning"),
        ({"tools": [{"type": "function"}]}, "tools", "tools has no meaning"),
        ({"response_format": {"type": "json_object"}}, "response_format", "no meaning"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "no meaning"),
        ({"top_logprobs": 3}, "top_logprobs", "no meaning"),
        ({"min_p": 0.1}, "min_p", "min_p has no meaning"),
        ({"max_tokens": 0}, None, "max_new_tokens is 0"),
        ({"max_tokens": 2.5}, "max_tokens", "max_tokens: Input should be a valid integer"),
        ({"temperature": "0"}, "temperature", "valid number"),
        ({"temperature": 2.5}, "temperature", "less than or equal to 2"),
        ({"temperature": -1}, None, "temperature is -1.0, must be 0 or more"),
        ({"top_p": 0}, None, r"top_p is 0.0, must be in \(0, 1\]"),
        ({"stop": ""}, None, "empty text"),
        ({"stop": [1]}, "stop.0", "valid string"),
        ({"options": ["yes", "yes"]}, None, "'yes' is given twice"),
        ({"options": [str(n) for n in range(17)]}, "options", "at most 16"),
        ({"stream": "yes"}, "stream", "valid boolean"),
        ({"model": "gpt-5"}, "model", "has no model of that name; it has tiny"),
        ({"model": None}, "model", "Field required"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [SAY]}, "messages", "user and assistant take turns"),
        ({"messages": [ASK, ASK]}, "messages", "take turns"),
        ({"messages": [ASK, SAY]}, "messages", "take turns"),
        ({"messages": [ASK, {"role": "system", "content": "x"}]}, "messages", "take turns"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "Input should be"),
        ({"messages": [{"role": "user", "content": []}]}, "messages.0", "is empty"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content", "valid list"),
        ({"question": [{"type": "input_audio"}]}, "messages.0.content.0.type", "'image_url'"),
        ({"question": [{"type": "text"}]}, "messages.0.content.0", "the field text alone"),
        (
            {"question": [image("https://example.org/a.png")]},
            "messages.0.content.0.image_url.url",
            "no data URL. This server fetches no addresses and opens no files",
        ),
        ({"question": [image("/etc/passwd")]}, "messages.0.content.0.image_url.url", "no data URL"),
        ({"question": [image("file:///a.png")]}, "messages.0.content.0.image_url.url", "no data"),
        (
            {"question": [image("data:image/png;base64,A")]},
            "messages.0.content.0.image_url.url",
            "broken base64",
        ),
        (
            {"question": [image("data:image/svg+xml;base64,PHN2Zy8+")]},
            None,
            r"image 'messages.0.content.0' cannot be read: it is none of PNG",
        ),
        ({"question": [image("data:application/dicom;base64,AAAA")]}, None, "DICOM"),
        (
            {"messages": [ASK, SAY | {"content": [image("data:image/png;base64,")]}, ASK]},
            "messages.1",
            "of the assistant and holds an image",
        ),
        ({"question": "word " * 4000}, None, "2048 positions. Ask less at once"),
        ({"question": "x" * 200_000}, "messages", "more than 131072 letters"),
    ],
)
def test_what_cannot_be_answered_is_refused(
    model: Model, sent: dict[str, Any], param: str | None, message: str
) -> None:
    answer = alone(held(model), body(**{"question": "What?"} | sent))
    assert answer.status == (404 if sent.get("model") else 400)
    error = answer.error
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and error["param"] == param
    assert re.search(message, error["message"]), error["message"]
    if "no meaning" in message:
        assert error["code"] == "unsupported_parameter"


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"model": "\\ud800"}', b"\xff", b'{"seed": NaN}']
)
def test_a_body_that_is_none_is_refused(model: Model, content: bytes) -> None:
    answer = alone(held(model), content)
    assert answer.status == 400 and "the body of the request is no JSON" in answer.error["message"]


def test_limits(model: Model, picture: np.ndarray) -> None:
    def refused(sent: Any, **limits: int) -> Answer:
        return alone(held(model), sent, limits=messages.Limits(**limits))

    two = body(shown(FIRST, picture, picture))
    answer = refused(two, images=1)
    assert answer.status == 400 and "shows 2 images; 1 are allowed" in answer.error["message"]
    answer = refused(two, pixels=119)
    assert answer.status == 400 and "12 x 10 pixels; 119 are allowed" in answer.error["message"]
    answer = refused(two, body=500)
    assert answer.status == 413 and "more than 500 bytes" in answer.error["message"]


def test_what_arrives_too_slowly_is_given_up(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "BODY_SECONDS", 0)

    async def scenario() -> Answer:
        async with running(held(model)) as client:
            return await client.ask(body(), sends=False)

    answer = asyncio.run(scenario())
    assert answer.status == 408 and "did not arrive within 0 seconds" in answer.error["message"]


# --- other addresses ---


def test_the_model_and_the_health_are_told(model: Model) -> None:
    listed = alone(model, None, "/v1/models").json
    [one] = listed["data"]
    assert listed["object"] == "list" and one["id"] == "tiny" and one["object"] == "model"
    assert alone(model, None, "/v1/models/tiny").json["id"] == "tiny"
    absent = alone(model, None, "/v1/models/other")
    assert absent.status == 404 and absent.error["code"] == "model_not_found"
    health = alone(model, None, "/health")
    assert health.status == 200 and health.json == {
        **{"status": "ok", "model": "tiny", "busy": False},
        **{"running": 0, "waiting": 0},
    }
    for sent, path, status in ((None, "/v1/chat/completions", 405), (None, "/v1/none", 404)):
        answer = alone(model, sent, path)
        assert answer.status == status and "POST /v1/chat/completions" in answer.error["message"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/models"])
def test_a_key_is_asked_for(model: Model, path: str) -> None:
    sent = body() if "chat" in path else None
    for wrong in ("", "other", "schlüssel", "ä"):
        answer = alone(held(model), sent, path, key="schlüsse", send_key=wrong)
        assert answer.status == 401 and answer.error["code"] == "invalid_api_key", wrong
    assert alone(held(model, 1), sent, path, key="schlüssel", send_key="schlüssel").status == 200
    assert alone(model, None, "/health", key="schlüssel").status == 200
