"""One question taken apart: its answer, the experts of every token, and the patches it rests on.

model = medmoe_jax.load("runs/stage3/model")
found = explain(model, "Is there a lesion?", "image.png")
found.attribution, found.curve.gap, found.experts
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from medmoe_jax.analyse import deletion, geometry, inputs, saliency
from medmoe_jax.analyse.deletion import FRACTIONS, Curve
from medmoe_jax.analyse.scoring import Scorer
from medmoe_jax.config import ConfigError, ModelConfig
from medmoe_jax.data import images
from medmoe_jax.data.placement import Placement
from medmoe_jax.models import medmoe, moe
from medmoe_jax.models.layers import Array, Params
from medmoe_jax.responder import Pictures, Responder
from medmoe_jax.sampling import Sampling

MOST_NEW_TOKENS = 64


@dataclass(frozen=True)
class Experts:
    """Who spoke for which token. T tokens without padding, Lm MoE layers.

    Attributes:
      layers: numbers of the Lm layers in the decoder.
      choice: i64[Lm, T, top_k], experts, first choice first.
      weight: f64[Lm, T, top_k], what their outputs are multiplied by.
      probability: f64[Lm, T, E], the router's distribution.
    """

    layers: tuple[int, ...]
    choice: np.ndarray
    weight: np.ndarray
    probability: np.ndarray


@dataclass(frozen=True)
class Explanation:
    """An answer and what it rests on. K images with P = side * side patches each.

    Attributes:
      question: as asked.
      answer: its text.
      own: the model's own answer; False: it was given.
      probability: of the whole answer, 0 to 1.
      modality: the router's posterior as `Reply.modality`; None in a dense model, and for a given
        answer.
      warnings: see `Reply`.
      tokens: text of the T tokens of prompt and answer, "" for patches.
      kinds: i32[T], index in `inputs.KINDS`.
      experts: None in a model without a router, or that does not ask it.
      method: of the attribution.
      attribution: f64[K, side, side], what each patch adds to log p(answer).
      shown: bool[K, side, side], patches that show some of the picture.
      curve: the probability while patches are hidden; None without an image.
      pictures: the K pictures at their own size.
      places: where each lies in the square that the tower sees.
    """

    question: str
    answer: str
    own: bool
    probability: float
    modality: dict[str, float] | None
    warnings: tuple[str, ...]
    tokens: tuple[str, ...]
    kinds: np.ndarray
    experts: Experts | None
    method: str
    attribution: np.ndarray
    shown: np.ndarray
    curve: Curve | None
    pictures: tuple[Image.Image, ...]
    places: tuple[Placement, ...]

    def overlay(self, image: int = 0) -> np.ndarray:
        """The attribution at every pixel of a picture, f64[height, width], NaN where it was cut
        off; see `geometry.on_picture`."""
        return geometry.on_picture(
            self.attribution[image], self.places[image], *self.pictures[image].size
        )


@dataclass(frozen=True)
class Settings:
    """How patches are attributed and the overlay is put to the test."""

    method: str = saliency.METHODS[0]
    steps: int = 32  # of integrated gradients
    fractions: Sequence[float] = FRACTIONS  # of the patches, hidden
    draws: int = 16  # random orders of hiding
    seed: int = 0
    batch_size: int = 8  # variants of the question run at once

    def __post_init__(self) -> None:
        if self.method not in saliency.METHODS:
            known = ", ".join(saliency.METHODS)
            raise ConfigError(f"method {self.method!r} is unknown; use one of {known}")
        for name in ("steps", "draws", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 1 or more")


@partial(jax.jit, static_argnums=(1, 2))
def _logits(p: Params, cfg: ModelConfig, dtype: Any, batch: dict[str, Array]) -> Array:
    """The router's scores, f32[Lm, B, T, E]."""
    return medmoe.forward(p, cfg, batch, dtype=dtype)[1]["router_logits"]


def experts(model: Responder, row: inputs.Row) -> Experts | None:
    """Which experts each token of a conversation goes to; None in a dense model, and in one that
    does not ask its router (moe.routing)."""
    mixture = model.config.moe
    if mixture is None or mixture.routing != "router":
        return None
    batch = {k: v for k, v in inputs.batch([row]).items() if k not in ("labels", "modality")}
    logits = _logits(model.params, model.config, model.dtype, batch)
    n = len(row.merged.tokens)
    found = [moe.route(one, mixture.top_k, jnp.asarray(batch["mask"])) for one in logits]
    return Experts(
        model.config.moe_layers,
        np.stack([np.asarray(layer.choice[0, :n], np.int64) for layer in found]),
        np.stack([np.asarray(layer.weight[0, :n], float) for layer in found]),
        np.asarray(jax.nn.softmax(logits[:, 0, :n], -1), float),
    )


