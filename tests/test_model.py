"""A loaded model: answers, batches, images of all kinds, scores, stop texts, errors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny_data
import tiny_service
from PIL import Image

import medmoe_jax
from medmoe_jax import losses, responder
from medmoe_jax.checkpoint import load_model
from medmoe_jax.config import MODALITIES, ConfigError, MoeConfig
from medmoe_jax.data import merge, templates, tokens
from medmoe_jax.data.problems import DataError
from medmoe_jax.model import Model, Reply
from medmoe_jax.models import medmoe
from medmoe_jax.sampling import Sampling

pytestmark = pytest.mark.usefixtures("quick_compile")

SHORT = Sampling(max_new_tokens=10)
QUESTIONS = ["Is there a lesion?", "What is shown in this image?", "Why?", "Left or right lung?"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder and, beside it, pictures a.png and b.png."""
    root = tmp_path_factory.mktemp("service")
    for seed, name in enumerate("ab"):
        tiny_data.save_image(root / f"{name}.png", seed)
    return tiny_service.save(root / "model", tiny_service.config("phi", MoeConfig()))


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return medmoe_jax.load(folder)


@pytest.fixture(scope="module")
def shown(folder: Path) -> list[Any]:
    """One image, none, two and one, as a file, a PIL image and arrays."""
    a, b = folder.parent / "a.png", folder.parent / "b.png"
    with Image.open(b) as image:
        pil = image.copy()
    return [str(a), None, [pil, np.asarray(Image.open(a))], b]


@pytest.fixture(scope="module")
def replies(model: Model, shown: list[Any]) -> list[Reply]:
    """Greedy answers to all questions in one batch."""
    return model.generate(QUESTIONS, shown, SHORT)


def assert_same(a: Reply, b: Reply) -> None:
    """Equal answers; numbers to rounding."""
    assert (a.text, a.ids, a.finished) == (b.text, b.ids, b.finished)
    np.testing.assert_allclose(a.log_probs, b.log_probs, atol=1e-4)
    for first, second in ((a.modality, b.modality), (a.options, b.options)):
        assert (first is None) == (second is None)
        if first is not None and second is not None:
            assert list(first) == list(second)
            np.testing.assert_allclose(list(first.values()), list(second.values()), atol=1e-4)


@pytest.fixture(scope="module")
def exact(model: Model, folder: Path) -> Any:
    """A function of a question, pictures and answer ids: their log-likelihood and the posterior of
    the prompt, by the training forward pass with the stacked parameters, one row at a time."""
    params, _ = load_model(folder)

    @jax.jit
    def forward(batch: dict[str, Any], prompt: Any) -> Any:
        hidden, reports = medmoe.forward(params, model.config, batch)
        total, _ = losses.answer_loss(hidden, lambda h: medmoe.logits(params, h), batch["labels"])
        return -total[0], losses.posterior(reports["router_logits"], prompt)[0]

    def run(question: str, pictures: Any, answer: list[int]) -> tuple[float, np.ndarray]:
        pixels = model.pixels(pictures)
        text = templates.prompt("phi", question, len(pixels))
        ids = tokens.encode_prompt(text, model.tokenizer)
        row = merge.expand([*ids, *answer], [-100] * len(ids) + answer, model.config.vision.patches)
        images = np.zeros((1, 2, *pixels.shape[1:]), np.uint8)
        images[0, : len(pixels)] = pixels
        prompt = np.arange(128)[None] < len(row.tokens) - len(answer)
        total, posterior = forward(merge.pad_rows([row], 128) | {"images": images}, prompt)
        return float(total), np.asarray(posterior)

    return run


def test_reply(model: Model, replies: list[Reply], exact: Any, shown: list[Any]) -> None:
    """Confidence and posterior are those of the forward pass in training."""
    assert len({r.text for r in replies}) == len(replies)
    assert {r.finished for r in replies} == {True, False}
    end = model.tokenizer.eos_token_id
    for question, pictures, reply in zip(QUESTIONS, shown, replies, strict=True):
        assert len(reply.ids) == len(reply.log_probs) <= SHORT.max_new_tokens
        assert reply.finished == (reply.ids[-1] == end) and end not in reply.ids[:-1]
        assert reply.text == model.tokenizer.decode(reply.ids, skip_special_tokens=True).strip()
        total, posterior = exact(question, pictures, list(reply.ids))
        assert math.log(reply.confidence) == pytest.approx(total, abs=1e-3)
        assert reply.modality is not None and list(reply.modality) == list(MODALITIES)
        np.testing.assert_allclose(list(reply.modality.values()), posterior, atol=1e-4)
        assert sum(reply.modality.values()) == pytest.approx(1)
        assert reply.options is None


