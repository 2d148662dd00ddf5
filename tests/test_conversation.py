"""Conversations: the cache of earlier turns gives what the whole conversation read anew gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny_service

import medmoe_jax
from medmoe_jax.config import MoeConfig
from medmoe_jax.conversation import Chat, Pieces
from medmoe_jax.data import merge, templates, tokens
from medmoe_jax.data.problems import DataError
from medmoe_jax.model import Model
from medmoe_jax.sampling import Sampling

pytestmark = pytest.mark.usefixtures("quick_compile")

QUESTIONS = ["Is there a lesion?", "Why?", "And what is shown in this image?"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("chat") / "model"
    return medmoe_jax.load(tiny_service.save(folder, tiny_service.config("phi", MoeConfig())))


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    """Three images."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (10, 12, 3), np.uint8) for _ in range(3)]


def anew(model: Model, ids: list[int], shown: list[Any], how: Sampling, seed: int) -> tuple:
    """Ids that follow a whole conversation (IMAGE_ID = an image) that is read at once."""
    requests = [model.request("unused", shown, seed=seed)]

    def prompt(self: Model, request: Any) -> Any:
        return merge.expand(ids, None, self.config.vision.patches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Model, "_prompt", prompt)
        return model.answer(requests, how)[0].ids


def history(model: Model, chat: Chat, said: list[tuple[int, ...]], counts: list[int]) -> list[int]:
    """Ids of the turns so far and of the next question, from the templates: the answers as they
    were said, closed by the end mark; those cut at a stop text as their text."""
    asked = [*chat.turns[::2], QUESTIONS[len(said)]]
    text = templates.prompt("phi", asked[0], counts[0])
    ids = tokens.encode_prompt(text, model.tokenizer)
    end = model.tokenizer.eos_token_id
    for place, answer in enumerate(said):
        if chat.sampling.stop and any(s in model.tokenizer.decode(answer) for s in STOPS):
            ids += [*model.tokenizer(f" {chat.turns[2 * place + 1]}").input_ids, end]
        else:
            ids += [*answer] if answer[-1] == end else [*answer, end]
        later = templates.follow_up("phi", asked[place + 1], counts[place + 1])
        ids += tokens.encode_prompt(later, model.tokenizer)
    return ids


STOPS = ("mage", "' b", "ing")


@pytest.mark.parametrize(
    "how",
    [
        Sampling(max_new_tokens=24),
        Sampling(max_new_tokens=3),
        Sampling(max_new_tokens=24, stop=STOPS),
        Sampling(max_new_tokens=24, stop=STOPS, repetition_penalty=1.3),
        Sampling(max_new_tokens=12, temperature=1.0, seed=2),
    ],
    ids=["end or length", "length", "stop texts", "penalty", "drawn"],
)
def test_cache_is_the_whole_conversation(
    model: Model, pictures: list[np.ndarray], how: Sampling
) -> None:
    """Three turns, two images in the first and one in the third."""
    chat = model.chat(how)
    shown = [pictures[:2], None, pictures[2:]]
    said: list[tuple[int, ...]] = []
    for turn, question in enumerate(QUESTIONS):
        ids = history(model, chat, said, [2, 0, 1])
        seen = [p for those in shown[: turn + 1] for p in those or []]
        want = anew(model, ids, seen, how, seed=2 * turn)
        reply = chat.ask(question, shown[turn])
        assert reply.ids == want, turn
        assert chat.reply == reply and chat.turns[-2:] == [question, reply.text]
        said.append(reply.ids)


def test_after_stop_texts_the_texts_are_the_conversation(
    model: Model, pictures: list[np.ndarray]
) -> None:
    """What `templates.prompt` makes of the texts is what the model has read."""
    chat = model.chat(Sampling(max_new_tokens=24, stop=("mage", "ing")))
    first = chat.ask(QUESTIONS[0], pictures[0])
    assert first.finished and first.ids[-1] != model.tokenizer.eos_token_id and first.text
    text = templates.prompt("phi", [QUESTIONS[0], first.text, QUESTIONS[1]])
    ids = tokens.encode_prompt(text, model.tokenizer)
    want = anew(model, ids, pictures[:1], chat.sampling, seed=2)
    assert chat.ask(QUESTIONS[1]).ids == want


