"""Cells: done once, never stale, redone where they were cut off."""

from __future__ import annotations

import fcntl
import os
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from medmoe_jax.config import ConfigError, MoeConfig, RunConfig
from medmoe_jax.experiments.cells import DONE, Cell, Store, every, fingerprint
from medmoe_jax.experiments.config import StudyConfig, changed, override
from medmoe_jax.experiments.study import Study

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "experiments.py"


def study_config(**changes: Any) -> StudyConfig:
    """The tiny study with changes (dots of the paths as double underscores)."""
    cfg = runpy.run_path(str(CONFIG))["get_config"]("tiny")
    return override(cfg, {path.replace("__", "."): value for path, value in changes.items()})


def counting(
    name: str, spec: dict, parents: tuple[Cell, ...], log: list[str], **more: bool
) -> Cell:
    def make(folder: Path, found: list[Path]) -> None:
        log.append(name)
        said = "".join((parent / "text").read_text() for parent in found)
        with (folder / "text").open("a") as file:
            file.write(said + name)

    return Cell(name, spec, parents, make, **more)


def test_a_cell_is_made_once_and_its_parents_before_it(tmp_path: Path):
    log: list[str] = []
    base = counting("base", {"x": 1}, (), log)
    first, second = (counting(n, {"n": n}, (base,), log) for n in ("first", "second"))
    store = Store(tmp_path)
    assert (store.get(first) / "text").read_text() == "basefirst"
    store.get(second)
    store.get(first)
    assert log == ["base", "first", "second"]
    assert Store(tmp_path).done(first) and store.known(first)["parents"] == [base.folder]
    assert [cell.name for cell in every([second, first])] == ["base", "second", "first"]


def test_what_matters_makes_another_cell(tmp_path: Path):
    log: list[str] = []
    store = Store(tmp_path)
    base = counting("base", {"x": 1}, (), log)
    other = counting("base", {"x": 2}, (), log)
    child = counting("child", {}, (base,), log)
    assert store.get(base) != store.get(other)
    assert child.digest != replace(child, parents=(other,)).digest
    # The name is for people: equal work under another name is the same cell.
    store.get(replace(base, name="called otherwise"))
    assert log == ["base", "base"]


def test_a_cut_off_cell_is_made_anew_or_goes_on(tmp_path: Path):
    log: list[str] = []
    store = Store(tmp_path)
    for resumes, expected in ((False, "a"), (True, "halfa")):
        cell = counting("a", {"resumes": resumes}, (), log, resumes=resumes)
        store.place(cell).mkdir()
        (store.place(cell) / "text").write_text("half")
        assert not store.done(cell)
        assert (store.get(cell) / "text").read_text() == expected
    failing = Cell("bad", {}, (), lambda folder, _: (folder / "nowhere" / "x").write_text(""))
    with pytest.raises(FileNotFoundError):
        store.get(failing)
    assert not (store.place(failing) / DONE).exists()


def test_what_another_process_makes_is_left_to_it(tmp_path: Path):
    """An open lock file stands for the other process: locks belong to open files."""
    log: list[str] = []
    cell, store = counting("a", {}, (), log), Store(tmp_path)
    with (store.root / f".{cell.digest[:10]}.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert not store.attempt(cell, wait=False) and not log
    assert store.attempt(cell, wait=False) and log == ["a"]
    assert store.attempt(cell, wait=False) and log == ["a"]


def test_files_are_known_by_their_content(tmp_path: Path):
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    a.write_text("[1]")
    b.write_text("[2]")
    assert fingerprint(str(a)) != fingerprint(str(b))


def test_records_are_known_by_when_they_were_written(tmp_path: Path):
    """A split of theirs is a name below the folder, and no file."""
    info = tmp_path / "1.0.0" / "dataset_info.json"
    info.parent.mkdir()
    info.write_text("{}")
    os.utime(info, (1, 1))
    names = [str(info.parent), str(info.parent / "train")]
    before = [fingerprint(name) for name in names]
    os.utime(info, (2, 2))
    fingerprint.cache_clear()
    assert before[0] == before[1] not in [fingerprint(name) for name in names]


def test_override_names_fields_by_path():
    run = override(RunConfig(), {"optim.lr": 1.0, "data.files": ("x",), "seed": 3})
    assert (run.optim.lr, run.data.files, run.seed) == (1.0, ("x",), 3)
    assert run.optim.epochs == RunConfig().optim.epochs
    with pytest.raises(ConfigError, match="no field 'rate'"):
        override(RunConfig(), {"optim.rate": 1.0})


def test_a_spec_holds_what_differs_from_the_defaults():
    run = override(RunConfig(), {"optim.lr": 1.0, "train": ("a",), "model.moe": MoeConfig(top_k=2)})
    assert changed(run, RunConfig()) == {
        "model": {"moe": {"top_k": 2}},
        "train": ["a"],
        "optim": {"lr": 1.0},
    }
    assert changed(override(run, {"model.moe": MoeConfig()}), RunConfig())["model"] == {"moe": {}}


def test_cells_of_a_study_are_shared():
    """Variants share data, phases 1 and 2 and the router; equal variants are one cell."""
    study = Study(study_config(), 2)
    moe, top1, top2 = (study.stage3("phi", 0, name) for name in ("moe", "top1", "top2"))
    assert moe.digest == top1.digest != top2.digest
    assert moe.parents[0].digest == top2.parents[0].digest
    dense, learned = (study.stage3("phi", 0, name) for name in ("dense", "learned"))
    assert dense.parents[0].digest == learned.parents[0].digest
    assert dense.parents[0].digest == study.stage2("phi", 0).digest
    assert study.stage3("phi", 1).digest != moe.digest
    assert study.stage3("phi", 0, "experts4").digest == top2.digest
    six = study.stage3("phi", 0, "experts6")
    assert six.parents[0].digest != moe.parents[0].digest
    with pytest.raises(ConfigError, match="unknown variant"):
        study.stage3("phi", 0, "top9")


def test_settings_that_matter_change_a_study(tmp_path: Path):
    before = Study(study_config(), 1)
    for variant, changes in (
        ("moe", {"phi__stage2__optim__lr": 0.5}),
        ("moe", {"phantom__train": 12}),
        ("learned", {"aux_coef": 0.5}),
    ):
        after = Study(study_config(**changes), 1)
        assert after.stage3("phi", 0, variant).digest != before.stage3("phi", 0, variant).digest
    same = Study(study_config(phi__stage3__mesh__fsdp=2, compilation_cache="x"), 1)
    assert same.stage3("phi", 0, "dense").digest == before.stage3("phi", 0, "dense").digest
    file = tmp_path / "a.json"
    file.write_text("[]")
    roles = {f"files__{role}": (str(file),) for role in ("alignment", "instruct", "tune")}
    own = Study(study_config(**roles), 1)
    assert not own.data(0) and own.stage2("phi", 0).digest != before.stage2("phi", 0).digest
    with pytest.raises(ConfigError, match=r"files\.tests is empty"):
        own.answers(own.stage2("phi", 0), 0)