def test_alone_and_in_any_batch(model: Model, replies: list[Reply], shown: list[Any]) -> None:
    for question, pictures, reply in zip(QUESTIONS, shown, replies, strict=True):
        assert_same(model.generate(question, pictures, SHORT), reply)
    for size in (1, 3):
        for ours, reply in zip(
            model.generate(QUESTIONS, shown, SHORT, batch_size=size), replies, strict=True
        ):
            assert_same(ours, reply)
    assert model.generate([], []) == []


def test_one_size_of_batch(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last batch, smaller than the others, has the others' shape."""
    shapes = []
    real = Model.batch

    def seen(self: Model, *args: Any) -> Any:
        batch = real(self, *args)
        shapes.append(batch["tokens"].shape)
        return batch

    monkeypatch.setattr(Model, "batch", seen)
    for size, rows in ((3, 3), (4, 4)):
        model.generate(["a", "b", "c", "d", "e"], None, Sampling(max_new_tokens=1), batch_size=size)
        assert {shape[0] for shape in shapes} == {rows}
        shapes.clear()


def test_images_of_all_kinds(model: Model, folder: Path) -> None:
    """A file, its path as text, the PIL image and its pixels are the same image."""
    file = folder.parent / "a.png"
    with Image.open(file) as image:
        pil = image.copy()
    pixels = model.pixels(file)
    assert pixels.shape == (1, 8, 8, 3) and pixels.dtype == np.uint8
    for same in (str(file), pil, np.asarray(pil), [file], (pil,)):
        assert (model.pixels(same) == pixels).all()
    assert model.pixels(None).shape == model.pixels([]).shape == (0, 8, 8, 3)
    assert (model.pixels([file, pil]) == np.repeat(pixels, 2, 0)).all()
    grey = np.asarray(pil.convert("L"))
    assert (model.pixels(grey) == model.pixels(pil.convert("L"))).all()


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4, 5), np.uint8),
        np.zeros((4, 4, 1), np.uint8),
        np.zeros((2, 4, 4, 3), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        [7],
        [b"abc"],
        "absent.png",
    ],
)
def test_what_is_no_image(model: Model, bad: Any) -> None:
    with pytest.raises(DataError, match="image"):
        model.generate("Why?", bad)


def test_other_arguments_that_cannot_work(model: Model) -> None:
    with pytest.raises(DataError, match="2 questions but 1 entries of pictures"):
        model.generate(["a", "b"], [None])
    with pytest.raises(DataError, match=r"has \d+ tokens, images included; the model has 2048"):
        model.generate("what " * 3000)
    for options, message in ((("yes", ""), "''"), ((" ",), "' '"), (("yes", "yes"), "twice")):
        with pytest.raises(DataError, match=f"option.*{message}"):
            model.generate("Why?", options=options)
    with pytest.raises(DataError, match="<image>"):
        model.score(["Why?"], None, [["<image>"]])
    with pytest.raises(DataError, match="2 questions, 2 entries of pictures and 1 of answers"):
        model.score(["a", "b"], None, [["c"]])
    with pytest.raises(DataError, match="`options` is 'yes'; give a list"):
        model.generate("Why?", options="yes")
    with pytest.raises(DataError, match=r"half a character: .*Why\\ud83d'"):
        model.generate("Why\ud83d?")
    with pytest.raises(ConfigError, match="batch_size is 0"):
        model.generate(["Why?"], batch_size=0)
    with pytest.raises(ConfigError, match="no beam search"):
        model.chat(Sampling(beams=2))


