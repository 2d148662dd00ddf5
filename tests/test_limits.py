"""Values of settings that cannot work are told before a run begins."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import tiny_runs

from medmoe_jax import limits, train
from medmoe_jax.config import ConfigError, EvaluationConfig
from medmoe_jax.experiments.config import override


@pytest.mark.parametrize("name", ["stage1", "stage2", "router", "stage3"])
@pytest.mark.parametrize("size", ["phi2", "stablelm", "tiny", "tiny_stablelm"])
def test_the_phases_as_they_are_can_work(name: str, size: str) -> None:
    limits.check(tiny_runs.phase(name, size))


@pytest.mark.parametrize(
    ("path", "value", "wanted"),
    [
        ("optim.steps", -3, "must be 0 or more"),
        ("optim.epochs", 0.0, "must be above 0"),
        ("optim.lr", math.nan, "must be 0 or more"),
        ("optim.warmup", 2.0, "must be a share of the steps, 0 to 1"),
        ("optim.b2", 1.0, r"must be in \[0, 1\)"),
        ("log.every", 0, "must be 1 or more"),
        ("log.keep", 0, "must be 1 or more"),
        ("loss_chunk", -1, "must be 0 or more"),
        ("seed", 2**32, r"must be in 0..2\*\*32-1"),
        ("data.buckets", (64, 0), "must hold lengths of 1 or more"),
        ("data.buckets", (64.5,), "must hold lengths of 1 or more"),
        ("data.files", (3,), "must hold texts"),
        ("data.files", ("",), "must hold texts"),
        ("train", (1,), "must hold texts"),
        ("log.profile_steps", (1.5, 3), "must hold whole numbers"),
        ("data.workers", -1, "must be 0 or more"),
        ("compute_dtype", "float8", "must be one of float32, bfloat16, float16"),
        ("remat", "some", "must be one of none, dots"),
        ("upcycle", "new", "must be one of paper, function_preserving"),
        ("evaluation.batch_size", 0, "must be 1 or more"),
    ],
)
def test_a_value_that_cannot_work_is_named(path: str, value: Any, wanted: str) -> None:
    config = override(tiny_runs.phase("stage3"), {path: value})
    with pytest.raises(ConfigError, match=rf"config\.{path} is .*, it {wanted}"):
        limits.check(config)


def test_all_of_them_are_told_at_once(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"log.save_every": 0, "optim.eps": -1.0}
    changes |= {"evaluation": EvaluationConfig(every=5)}
    config = override(tiny_runs.phase("stage2"), changes)
    with pytest.raises(ConfigError) as found:
        train.train(config, tmp_path / "run")
    for part in ("log.save_every is 0", "optim.eps is -1.0", "evaluation.file must name"):
        assert part in str(found.value)
    assert not (tmp_path / "run").exists()
