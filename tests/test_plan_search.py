"""The search for a mesh, a batch and rematerialisation, with figures that are made up."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from plan_table import EXPERTS, LENGTH

from medmoe_jax import hardware
from medmoe_jax.config import ConfigError, MeshConfig
from medmoe_jax.plan import __main__ as command
from medmoe_jax.plan import estimate, programs, report, search, targets

GIB = 2**30


def row(cfg: Any, seconds: float, peak: float, limit: float = 10.0) -> estimate.Plan:
    """A plan with made-up figures."""
    return estimate.Plan(
        "train", "stage3", "small", "v5e:1x1", 1, dict(vars(cfg.mesh)), cfg.optim.batch_size,
        LENGTH, cfg.remat, "bfloat16", peak <= limit, limit, "", {"peak": peak}, 1.0, 1.0, 1.0,
        {}, {}, 0, {"memory": seconds},
    )  # fmt: skip


TARGET = targets.Target("v5e:2x2", "tpu", hardware.by_name("v5e"), [None] * 4)


def searched(
    monkeypatch: pytest.MonkeyPatch, measure: search.Measure, least: float = 0.0
) -> list[search.Found]:
    """What a search on four chips finds, each run taking `least` bytes at least."""
    monkeypatch.setattr(search, "least_memory", lambda *_: least)
    return list(search.search(EXPERTS, TARGET, LENGTH, 1, measure))


def test_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best mesh, then the batch as long as it fits and pays, then less rematerialisation."""
    asked: list[search.Trial] = []

    def measure(trial: search.Trial) -> estimate.Plan:
        asked.append(trial)
        cfg, size = trial.run, trial.run.optim.batch_size
        slow = 1.0 if cfg.mesh.expert == 4 else 2.0
        held = {"full": 0.5, "attention": 0.55, "experts": 0.57, "dots": 0.6, "none": 2.0}
        pace = {"full": 1, "attention": 0.9, "experts": 0.95, "dots": 0.8, "none": 0.7}
        return row(cfg, slow * (1 + size) * pace[cfg.remat], size * held[cfg.remat])

    found = searched(monkeypatch, measure)
    asked_for = [(*vars(t.run.mesh).values(), t.run.optim.batch_size, t.run.remat) for t in asked]
    assert asked_for[:6] == [
        *((1, 4, 1, 4, "full"), (2, 2, 1, 4, "full"), (4, 1, 1, 4, "full")),
        *((1, 2, 2, 4, "full"), (2, 1, 2, 4, "full"), (1, 1, 4, 4, "full")),
    ]
    assert [t[3:] for t in asked_for[6:]] == [
        *((8, "full"), (16, "full"), (32, "full")),  # the last does not fit
        *((16, "attention"), (16, "experts"), (16, "dots")),
        *((16, "none"), (8, "none"), (4, "none")),
    ]
    assert all(t[:3] == (1, 1, 4) for t in asked_for[6:]) and [run for run, _ in found] == [
        t.run for t in asked
    ]
    assert asked[0].left >= len(asked) - 1 and asked[-1].left == 0
    run, plan = search.best(found) or (None, None)
    assert run is not None and plan is not None
    assert (run.mesh.expert, run.optim.batch_size, run.remat) == (4, 16, "dots")
    assert plan.memory["peak"] == pytest.approx(9.6)
    # Whoever stops has the best so far.
    early = search.best(found[:4])
    assert early is not None and early[0].mesh == MeshConfig(1, 4, 1)


def test_a_search_compiles_nothing_that_is_hopeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too much enters a step; or a mesh that spreads weights further does not fit."""

    def full(trial: search.Trial) -> estimate.Plan:
        return row(trial.run, 1.0, 11.0)

    def failing(trial: search.Trial) -> estimate.Plan:
        return dataclasses.replace(row(trial.run, 1.0, 1.0), fits=None, obstacle="INTERNAL: x")

    asked: list[search.Trial] = []

    def noted(trial: search.Trial) -> estimate.Plan:
        asked.append(trial)
        return full(trial)

    found = searched(monkeypatch, noted)
    assert [t.obstacle[:6] for t in asked] == ["", "a mesh", "a mesh", "", "a mesh", ""]
    assert search.best(found) is None and len(found) == 6
    asked.clear()
    searched(monkeypatch, noted, 16 * GIB)
    alone = "weights, optimiser state and gradients alone take 16.00 GiB"
    assert [t.obstacle for t in asked] == [alone] * 6
    assert search.best(searched(monkeypatch, failing)) is None
    line = report.line(failing(asked[0]))
    assert line == "does not compile: INTERNAL: x"


def test_an_interrupted_search_keeps_what_it_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file holds all plans, and the fastest that fits is recommended."""
    file = tmp_path / "plans.json"
    given = SimpleNamespace(json=str(file), search=True, length=LENGTH, images=1)
    monkeypatch.setattr(command, "FLAGS", given)

    def some(number: int) -> Any:
        def search_of(cfg: Any, *_: Any) -> Iterator[search.Found]:
            runs = [programs.with_batch(cfg, n) for n in (4, 8, 16)]
            plans = [row(runs[0], 3.0, 1.0), row(runs[1], 3.0, 2.0), row(runs[2], 1.0, 11.0)]
            yield from list(zip(runs, plans, strict=True))[:number]
            raise KeyboardInterrupt

        return search_of

    monkeypatch.setattr(search, "search", some(3))
    plan = command.searched(EXPERTS, "small", TARGET)
    assert plan.batch == 8
    found = json.loads(file.read_text())
    assert [(p["batch"], p["fits"], p["best"]) for p in found] == [
        (4, True, False),
        (8, True, True),
        (16, False, False),
    ]
    words = "--config.mesh.expert=1 --config.optim.batch_size=8 --config.remat=full"
    assert words in capsys.readouterr().out
    assert len(report.table(found).splitlines()) == 2 + 3
    monkeypatch.setattr(search, "search", some(0))
    with pytest.raises(ConfigError, match="interrupted before it had found anything"):
        command.searched(EXPERTS, "small", TARGET)


@pytest.mark.parametrize(
    ("message", "fits", "line"),
    [
        ("RESOURCE_EXHAUSTED: Used 18G of 15.75G\nmore", False, "does not fit: Used 18G of 15.75G"),
        ("INTERNAL: Mosaic failed\nmore", None, "does not compile: INTERNAL: Mosaic failed"),
    ],
)
def test_a_compiler_that_fails(message: str, fits: bool | None, line: str) -> None:
    """Its first line is what is known of the program."""

    class Traced:
        def lower(self, **_: Any) -> Any:
            raise jax.errors.JaxRuntimeError(message)

    program = programs.compiled("train", Traced(), TARGET, {"data": 4}, {"frozen": 1.0}, 1.0)
    plan = estimate.plan(program, EXPERTS, TARGET, "small", LENGTH)
    assert plan.fits is fits and report.line(plan) == line


def test_what_overlaps_less_counts_as_slower() -> None:
    """Of two plans with the same bound, the one with less beside it is faster."""
    one = row(EXPERTS, 2.0, 1.0)
    two = dataclasses.replace(one, seconds={"memory": 2.0, "network": 1.0})
    assert one.bound == two.bound
    assert search.rate(one) == one.tokens / 2.0
    assert search.rate(two) == pytest.approx(one.tokens / 2.5)
