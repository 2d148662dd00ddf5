"""Which values the settings of a run can have. Names of things are checked where they are used; the
numbers and words here would otherwise fail late, deep inside, or not at all."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from medmoe_jax.config import ConfigError, RunConfig
from medmoe_jax.models.layers import REMAT
from medmoe_jax.upcycle import MODES

Limit = tuple[Callable[[Any], bool], str]  # whether a value fits, and which ones do


def _least(least: float) -> Limit:
    return lambda value: least <= value < math.inf, f"must be {least:g} or more"


def _one_of(*words: str) -> Limit:
    return lambda value: value in words, f"must be one of {', '.join(words)}"


POSITIVE: Limit = lambda value: 0 < value < math.inf, "must be above 0"
BELOW_ONE: Limit = lambda value: 0 <= value < 1, "must be in [0, 1)"


def _all(kind: type | tuple[type, ...], what: str) -> Limit:
    return lambda value: all(isinstance(n, kind) and n != "" for n in value), f"must hold {what}"


NUMBERS, TEXTS = _all((int, float), "numbers"), _all(str, "texts")

LIMITS: dict[str, Limit] = {
    "upcycle": _one_of(*MODES),
    "router_level": _one_of("token", "sample"),
    "compute_dtype": _one_of("float32", "bfloat16", "float16"),
    "remat": _one_of(*REMAT),
    "loss_chunk": _least(0),
    "seed": (lambda value: 0 <= value < 2**32, "must be in 0..2**32-1"),
    "data.max_length": _least(1),
    "data.files": TEXTS,
    "data.eval_files": TEXTS,
    "data.weights": NUMBERS,
    "data.buckets": (
        lambda value: all(isinstance(n, int) and n >= 1 for n in value),
        "must hold lengths of 1 or more",
    ),
    "data.most_buckets": _least(1),
    "data.workers": _least(0),
    "data.labels_per_modality": _least(0),
    "train": TEXTS,
    "lora.targets": TEXTS,
    "log.profile_steps": _all(int, "whole numbers"),
    "optim.lr": _least(0),
    "optim.warmup": (lambda value: 0 <= value <= 1, "must be a share of the steps, 0 to 1"),
    "optim.epochs": POSITIVE,
    "optim.steps": _least(0),
    "optim.weight_decay": _least(0),
    "optim.b1": BELOW_ONE,
    "optim.b2": BELOW_ONE,
    "optim.eps": POSITIVE,
    "optim.clip_norm": _least(0),
    "log.every": _least(1),
    "log.save_every": _least(1),
    "log.keep": _least(1),
    "evaluation.every": _least(0),
    "evaluation.rows": _least(0),
    "evaluation.batch_size": _least(1),
    "evaluation.max_new_tokens": _least(1),
}


def check(cfg: RunConfig) -> None:
    """Raises ConfigError where settings cannot work; the message has all of them."""
    wrong = []
    for path, (fits, wanted) in LIMITS.items():
        value: Any = cfg
        for name in path.split("."):
            value = getattr(value, name)
        if not fits(value):
            wrong.append(f"config.{path} is {value!r}, it {wanted}")
    if cfg.evaluation.every and not cfg.evaluation.file:
        wrong.append("config.evaluation.every is set, config.evaluation.file must name questions")
    if wrong:
        raise ConfigError(f"settings that cannot work: {'; '.join(wrong)}")
