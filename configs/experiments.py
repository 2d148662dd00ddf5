"""The paper's study: every table and figure, for both language models.

    python -m medmoe_jax.experiments all --seeds 3 --workdir runs/experiments

runs all of it on phantom data with tiny models, in under an hour on 2 CPU cores; one name
(`table4`, `figure5`, `upcycling` ...) runs what that one needs. The real study needs other values
only:

    python -m medmoe_jax.experiments table4 --config configs/experiments.py:full --seeds 3 \\
        --workdir runs/study --config.files.image_folder=images \\
        --config.phi.init=models/phi2 --config.stablelm.init=models/stablelm \\
        --config.files.alignment="('alignment.json',)" \\
        --config.files.instruct="('instruct.json',)" \\
        --config.files.tune="('train_all.json',)" \\
        --config.files.tests="('VQA-RAD=rad.json', 'SLAKE=slake.json', 'PathVQA=pvqa.json')"

Sizes: tiny (tiny and tiny_stablelm), full (phi2 and stablelm). Fields: `experiments/config.py`; the
phases are those of the other files here, changed as a table asks (`experiments/study.py`).
"""

import dataclasses
import runpy
from pathlib import Path
from typing import Any

from medmoe_jax.config import ConfigError
from medmoe_jax.experiments.config import Phases, StudyConfig, override

SIZES = {"tiny": ("tiny", "tiny_stablelm"), "full": ("phi2", "stablelm")}
PHASES = ("stage1", "stage2", "router", "stage3")
QUIET: dict[str, Any] = {"log.every": 50, "log.save_every": 100000, "log.tensorboard": False}
# What a tiny phase needs to learn enough to be compared, and no more. All phantom rows of a phase
# fit into its first length: one compilation.
SHORT: dict[str, dict[str, Any]] = {
    "stage1": {"optim.epochs": 3.0, "data.buckets": (64, 512)},
    "stage2": {"optim.epochs": 5.0, "data.buckets": (176, 512)},
    "router": {"optim.epochs": 2.0, "data.buckets": (176, 512)},
    "stage3": {
        "optim.epochs": 2.0,
        "optim.batch_size": 8,
        "optim.lr": 2e-3,
        "data.buckets": (96, 512),
    },
}
# Narrower than the demonstration's models: a study has some sixty of them.
NARROW = {"model.llm.width": 96, "model.llm.heads": 3, "model.llm.kv_heads": 3}
FFN = {"tiny": 384, "tiny_stablelm": 256}


def get_config(size: str = "tiny") -> StudyConfig:
    """The study for a size."""
    if size not in SIZES:
        raise ConfigError(f"unknown size {size!r} of a study; use one of {', '.join(SIZES)}")
    study = StudyConfig(phi=_phases(SIZES[size][0], size), stablelm=_phases(SIZES[size][1], size))
    if size == "tiny":
        return dataclasses.replace(study, lora_ranks=(16, 8))
    return override(study, {"answers.max_new_tokens": 64, "answers.batch_size": 16})


def _phases(model: str, size: str) -> Phases:
    """The files of this folder for a model size."""
    here = Path(__file__).parent
    found = {name: runpy.run_path(str(here / f"{name}.py"))["get_config"](model) for name in PHASES}
    if size == "tiny":
        narrow = NARROW | {"model.llm.ffn": FFN[model]}
        found = {name: override(run, QUIET | narrow | SHORT[name]) for name, run in found.items()}
    return Phases(**found)
