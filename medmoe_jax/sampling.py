"""How the next token is chosen from the scores: settings, and the choice on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from medmoe_jax.config import ConfigError

Array = jax.Array


@dataclass(frozen=True)
class Sampling:
    """Settings of generation; the default is greedy.

    Attributes:
      temperature: 0 takes the likeliest token; above, tokens are drawn from softmax(scores / t).
      top_k: draw from the k likeliest tokens only; 0 = all.
      top_p: draw from the fewest tokens whose probability reaches top_p; 1 = all.
      repetition_penalty: above 1, ids that occurred (in the prompt too) get less likely.
      beams: above 1, beam search over so many continuations; without drawing.
      length_penalty: exponent of the length by which a beam's score is divided.
      max_new_tokens: most ids of an answer, the end included.
      stop: texts at which an answer ends, beside the end token; they are cut off.
      seed: of the draws. Each row of a batch draws from a key of its own.

    Raises:
      ConfigError: a value out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    beams: int = 1
    length_penalty: float = 1.0
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = [
            f"{name} is {getattr(self, name)}, {wanted}"
            for name, fits, wanted in (
                ("temperature", self.temperature >= 0, "must be 0 or more"),
                ("top_k", self.top_k >= 0, "must be 0 (all) or more"),
                ("top_p", 0 < self.top_p <= 1, "must be in (0, 1]"),
                ("repetition_penalty", self.repetition_penalty > 0, "must be above 0"),
                ("beams", self.beams >= 1, "must be 1 or more"),
                ("max_new_tokens", self.max_new_tokens >= 1, "must be 1 or more"),
                ("stop", "" not in self.stop, "must not hold an empty text"),
            )
            if not fits
        ]
        if self.beams > 1 and self.temperature > 0:
            wrong.append("beam search does not draw: set temperature to 0 or beams to 1")
        if wrong:
            raise ConfigError("sampling: " + "; ".join(wrong))


class Knobs(NamedTuple):
    """The part of the settings that the device reads; no value needs a program of its own."""

    temperature: Any  # f32[]
    top_k: Any  # i32[], 0 = all
    top_p: Any  # f32[]
    penalty: Any  # f32[]
    seeds: Any  # u32[B]


def knobs(sampling: Sampling, seeds: Sequence[int]) -> Knobs:
    """What the device reads of the settings; `seeds` gives each row its own draws. Host values:
    several processes that have the same can all pass them on."""
    mixed = [(sampling.seed * 1_000_003 + seed) % 2**32 for seed in seeds]
    return Knobs(
        np.float32(sampling.temperature),
        np.int32(sampling.top_k),
        np.float32(sampling.top_p),
        np.float32(sampling.repetition_penalty),
        np.array(mixed, np.uint32),
    )


def penalised(logits: Array, used: Array, penalty: Array) -> Array:
    """Scores of used ids divided by the penalty if positive, else multiplied by it.

    f32[B, V], bool[B, V], f32[] -> f32[B, V]. Source: Keskar et al. 2019, CTRL.
    """
    return jnp.where(used, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def restricted(logits: Array, top_k: Array, top_p: Array) -> Array:
    """-inf for all but the top_k likeliest tokens and the fewest that reach top_p.

    Args:
      logits: f32[B, V].
      top_k: i32[], 0 = all. Ties with the k-th score stay.
      top_p: f32[]: applied to what top_k left; the likeliest token always stays.

    Returns:
      f32[B, V].
    """
    v = logits.shape[-1]
    falling = jnp.sort(logits, axis=-1)[:, ::-1]
    keep = jnp.where(top_k > 0, jnp.minimum(top_k, v), v)
    floor = jnp.take_along_axis(falling, jnp.full((len(logits), 1), keep - 1), -1)
    falling = jnp.where(falling >= floor, falling, -jnp.inf)
    share = jax.nn.softmax(falling, axis=-1)
    # A token stays if those before it do not reach top_p by themselves. Rounded sums reach 1 early.
    reached = (jnp.cumsum(share, -1) - share >= top_p) & (top_p < 1)
    kept = ~reached & (falling > -jnp.inf)
    kept = kept.at[:, 0].set(True)
    floor = jnp.where(kept, falling, jnp.inf).min(-1, keepdims=True)
    return jnp.where(logits >= floor, logits, -jnp.inf)


def choose(logits: Array, knobs: Knobs, step: Array, used: Array | None, draw: bool) -> Array:
    """The next token of every row.

    Args:
      logits: f32[B, V].
      knobs: settings.
      step: i32[]: number of the token, so that every step draws anew.
      used: bool[B, V], ids that occurred; None = no repetition penalty.
      draw: sample; else the likeliest.

    Returns:
      i32[B].
    """
    if used is not None:
        logits = penalised(logits, used, knobs.penalty)
    if not draw:
        return logits.argmax(-1).astype(jnp.int32)
    # Falling from zero, the scores cannot overflow where the temperature is tiny.
    falling = logits - logits.max(-1, keepdims=True)
    temperature = jnp.maximum(knobs.temperature, jnp.finfo(jnp.float32).tiny)
    logits = restricted(falling / temperature, knobs.top_k, knobs.top_p)
    keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), step))(knobs.seeds)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