def test_first_turn_is_a_question_alone(model: Model, pictures: list[np.ndarray]) -> None:
    how = Sampling(max_new_tokens=10)
    chat = model.chat(how)
    reply = chat.ask(QUESTIONS[0], pictures[0])
    alone = model.generate(QUESTIONS[0], pictures[0], how)
    assert (reply.ids, reply.text, reply.finished) == (alone.ids, alone.text, alone.finished)
    assert reply.modality == pytest.approx(alone.modality, abs=1e-4)
    # text alone says nothing new about the modality; a new image does
    assert chat.ask(QUESTIONS[1]).modality == reply.modality
    assert chat.ask(QUESTIONS[2], pictures[1]).modality != reply.modality
    chat.reset()
    assert chat.turns == [] and chat.reply is None
    assert chat.ask(QUESTIONS[0], pictures[0]) == reply


@pytest.mark.parametrize("stop", [(), ("mage",), ("' bet@", "e")])
def test_pieces_are_the_answer(model: Model, pictures: list[np.ndarray], stop: Any) -> None:
    how = Sampling(max_new_tokens=20, stop=stop)
    for question, shown in ((QUESTIONS[0], pictures[0]), (QUESTIONS[2], None)):
        chat = model.chat(how)
        pieces = list(chat.stream(question, shown))
        assert chat.reply is not None and chat.reply.ids == model.generate(question, shown, how).ids
        assert "".join(pieces) == chat.reply.text and all(pieces)
        assert "".join(model.stream(question, shown, how)) == chat.reply.text


class Letters:
    """A tokenizer whose ids are bytes of UTF-8; 0 ends."""

    eos_token_id = 0

    def decode(self, ids: Any, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return bytes(i for i in ids if i).decode("utf-8", errors="replace")


@pytest.mark.parametrize(
    ("text", "stop"),
    [
        ("Größe: 3 µm, 病変 🫁.", ()),
        ("  🫁🫁  ", ()),
        ("ja. \n\nUSER: nein", ("\n\nUSER:",)),
        ("a##b###c", ("###", "#x")),
        ("ababac", ("abac",)),
        ("cut at the end: µ", ("µµ",)),
        ("x stop y", ("stop", "op y")),
    ],
)
def test_pieces_are_whole_characters(model: Model, text: str, stop: Any) -> None:
    """Byte by byte: no piece holds half a character or part of a stop text, none is taken back."""
    fake = Model({}, model.config, Letters(), model.spec, "phi", model.dtype)
    chat = Chat(fake, Sampling(stop=stop))
    pieces = Pieces(chat.sampling.stop)
    ids, said, reply = [*text.encode(), 0], "", None
    for n in range(1, len(ids) + 1):
        reply = fake._reply(ids[:n], [0.0] * n, chat.sampling)
        if reply.finished:
            break
        said += (piece := pieces.more(reply.text))
        assert pieces.said == said and reply.text.startswith(said) and "\ufffd" not in piece
    assert reply is not None and reply.finished
    places = [text.find(s) for s in stop if s in text]
    assert reply.text == text[: min(places)].strip() if places else text.strip()
    assert said + pieces.more(reply.text, whole=True) == reply.text


def test_a_listener_who_leaves(model: Model, pictures: list[np.ndarray]) -> None:
    """The turn is what was said until then, and the conversation goes on from there."""
    chat = model.chat(Sampling(max_new_tokens=24))
    stream = chat.stream(QUESTIONS[0], pictures[0])
    next(stream)
    stream.close()
    assert chat.reply is not None and not chat.reply.finished and len(chat.reply.ids) < 24
    ids = history(model, chat, [chat.reply.ids], [1, 0])
    want = anew(model, ids, pictures[:1], chat.sampling, seed=2)
    assert chat.ask(QUESTIONS[1]).ids == want


def test_a_question_that_cannot_be_asked_changes_nothing(
    model: Model, pictures: list[np.ndarray]
) -> None:
    chat = model.chat(Sampling(max_new_tokens=5))
    chat.ask(QUESTIONS[0], pictures[0])
    before = [*chat.turns]
    with pytest.raises(DataError, match=r"absent\.png"):
        chat.ask("And this?", "absent.png")
    with pytest.raises(DataError, match="2048 positions"):
        chat.ask("what " * 3000)
    assert chat.turns == before
    ids = history(model, chat, [chat.reply.ids if chat.reply else ()], [1, 0])
    want = anew(model, ids, pictures[:1], chat.sampling, seed=2)
    assert chat.ask(QUESTIONS[1]).ids == want