def test_scores_are_log_likelihoods(model: Model, exact: Any, shown: list[Any]) -> None:
    """Answers of unlike number and length, in one batch; the end mark is part of them."""
    answers = [["yes", "no", "perhaps not"], ["lung"], [], ["left lung", "right"]]
    found = model.score(QUESTIONS, shown, answers)
    assert [len(row) for row in found] == [3, 1, 0, 2]
    assert all(math.isfinite(n) and n < 0 for row in found for n in row)
    end = model.tokenizer.eos_token_id
    for question, pictures, texts, numbers in zip(QUESTIONS, shown, answers, found, strict=True):
        for text, number in zip(texts, numbers, strict=True):
            ids = [*model.tokenizer(f" {text}").input_ids, end]
            assert number == pytest.approx(exact(question, pictures, ids)[0], abs=1e-3)
        if texts:
            (alone,) = model.score([question], [pictures], [texts])
            np.testing.assert_allclose(alone, numbers, atol=1e-4)
    assert model.score([], None, []) == [] and model.score(["Why?"], None, [[]]) == [[]]


def test_options(model: Model, replies: list[Reply], shown: list[Any]) -> None:
    """Shares of the options; the answer itself does not change."""
    options = ("yes", "no", "left lung")
    found = model.generate(QUESTIONS, shown, SHORT, options=options)
    scores = np.array(model.score(QUESTIONS, shown, [options] * 4))
    shares = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    for reply, before, row in zip(found, replies, shares, strict=True):
        assert reply.options is not None and tuple(reply.options) == options
        np.testing.assert_allclose(list(reply.options.values()), row, atol=1e-4)
        assert sum(reply.options.values()) == pytest.approx(1)
        assert (reply.text, reply.ids) == (before.text, before.ids)
    assert shares.max() > 0.5


def test_stop_texts(model: Model, replies: list[Reply], shown: list[Any]) -> None:
    """A text within a token, one across tokens, several at once; the first to be complete ends."""
    end = model.tokenizer.eos_token_id
    row = max(range(4), key=lambda i: len(replies[i].text))
    reply, question, pictures = replies[row], QUESTIONS[row], shown[row]
    pieces = [model.tokenizer.decode([i]) for i in reply.ids if i != end]
    text = "".join(pieces)
    border = len("".join(pieces[:4]))
    across = text[border - 1 : border + 2]
    assert text.find(across) == border - 1
    for stops in ((across,), ("never said", across), (across, text[border + 3 : border + 5])):
        how = Sampling(max_new_tokens=10, stop=stops)
        found = model.generate(question, pictures, how)
        assert found.text == text[: border - 1].strip() and found.finished
        assert found.ids == reply.ids[: len(found.ids)] and len(found.ids) == len(found.log_probs)
        said = [model.tokenizer.decode(found.ids[:n]) for n in (len(found.ids), -1)]
        assert across in said[0] and across not in said[1]
        # the other rows go on
        together = model.generate(QUESTIONS, shown, how)
        assert_same(together[row], found)
    never = model.generate(QUESTIONS, shown, Sampling(max_new_tokens=10, stop=("never said",)))
    for one, other in zip(never, replies, strict=True):
        assert_same(one, other)


def test_what_lies_behind_a_stop_text_plays_no_part(model: Model) -> None:
    """Also where it completes a longer one that began before."""
    ids = model.tokenizer("abcdef").input_ids
    assert len(ids) > 2
    how = Sampling(stop=("bc", "abcdef"))
    short, long = (model._reply(ids[:n], [-1.0] * n, how) for n in (len(ids) - 1, len(ids)))
    assert short == long and short.text == "a" and short.finished


def test_length(model: Model, replies: list[Reply], shown: list[Any]) -> None:
    for most in (1, 4):
        found = model.generate(QUESTIONS, shown, Sampling(max_new_tokens=most))
        for reply, whole in zip(found, replies, strict=True):
            assert reply.ids == whole.ids[:most]
            assert reply.finished == (whole.finished and len(whole.ids) <= most)


def test_answers_end_with_the_positions(tmp_path: Path) -> None:
    """Each row at its own place, in a batch as alone, greedy and with beams; and so do chats."""
    most = 112
    config = tiny_service.config("phi", MoeConfig(), max_positions=most)
    model = medmoe_jax.load(tiny_service.save(tmp_path / "model", config, seed=3))
    asked = ["Why?", "Is it the left or the right lung that is larger here?"]
    places = [len(model._prompt(model.request(q, None)).tokens) for q in asked]
    assert places[0] < places[1] < most
    for beams in (1, 2):
        how = Sampling(beams=beams)
        found = model.generate(asked, None, how)
        assert any(len(r.ids) == most - n for r, n in zip(found, places, strict=True))
        for question, reply, n in zip(asked, found, places, strict=True):
            assert len(reply.ids) == most - n or reply.finished
            assert_same(model.generate(question, None, how), reply)
    chat = model.chat(Sampling())
    assert chat.ask(asked[1]).ids == model.generate(asked[1], None, Sampling()).ids


