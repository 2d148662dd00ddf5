"""From questions and images to replies: prompts in batches on the device, texts from their ids.

The public class on top of it is `model.Model`; `conversation.py` is the chat.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from medmoe_jax import beam, generate, sampling, sharding
from medmoe_jax.config import MODALITIES, ModelConfig
from medmoe_jax.data import images, medical, merge, templates, tokens
from medmoe_jax.data.problems import DataError
from medmoe_jax.sampling import Sampling

Picture = str | Path | Image.Image | np.ndarray
Pictures = Picture | Sequence[Picture] | None

EVERY = 128  # ids between two looks at the device where nothing waits for them
EVERY_STOP = 16  # the same where stop texts are searched for
UNFINISHED = "\ufffd"  # what a cut UTF-8 sequence decodes to


@dataclass(frozen=True)
class Reply:
    """An answer.

    Attributes:
      text: without the end mark and stop texts.
      ids: of the tokens, the end included where there is one.
      log_probs: of each id by the model's own scores, whatever the sampling settings are.
      finished: ended by itself or by a stop text, not by its length.
      modality: the router's posterior over the modalities ("expert 0", ... where the experts are
        not the four modalities); None in a dense model.
      options: probability of each given option among them; None where none were given.
      warnings: where the Modality tag of a DICOM file and the router disagree.
    """

    text: str
    ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    finished: bool
    modality: dict[str, float] | None
    options: dict[str, float] | None = None
    warnings: tuple[str, ...] = ()

    @property
    def confidence(self) -> float:
        """Probability of the whole answer, 0 to 1."""
        return math.exp(sum(self.log_probs))


@dataclass(frozen=True)
class Request:
    """One row of a batch.

    Attributes:
      question: without <image>.
      pictures: uint8[K, H, W, 3] of the whole conversation; K may be 0.
      options: answers to score.
      seed: of the row's draws.
      tagged: modalities that the files say they have (`tagged`).
      earlier: what was said before: question, answer, ..., answer.
      shown: how many of the pictures come before each question; () = all before the first.
    """

    question: str
    pictures: np.ndarray
    options: tuple[str, ...] = ()
    seed: int = 0
    tagged: tuple[str, ...] = ()
    earlier: tuple[str, ...] = ()
    shown: tuple[int, ...] = ()


def tagged(pictures: Pictures) -> tuple[str, ...]:
    """What the files among the pictures say their modality is, each once; DICOM files do.

    Raises:
      DataError: a file cannot be read.
    """
    files = [p for p in _each(pictures) if isinstance(p, (str, Path))]
    return tuple(sorted({medical.modality(Path(file)) for file in files} - {""}))


def mismatch(tags: Sequence[str], posterior: dict[str, float] | None) -> tuple[str, ...]:
    """A warning where the router takes the images for something that no file says it is."""
    if not tags or posterior is None or tuple(posterior) != MODALITIES:
        return ()
    router = max(posterior, key=lambda name: posterior[name])
    if router in tags:
        return ()
    return (
        f"the file's Modality tag says {' and '.join(tags)}, the router takes it for {router} "
        f"({posterior[router]:.0%})",
    )


def _each(pictures: Pictures) -> Sequence[Picture]:
    """The pictures of one question as a sequence."""
    if pictures is None:
        return ()
    if isinstance(pictures, (str, Path, Image.Image, np.ndarray)):
        return (pictures,)
    return pictures


@dataclass
class Responder:
    """Parameters with what it takes to ask something."""

    params: dict[str, Any]  # from generate.for_generation
    config: ModelConfig
    tokenizer: Any
    spec: images.ImageSpec
    template: str
    dtype: Any
    mesh: Mesh | None = None  # the devices that the parameters lie on; None: one

    def on_devices(self) -> AbstractContextManager[Any]:
        """In it, programs are compiled for and run on the model's devices."""
        return nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def request(
        self, question: str, pictures: Pictures, options: Sequence[str] = (), seed: int = 0
    ) -> Request:
        """A row of a batch; images are read here. Raises DataError as `pixels`, and where the
        options are one text."""
        if isinstance(options, str):
            raise DataError(f"`options` is {options!r}; give a list of texts")
        shown = self.pixels(pictures)
        return Request(question, shown, tuple(options), seed, tagged(pictures))

    def pixels(self, pictures: Pictures) -> np.ndarray:
        """uint8[K, H, W, 3] as the vision tower takes them.

        Raises:
          DataError: a file that cannot be read, or an array that is no image.
        """
        shown, size = _each(pictures), self.spec.crop
        empty = np.zeros((0, size, size, 3), np.uint8)
        return np.stack([self._pixels(p) for p in shown]) if shown else empty

    def _pixels(self, picture: Picture) -> np.ndarray:
        if isinstance(picture, (str, Path)):
            return images.load_image(picture, self.spec)
        if isinstance(picture, np.ndarray):
            coloured = picture.ndim == 2 or (picture.ndim == 3 and picture.shape[2] in (3, 4))
            if picture.dtype != np.uint8 or not coloured or not picture.size:
                raise DataError(
                    f"an image is {picture.dtype}{list(picture.shape)}; give uint8[H, W, 3]"
                )
            picture = Image.fromarray(picture)
        if not isinstance(picture, Image.Image):
            raise DataError(
                f"an image is a {type(picture).__name__}; give a file, a PIL image or an array"
            )
        return images.fit(images.to_rgb(picture), self.spec)

    def answer(
        self, requests: Sequence[Request], sampling: Sampling | None = None, rows: int = 0
    ) -> list[Reply]:
        """Replies to one batch, in its order. A batch of fewer than `rows` is filled up, so that it
        needs no program of its own."""
        *_, replies = self.growing(requests, sampling, rows)
        return replies

    def growing(
        self,
        requests: Sequence[Request],
        sampling: Sampling | None = None,
        rows: int = 0,
        every: int = 0,
    ) -> Iterator[list[Reply]]:
        """The replies of `answer` as they grow, looked at after every `every` ids (0: as seldom as
        is sensible); the last ones are whole. Beam search shows these alone."""
        how = self.with_stop(sampling or Sampling())
        seeds = [r.seed for r in requests]
        state, posterior = self.read(requests, min(EVERY, how.max_new_tokens), how, rows)
        posterior = sharding.on_host(posterior)
        scored = any(r.options for r in requests)
        options = self._score_options(requests, state) if scored else None
        left = self.left(state)[: len(requests)]

        def complete(replies: Sequence[Reply]) -> list[Reply]:
            return [
                self._complete(reply, request, row, posterior, options)
                for row, (reply, request) in enumerate(zip(replies, requests, strict=True))
            ]

        if how.beams > 1:
            end = self.tokenizer.eos_token_id
            with self.on_devices():
                best = beam.search(self.params, self.config, state, end, how, self.dtype)
            yield complete(
                [
                    self._reply(ids[:n], log_probs[:n], how)
                    for (ids, log_probs), n in zip(best, left, strict=False)
                ]
            )
            return
        every = every or (EVERY_STOP if how.stop else EVERY)
        for _, found in self.running(state, how, seeds, every):
            replies = self.replies(found, left, how)
            yield complete(replies)
            if all(r.finished or len(r.ids) == n for r, n in zip(replies, left, strict=True)):
                return

    def _complete(
        self, reply: Reply, request: Request, row: int, posterior: Any, options: Any
    ) -> Reply:
        """The reply with what is known beside its text."""
        shares = None
        if request.options:
            scores = np.asarray(options[row])
            weights = np.exp(scores - scores.max())
            shares = dict(zip(request.options, (weights / weights.sum()).tolist(), strict=True))
        modality = None if posterior is None else self.modality(posterior[row])
        warnings = mismatch(request.tagged, modality)
        return replace(reply, modality=modality, options=shares, warnings=warnings)

    def read(
        self, requests: Sequence[Request], room: int, how: Sampling | None = None, rows: int = 0
    ) -> tuple[generate.State, Any]:
        """Prompts of a batch on the device, filled up to `rows` or a power of two: the state and
        the router's posterior."""
        batch = self.prompts(requests, rows)
        penalised = how is not None and how.repetition_penalty != 1.0
        with self.on_devices():
            return generate.read(
                self.params, self.config, batch, dtype=self.dtype, room=room, penalised=penalised
            )

    def prompts(self, requests: Sequence[Request], rows: int = 0) -> dict[str, np.ndarray]:
        """The prompts with their images as one batch, see `batch`."""
        rendered = [self._prompt(request) for request in requests]
        return self.batch(rendered, [request.pictures for request in requests], rows)

    def check_request(self, request: Request) -> int:
        """Number of tokens of a prompt, images included. Raises DataError where it does not fit the
        model, or its options are none."""
        return len(self._prompt(request).tokens)

    def _prompt(self, request: Request) -> merge.Merged:
        """A prompt in merged coordinates."""
        for place, option in enumerate(request.options):
            if not option.strip() or templates.IMAGE_TOKEN in option:
                raise DataError(f"the option {option!r} is no text that could be an answer")
            if option in request.options[:place]:
                raise DataError(f"the option {option!r} is given twice")
        said = [*request.earlier, request.question]
        text = templates.prompt(self.template, said, request.shown or len(request.pictures))
        ids = tokens.encode_prompt(text, self.tokenizer)
        row = merge.expand(ids, None, self.config.vision.patches)
        self.check_length(len(row.tokens))
        return row

    def check_length(self, places: int) -> None:
        """Raises DataError where a conversation is longer than the model's positions."""
        most = self.config.llm.max_positions
        if places >= most:
            raise DataError(
                f"the conversation has {places} tokens, images included; the model has {most} "
                "positions. Ask less at once, or start anew"
            )

    def batch(
        self, prompts: Sequence[merge.Merged], pictures: Sequence[np.ndarray], rows: int = 0
    ) -> dict[str, np.ndarray]:
        """Left-padded arrays of static size; rows beyond the given ones are padding. Over several
        devices there are so many of them that rows can be split."""
        many = rows if rows >= len(prompts) else 1 << (len(prompts) - 1).bit_length()
        if self.mesh is not None:
            many += -many % self.mesh.shape["data"]
        length = generate.bucket(max(len(prompt.tokens) for prompt in prompts))
        batch = merge.pad_rows(prompts, length)
        batch = {
            k: np.pad(batch[k], ((0, many - len(prompts)), (0, 0)), constant_values=fill)
            for k, fill in (("tokens", 0), ("image_pos", -1), ("mask", False))
        }
        most = max(len(shown) for shown in pictures)
        if most:
            size = self.spec.crop
            stack = np.zeros((many, 1 << (most - 1).bit_length(), size, size, 3), np.uint8)
            for place, shown in enumerate(pictures):
                stack[place, : len(shown)] = shown
            batch["images"] = stack
        return generate.left_padded(batch)

    def running(
        self, state: generate.State, how: Sampling, seeds: Sequence[int], every: int
    ) -> Iterator[tuple[generate.State, generate.Answers]]:
        """`generate.answers` with this model's parameters; `seeds` of the rows that count."""
        filler = [0] * (len(state.count) - len(seeds))
        pairs = generate.answers(
            self.params,
            self.config,
            state,
            np.int32(self.tokenizer.eos_token_id),
            sampling.knobs(how, [*seeds, *filler]),
            max_new=how.max_new_tokens,
            every=every,
            dtype=self.dtype,
            draw=how.temperature > 0,
        )
        while True:  # the devices are set while a program runs, not while the caller looks at it
            with self.on_devices():
                pair = next(pairs, None)
            if pair is None:
                return
            yield pair

    def with_stop(self, how: Sampling) -> Sampling:
        """The settings with the text that ends an answer of this template, unless it is the end
        token."""
        mark = templates.stop_text(self.template)
        return how if mark in (templates.END, *how.stop) else replace(how, stop=(*how.stop, mark))

    def left(self, state: generate.State) -> list[int]:
        """For each row, how many ids its answer may have before the model's positions end."""
        return (self.config.llm.max_positions - sharding.on_host(state.count)).tolist()

    def replies(self, found: generate.Answers, left: Sequence[int], how: Sampling) -> list[Reply]:
        """What was said so far in the first rows, cut at stop texts and where nothing is left."""
        ids, log_probs, lengths = sharding.on_host((found.ids, found.log_probs, found.lengths))
        return [
            self._reply(row[:n].tolist(), probs[:n].tolist(), how)
            for row, probs, n in zip(
                ids, log_probs, np.minimum(lengths[: len(left)], left), strict=False
            )
        ]

    def _reply(self, ids: Sequence[int], log_probs: Sequence[float], how: Sampling) -> Reply:
        ended = bool(ids) and ids[-1] == self.tokenizer.eos_token_id
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        if any(stop in text for stop in how.stop):
            # The ids up to the one that completes a stop text; those behind it play no part.
            for n in range(1, len(ids) + 1):
                text = self.tokenizer.decode(ids[:n], skip_special_tokens=True)
                places = [place for stop in how.stop if (place := text.find(stop)) >= 0]
                if places:
                    ids, log_probs, text, ended = ids[:n], log_probs[:n], text[: min(places)], True
                    break
        return Reply(text.strip(), tuple(ids), tuple(log_probs), ended, None)

    def modality(self, posterior: Any) -> dict[str, float]:
        """The router's posterior, f32[E], by name."""
        values = np.asarray(posterior).tolist()
        names = MODALITIES if len(values) == len(MODALITIES) else None
        return {names[i] if names else f"expert {i}": p for i, p in enumerate(values)}

    def _score_options(
        self, requests: Sequence[Request], state: generate.State
    ) -> list[list[float]]:
        """Log-likelihood of every option of every row, prompts being read once."""
        each = [[self.answer_ids(option) for option in r.options] for r in requests]
        most = max(map(len, each))
        many = 1 << (most - 1).bit_length()
        longest = max(len(ids) for row in each for ids in row)
        length = generate.bucket(longest)
        shape = (len(state.count) * many, length)
        batch = {
            "tokens": np.zeros(shape, np.int32),
            "image_pos": np.full(shape, -1, np.int32),
            "mask": np.zeros(shape, bool),
        }
        for row, options in enumerate(each):
            for place, ids in enumerate(options):
                batch["tokens"][row * many + place, : len(ids)] = ids
                batch["mask"][row * many + place, : len(ids)] = True
        with self.on_devices():
            repeated = generate.with_room(generate.repeat(state, many), length)
            scores, _ = generate.score(self.params, self.config, repeated, batch, self.dtype)
        table = sharding.on_host(scores).reshape(-1, many)
        return [table[row, : len(options)].tolist() for row, options in enumerate(each)]

    def answer_ids(self, answer: str) -> list[int]:
        """Ids of an answer with its end mark, as they come behind a prompt; none for no text."""
        if not answer:
            return []
        return tokens.encode([templates.answer(self.template, answer)], self.tokenizer).ids