def pictures_of(given: Pictures, model: Responder) -> tuple[Image.Image, ...]:
    """The pictures at their own size, 8-bit RGB; they were checked by `Responder.pixels`."""
    if given is None:
        return ()
    each = (given,) if isinstance(given, (str, Path, Image.Image, np.ndarray)) else given
    opened = []
    for one in each:
        if isinstance(one, (str, Path)):
            opened.append(images.open_image(one, model.spec.view))
        else:
            image = Image.fromarray(one) if isinstance(one, np.ndarray) else one
            opened.append(images.to_rgb(image))
    return tuple(opened)


def explain(
    model: Responder,
    question: str,
    pictures: Pictures = None,
    answer: str = "",
    settings: Settings | None = None,
) -> Explanation:
    """Takes one question apart.

    Args:
      model: that answers, on one device.
      question: text.
      pictures: as for `Model.generate`.
      answer: whose reasons are wanted; default: the model's own, greedy one.
      settings: see `Settings`.

    Raises:
      DataError: an image cannot be read, or it all does not fit the model.
    """
    how = settings or Settings()
    request = model.request(question, pictures)
    model.check_request(request)
    modality, warnings = None, ()
    if answer:
        ids = model.answer_ids(answer)
    else:
        reply = model.answer([request], Sampling(max_new_tokens=MOST_NEW_TOKENS))[0]
        ids, modality, warnings = list(reply.ids), reply.modality, reply.warnings
    row = inputs.of_answer(model, question, request.pictures, ids)
    opened = pictures_of(pictures, model)
    places = tuple(images.placement(*one.size, model.spec) for one in opened)
    side = model.config.vision.image_size // model.config.vision.patch_size
    sizes = [one.size for one in opened]
    shown = np.array(
        [geometry.shows_picture(w, *size, side) for w, size in zip(places, sizes, strict=True)]
    ).reshape(len(opened), side, side)
    scorer = Scorer(model, row, how.batch_size if opened else 1)
    flat = shown.reshape(-1)
    attribution, curve = np.zeros(flat.shape), None
    if opened:
        attribution = saliency.attribute(scorer, flat, how.method, how.steps)
        curve = deletion.curve(
            lambda mask: np.exp(scorer.hidden(mask)),
            attribution,
            flat,
            fractions=how.fractions,
            draws=how.draws,
            seed=how.seed,
        )
    text = model.tokenizer.decode(ids, skip_special_tokens=True).strip()
    merged = row.merged
    return Explanation(
        question=question,
        answer=answer or text,
        own=not answer,
        probability=float(np.exp(scorer.log_probs(scorer.pixels[None])[0])),
        modality=modality,
        warnings=warnings,
        tokens=tuple(
            "" if place >= 0 else model.tokenizer.decode([token])
            for token, place in zip(merged.tokens, merged.image_pos, strict=True)
        ),
        kinds=inputs.kinds(inputs.batch([row]))[0, : len(merged.tokens)],
        experts=experts(model, row),
        method=how.method,
        attribution=attribution.reshape(shown.shape),
        shown=shown,
        curve=curve,
        pictures=opened,
        places=places,
    )


def report(found: Explanation) -> dict[str, Any]:
    """An explanation for JSON.

    Returns:
      question, answer, probability, modality, warnings; `tokens`: text, kind and, in a MoE model,
      experts `[Lm][top_k]` and weights of each, patches with image and place (row, column);
      `patches`: side, method, attribution `[K][side][side]`, shown, sum of the attribution, beside
      it the difference that hiding all patches makes to log p; `deletion` (`Curve.report`).
    """
    side, difference = found.attribution.shape[-1], None
    if found.curve is not None:
        ends = np.log(np.maximum(found.curve.top[[0, -1]], np.finfo(float).tiny))
        difference = float(ends[0] - ends[1])
    patches = iter(range(found.attribution.size))
    tokens = []
    for number, (text, kind) in enumerate(zip(found.tokens, found.kinds, strict=True)):
        one: dict[str, Any] = {"kind": inputs.KINDS[kind]}
        if kind == inputs.KINDS.index("image"):
            image, place = divmod(next(patches), side * side)
            one |= {"image": image, "place": list(divmod(place, side))}
        else:
            one["text"] = text
        if found.experts is not None:
            one["experts"] = found.experts.choice[:, number].tolist()
            one["weights"] = found.experts.weight[:, number].tolist()
        tokens.append(one)
    return {
        "question": found.question,
        "answer": found.answer,
        "own_answer": found.own,
        "probability": found.probability,
        "modality": found.modality,
        "warnings": list(found.warnings),
        "layers": None if found.experts is None else list(found.experts.layers),
        "tokens": tokens,
        "patches": {
            "method": found.method,
            "side": side,
            "attribution": found.attribution.tolist(),
            "shown": found.shown.tolist(),
            "sum": float(found.attribution.sum()),
            "difference": difference,
        },
        "deletion": None if found.curve is None else found.curve.report(),
    }