def test_plain_template(folder: Path, shown: list[Any]) -> None:
    """A model after alignment: an image, its caption, a line feed."""
    model = medmoe_jax.load(folder, template="plain")
    assert model.answer_ids("a\u00b5") == model.tokenizer("a\u00b5\n").input_ids
    reply = model.generate("", shown[0], SHORT)
    feed = [i for i, n in enumerate(reply.ids) if "\n" in model.tokenizer.decode([n])]
    assert reply.finished or not feed
    row = model.generate("", shown[0], SHORT, options=("a lung", "a knee"))
    assert row.options is not None and sum(row.options.values()) == pytest.approx(1)
    likely = model.score([""], [shown[0]], [["a lung", "a knee"]])[0]
    assert likely[0] - likely[1] == pytest.approx(
        math.log(row.options["a lung"] / row.options["a knee"]), abs=1e-3
    )


def test_draws_belong_to_rows(model: Model, shown: list[Any]) -> None:
    how = Sampling(temperature=1.2, top_p=0.95, max_new_tokens=8, seed=3)
    requests = [
        model.request(q, p, seed=100 + i)
        for i, (q, p) in enumerate(zip(QUESTIONS, shown, strict=True))
    ]
    found = model.answer(requests, how)
    for request, reply in zip(requests, found, strict=True):
        assert_same(model.answer([request], how)[0], reply)
    for one, other in zip(model.answer(requests[::-1], how)[::-1], found, strict=True):
        assert_same(one, other)
    same = [model.request(QUESTIONS[0], shown[0], seed=i) for i in range(8)]
    assert len({reply.ids for reply in model.answer(same, how)}) > 4
    assert model.answer(same[:1], how) != model.answer(same[:1], Sampling(temperature=1.2, seed=4))


def test_beams(model: Model, replies: list[Reply], exact: Any, shown: list[Any]) -> None:
    """The same alone; unlike the greedy answers, and with their own probability."""
    how = Sampling(beams=3, length_penalty=2.0, max_new_tokens=10)
    found = model.generate(QUESTIONS, shown, how)
    assert [r.ids for r in found] != [r.ids for r in replies]
    for question, pictures, reply in zip(QUESTIONS, shown, found, strict=True):
        total, _ = exact(question, pictures, list(reply.ids))
        assert sum(reply.log_probs) == pytest.approx(total, abs=1e-3)
        assert reply.modality is not None
    assert_same(model.generate(QUESTIONS[2], shown[2], how), found[2])


def test_repetition_penalty_knows_the_prompt(model: Model, shown: list[Any]) -> None:
    how = Sampling(repetition_penalty=1e6, max_new_tokens=10)
    for question, pictures in zip(QUESTIONS[:2], shown[:2], strict=True):
        ids = model.generate(question, pictures, how).ids
        assert len(set(ids)) == len(ids)
        text = templates.prompt("phi", question, len(model.pixels(pictures)))
        assert not set(ids) & set(tokens.encode_prompt(text, model.tokenizer))


def test_half_precision(folder: Path, replies: list[Reply], shown: list[Any]) -> None:
    """Weights are bfloat16, the router's stay float32; answers are about as sure."""
    small = medmoe_jax.load(folder, dtype="bfloat16")
    paths = jax.tree_util.tree_leaves_with_path(small.params)
    kinds = {"router" in jax.tree_util.keystr(path): str(leaf.dtype) for path, leaf in paths}
    assert kinds == {True: "float32", False: "bfloat16"}
    reply = small.generate(QUESTIONS[0], shown[0], Sampling(max_new_tokens=1))
    assert reply.confidence == pytest.approx(math.exp(replies[0].log_probs[0]), abs=0.1)


def test_unfinished_characters_are_marked(model: Model) -> None:
    """What `responder.UNFINISHED` relies on: the tokenizer decodes a cut character to it."""
    ids = model.tokenizer("é").input_ids
    assert len(ids) == 2
    assert model.tokenizer.decode(ids[:1]).endswith(responder.UNFINISHED)
