"""A loaded model that answers questions about images.

    model = medmoe_jax.load("runs/stage3/model")
    reply = model.generate("Is there a lesion?", "image.png", options=("yes", "no"))
    print(reply.text, reply.confidence, reply.options, reply.modality, reply.warnings)

`responder.py` has the steps, `conversation.py` the chat. Not for clinical use.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from medmoe_jax import checkpoint, generate, placement, sharding
from medmoe_jax.checkpoint import CheckpointError
from medmoe_jax.config import ConfigError, MeshConfig, ViewConfig
from medmoe_jax.conversation import Chat
from medmoe_jax.convert.folder import model_folder
from medmoe_jax.convert.report import ConversionError
from medmoe_jax.data import images, templates, tokens
from medmoe_jax.data.problems import DataError
from medmoe_jax.responder import Pictures, Reply, Request, Responder
from medmoe_jax.sampling import Sampling

__all__ = ["Model", "Reply", "Request", "Sampling", "load"]

DTYPES = ("float32", "bfloat16", "float16")
# What a command that loads a model and asks it something reports to its user without a traceback.
FAULTS = (ConfigError, CheckpointError, ConversionError, DataError)
PARTS = ("vision", "projector", "llm")  # of the parameters that answering takes


class Model(Responder):
    """Parameters with what it takes to ask something. Made by `load`."""

    def generate(
        self,
        questions: str | Sequence[str],
        pictures: Any = None,
        sampling: Sampling | None = None,
        *,
        options: Sequence[str] = (),
        batch_size: int = 8,
    ) -> Any:
        """Answers one question or several.

        Args:
          questions: text, or a list of texts.
          pictures: for one question None, an image or several; for a list of questions a list of
            those, or None. An image is a file, a PIL image or uint8[H, W, 3].
          sampling: default: greedy.
          options: answers whose probabilities are wanted.
          batch_size: rows answered at once; rows are sorted by length.

        Returns:
          A Reply, or a list of them in the order of the questions.

        Raises:
          DataError: an image cannot be read, or a prompt does not fit the model.
          ConfigError: a batch of no rows.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; it must be 1 or more")
        if isinstance(questions, str):
            return self.answer([self.request(questions, pictures, options)], sampling)[0]
        shown = [None] * len(questions) if pictures is None else pictures
        if len(shown) != len(questions):
            raise DataError(f"{len(questions)} questions but {len(shown)} entries of pictures")
        requests = [
            self.request(question, those, options, seed)
            for seed, (question, those) in enumerate(zip(questions, shown, strict=True))
        ]
        order = sorted(
            range(len(requests)),
            key=lambda i: (len(requests[i].pictures), len(requests[i].question)),
        )
        replies: dict[int, Reply] = {}
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            found = self.answer([requests[i] for i in part], sampling, min(batch_size, len(order)))
            replies |= dict(zip(part, found, strict=True))
        return [replies[i] for i in range(len(requests))]

    def stream(
        self, question: str, pictures: Pictures = None, sampling: Sampling | None = None
    ) -> Iterator[str]:
        """The answer to one question piece by piece, whole characters only."""
        return self.chat(sampling).stream(question, pictures)

    def chat(self, sampling: Sampling | None = None) -> Chat:
        """A conversation with several turns."""
        return Chat(self, sampling or Sampling())

    def score(
        self,
        questions: Sequence[str],
        pictures: Sequence[Pictures] | None,
        answers: Sequence[Sequence[str]],
    ) -> list[list[float]]:
        """Log-likelihood of given answers, the end mark included.

        Args:
          questions: one a row.
          pictures: of each row, see `generate`; None: no images.
          answers: for each row, the answers to score.

        Returns:
          For each row one number an answer, natural logarithm.

        Raises:
          DataError: as in `generate`, or an answer without text or given twice.
        """
        shown = [None] * len(questions) if pictures is None else pictures
        if not len(questions) == len(shown) == len(answers):
            raise DataError(
                f"{len(questions)} questions, {len(shown)} entries of pictures and {len(answers)} "
                "of answers; give one of each a row"
            )
        rows = [
            self.request(question, those, given)
            for question, those, given in zip(questions, shown, answers, strict=True)
        ]
        if not any(row.options for row in rows):
            return [[] for _ in rows]
        state, _ = self.read(rows, room=1)
        return self._score_options(rows, state)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds what every command that loads a model takes."""
    add = parser.add_argument
    add("--model-path", type=Path, required=True, help="a model folder or a PyTorch folder")
    add("--conv-mode", default="", help="phi or stablelm; default: the model's")
    add("--bits", type=int, choices=(0, 4, 8), default=0, help="size of the weights; 0 = as saved")
    add("--dtype", default="", help="default: float32 on a CPU, bfloat16 elsewhere")


def mesh_sizes(text: str) -> MeshConfig:
    """The mesh of a command line: devices along data, fsdp and expert, as in "1,2,4".

    Raises:
      ValueError: something else (`argparse` reports it).
    """
    data, fsdp, expert = map(int, text.split(","))
    return MeshConfig(data, fsdp, expert)


def load(
    path: str | Path,
    *,
    template: str = "",
    dtype: str = "",
    aspect: str = "pad",
    view: ViewConfig | None = None,
    vision: str | Path | None = None,
    bits: int = 0,
    mesh: MeshConfig | Sequence[int] | None = None,
) -> Model:
    """Loads a model.

    Args:
      path: a converted or trained model folder, or an official or Hugging Face PyTorch folder.
      template: of conversations, 'phi' or 'stablelm'; default: the language model's.
      dtype: of weights (the router's excepted) and computation; default: float32 on a CPU, bfloat16
        elsewhere.
      aspect: 'pad' shows the whole image as in training, 'square' crops as the official evaluation.
      view: what is shown of DICOM and NIfTI files; default: their own window, the middle slice.
      vision: CLIP folder, where a PyTorch folder does not hold one.
      bits: 8 or 4 for weights of that size (see `quantize`); 0 = as they are.
      mesh: how to use several devices: their numbers along `data` (conversations), `fsdp` (heads
        and hidden layers) and `expert` (experts), -1 for what is left; None = one device.

    Raises:
      CheckpointError, ConversionError, DataError: the folder cannot be used.
      ConfigError: it lacks a part, there is no such dtype or size, or the devices are not so many.
    """
    devices = None
    if mesh is not None:
        devices = sharding.make_mesh(mesh if isinstance(mesh, MeshConfig) else MeshConfig(*mesh))
    if dtype not in ("", *DTYPES):
        raise ConfigError(f"dtype {dtype!r} is unknown; use one of {', '.join(DTYPES)}")
    if template:
        templates.check_template(template)
    kind = jnp.dtype(dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"))
    with model_folder(path, vision) as folder:
        params, meta = checkpoint.open_model(folder)
        absent = [part for part in PARTS if part not in params]
        if absent:
            raise ConfigError(
                f"{path} holds no {' and no '.join(absent)}; `convert to-jax` joins the parts"
            )
        family, vocab = meta.model.llm.family, meta.model.llm.vocab
        tokenizer = tokens.load_tokenizer(folder / "tokenizer", family, vocab)
        spec = images.read_image_spec(folder / "preprocessor_config.json", aspect, view)
        ways = 1 if devices is None else sharding.generation_ways(devices, meta.model)
        whole = generate.for_generation({part: params[part] for part in PARTS}, meta.model, ways)
        ready = placement.placed(whole, meta.model, kind, bits=bits, mesh=devices)
    return Model(ready, meta.model, tokenizer, spec, template or family, kind, devices)
