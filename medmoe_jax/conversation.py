"""A conversation of several turns: the cache of the earlier ones is used again."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from medmoe_jax import generate
from medmoe_jax.config import ConfigError
from medmoe_jax.data import merge, templates, tokens
from medmoe_jax.responder import (
    EVERY_STOP,
    UNFINISHED,
    Pictures,
    Reply,
    Responder,
    mismatch,
    tagged,
)
from medmoe_jax.sampling import Sampling

NOTICE = "For research only: not for clinical use. The answers can be wrong."


@dataclass
class Pieces:
    """Cuts a growing answer into pieces that, joined, are the whole text.

    A piece never ends within a character, nor with the beginning of a stop text.

    Attributes:
      stop: texts at which the answer ends.
      said: in earlier pieces.
    """

    stop: Sequence[str]
    said: str = ""

    def more(self, text: str, whole: bool = False) -> str:
        """The next piece, often "", of the text so far; `whole`: it does not grow any more."""
        sure = text if whole else self._held_back(text)
        piece = sure[len(self.said) :]
        self.said += piece
        return piece

    def _held_back(self, text: str) -> str:
        """The part of a growing answer that cannot change any more."""
        text = text.rstrip(UNFINISHED)
        for stop in self.stop:
            overlap = max(n for n in range(len(stop)) if text.endswith(stop[:n]))
            text = text[: len(text) - overlap]
        # White space at the end is cut off if the answer ends here.
        return text.rstrip()


@dataclass
class Chat:
    """Questions and answers about images, one after the other.

    Attributes:
      model: that answers.
      sampling: settings; beam search is not available here.
      turns: question, answer, question, ...
      reply: the last answer with its confidence and modality posterior.
    """

    model: Responder
    sampling: Sampling
    turns: list[str] = field(default_factory=list)
    reply: Reply | None = None
    _state: generate.State | None = None
    _pending: list[int] = field(default_factory=list)  # ids said that the cache does not hold
    _modality: dict[str, float] | None = None  # of the last images shown
    _tagged: tuple[str, ...] = ()  # modalities that the files of these say they have

    def __post_init__(self) -> None:
        if self.sampling.beams > 1:
            raise ConfigError("a conversation has no beam search; set sampling.beams to 1")
        self.sampling = self.model.with_stop(self.sampling)

    def reset(self) -> None:
        """Forgets everything that was said and shown."""
        self.turns, self.reply, self._state, self._pending = [], None, None, []
        self._modality, self._tagged = None, ()

    def ask(self, question: str, pictures: Pictures = None) -> Reply:
        """The answer to the next question; `pictures` are shown before it."""
        for _ in self._answers(question, pictures, EVERY_STOP):
            pass
        assert self.reply is not None
        return self.reply

    def stream(self, question: str, pictures: Pictures = None) -> Generator[str, None, None]:
        """The same in `Pieces`. Closed early, the turn is what was said until then."""
        pieces = Pieces(self.sampling.stop)
        for text in self._answers(question, pictures, 1):
            if piece := pieces.more(text):
                yield piece
        assert self.reply is not None
        if piece := pieces.more(self.reply.text, whole=True):
            yield piece

    def _answers(self, question: str, pictures: Pictures, every: int) -> Iterator[str]:
        """Texts of the answer as it grows; the turn is written down at the end, also where the
        caller stops listening."""
        model, how = self.model, self.sampling
        shown, tags = model.pixels(pictures), tagged(pictures)
        state = self._read(question, shown)
        if len(shown):
            self._tagged = tags
        start, left, reply = int(state.end), model.left(state), None
        used = None if state.used is None else np.array(state.used)
        pairs = model.running(state, how, [len(self.turns)], every)
        try:
            for latest, found in pairs:
                state = latest
                reply = model.replies(found, left, how)[0]
                yield reply.text
                if reply.finished or len(reply.ids) == left[0]:
                    break
        finally:
            if reply is None:
                self.reset()
            else:
                self._write_down(question, reply, state, start, used)

    def _read(self, question: str, shown: np.ndarray) -> generate.State:
        """The question behind what the cache holds."""
        model = self.model
        if self._state is None:
            text, before, places = templates.prompt(model.template, question, len(shown)), [], 0
        else:
            text = templates.follow_up(model.template, question, len(shown))
            before, places = self._pending, int(self._state.count[0])
        ids = before + tokens.encode_prompt(text, model.tokenizer)
        row = merge.expand(ids, None, model.config.vision.patches)
        model.check_length(places + len(row.tokens))
        batch = model.batch([row], [shown])
        length = batch["tokens"].shape[1]
        p, cfg, dtype = model.params, model.config, model.dtype
        with model.on_devices():
            if self._state is None:
                penalised = self.sampling.repetition_penalty != 1.0
                state, posterior = generate.read(
                    p, cfg, batch, dtype=dtype, room=0, penalised=penalised
                )
            else:
                state = generate.with_room(self._state, length)
                state, posterior = generate.extend(p, cfg, state, batch, dtype)
        if posterior is not None and (len(shown) or self._state is None):
            self._modality = model.modality(posterior[0])
        return state

    def _write_down(
        self,
        question: str,
        reply: Reply,
        state: generate.State,
        start: int,
        used: np.ndarray | None,
    ) -> None:
        """Keeps the turn; of an answer cut at a stop text the cache keeps nothing, and what is left
        of it is read with the next question."""
        end, held = self.model.tokenizer.eos_token_id, int(state.end) - start
        if reply.ids[-1] == end:
            ids, kept = [*reply.ids], min(held, len(reply.ids))
        elif reply.finished:
            ids, kept = self.model.answer_ids(reply.text.replace(templates.IMAGE_TOKEN, "")), 0
        else:
            ids, kept = [*reply.ids, end], min(held, len(reply.ids))
        with self.model.on_devices():
            state = generate.rewind(state, held - kept)
        if used is not None:  # the state's own knows the ids that were cut off as well
            used[:, ids[:kept]] = True
            state = state._replace(used=used)
        self._state, self._pending = state, ids[kept:]
        warnings = mismatch(self._tagged, self._modality)
        self.reply = replace(reply, modality=self._modality, warnings=warnings)
        self.turns += [question, reply.text]
