"""Which cells a study has: data, starting models, phases and answers, each a function of language
model, seed and variant.

Seeds vary the phantom data, the order of rows and the start of routers (and adapters). The models
that phase 1 starts from are the same for all seeds.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

from medmoe_jax import train
from medmoe_jax.config import ConfigError, RunConfig
from medmoe_jax.convert.to_jax import to_jax
from medmoe_jax.data import phantom
from medmoe_jax.demo import checkpoints
from medmoe_jax.evaluation import rows as question_rows
from medmoe_jax.experiments import answers
from medmoe_jax.experiments.cells import Cell, Json, fingerprint
from medmoe_jax.experiments.config import NAMED, StudyConfig, changed, override
from medmoe_jax.experiments.variants import variant

# Of the files that phantom data have, by role.
PHANTOM_FILES: dict[str, tuple[str, ...]] = {
    "alignment": ("alignment.json",),
    "instruct": ("instruct.json",),
    "instruct_heldout": ("instruct_heldout.json",),
    "tune": ("train_all.json", "signs_train.json"),
    "classify": ("classify_train.json",),
    "classify_more": ("classify_more_train.json",),
    "tests": ("Findings=findings.json", "Signs=signs.json", "Pathology=pathology.json"),
    "classify_tests": ("Classes=classify_test.json", "More classes=classify_more_test.json"),
}
# Do not change what a phase gives, or are filled in when it runs.
NOT_IN_SPEC = ("mesh", "cluster", "compilation_cache", "init", "router", "evaluation")


class Study:
    """The cells of a study. Nothing is computed here; `Store.get` does it."""

    def __init__(self, cfg: StudyConfig, seeds: int) -> None:
        self.cfg, self.seeds = cfg, tuple(range(seeds))
        self.first = self.seeds[0]  # of the whole study: for what no seed changes
        self.phantoms = not cfg.files.tune

    def of_seed(self, seed: int) -> Study:
        """The part of the study that belongs to one seed."""
        part = copy.copy(self)
        part.seeds = (seed,)
        return part

    # --- data ---

    def names(self, role: str) -> tuple[str, ...]:
        """The files of a role, tests as NAME=FILE.

        Raises:
          ConfigError: own data lack them.
        """
        if self.phantoms:
            return PHANTOM_FILES[role]
        found = getattr(self.cfg.files, role)
        if not found:
            raise ConfigError(f"config.files.{role} is empty, and this experiment needs it")
        return found

    def data(self, seed: int) -> tuple[Cell, ...]:
        """The phantom data of a seed; nothing where files are given."""
        if not self.phantoms:
            return ()
        settings = self.cfg.phantom
        used = ("train", "test", "size", "train_questions", "test_questions")
        spec = {"kind": "phantom data", "seed": seed} | {k: getattr(settings, k) for k in used}

        def make(folder: Path, _: list[Path]) -> None:
            asked = (settings.train_questions, settings.test_questions)
            phantom.write(
                folder,
                seed=seed,
                train=settings.train,
                test=settings.test,
                size=settings.size,
                questions_per_image=asked,
                workers=os.cpu_count() or 1,
                signs=True,
            )
            split_tests(folder)

        return (Cell(f"data-s{seed}", spec, (), make),)

    def paths(self, role: str, data: Path | None) -> tuple[str, ...]:
        """The files of a role, in the folder of the phantom data where these are made."""
        files = [file_of(role, entry) for entry in self.names(role)]
        return tuple(str(data / file) if data else file for file in files)

    def content(self, role: str) -> list[list[str]]:
        """The files of a role with what they hold, for specs; phantom files are known by their
        cell."""
        names = self.names(role)
        marks = ["" if self.phantoms else fingerprint(file_of(role, name)) for name in names]
        return [[name, mark] for name, mark in zip(names, marks, strict=True)]

    def images(self, data: Path | None) -> str:
        """The folder of the images; "" = `images` beside each file."""
        return str(data / "images") if data else self.cfg.files.image_folder

    # --- models ---

    def start(self, llm: str) -> Cell:
        """What phase 1 starts from: tiny models pretrained on phantoms that are in no file, or the
        model folder that the config names."""
        init, phantoms = self.cfg.phases(llm).init, self.cfg.phantom
        if init:

            def link(folder: Path, _: list[Path]) -> None:
                (folder / "model").symlink_to(Path(init).absolute(), target_is_directory=True)

            spec = {"kind": "start", "init": init, "content": fingerprint(init)}
            return Cell(f"start-{llm}", spec, (), link)

        model = self.cfg.phases(llm).stage1.model

        def see(folder: Path, _: list[Path]) -> None:
            checkpoints.make_vision(
                folder / "clip", model, 0, phantoms.vision_studies, phantoms.vision_steps
            )

        def read(folder: Path, _: list[Path]) -> None:
            checkpoints.make_language(folder / "llm", model, 0, phantoms.language_steps, signs=True)

        def join(folder: Path, parents: list[Path]) -> None:
            to_jax(parents[1] / "llm", folder / "model", vision=parents[0] / "clip", seed=0)

        shapes = dataclasses.asdict(model)
        tower = {"kind": "clip", "shape": shapes["vision"], "steps": phantoms.vision_steps}
        tower |= {"studies": phantoms.vision_studies}
        words = {
            "kind": "llm",
            "reads": "signs",
            "shape": shapes["llm"],
            "steps": phantoms.language_steps,
        }
        parts = Cell("clip", tower, (), see), Cell(f"llm-{llm}", words, (), read)
        return Cell(f"start-{llm}", {"kind": "join"}, parts, join)

    def stage1(self, llm: str, seed: int) -> Cell:
        """Phase 1."""
        run = self.cfg.phases(llm).stage1
        return self.phase("stage1", llm, seed, run, self.start(llm), ("alignment",))

    def stage2(self, llm: str, seed: int) -> Cell:
        """Phase 2."""
        run = self.cfg.phases(llm).stage2
        return self.phase("stage2", llm, seed, run, self.stage1(llm, seed), ("instruct",))

    def router(self, llm: str, seed: int, changes: Json | None = None, mark: str = "") -> Cell:
        """The router phase, with changes to its config (dotted path -> value)."""
        run = override(self.cfg.phases(llm).router, changes or {})
        init = self.stage2(llm, seed)
        return self.phase(
            f"router{mark}", llm, seed, run, init, ("instruct",), ("instruct_heldout",)
        )

    def stage3(self, llm: str, seed: int, name: str = "moe") -> Cell:
        """Phase 3 as a variant has it."""
        chosen = variant(self.cfg, name)
        run = override(self.cfg.phases(llm).stage3, chosen.changes)
        if chosen.router is None:
            init = self.stage2(llm, seed)
        else:
            experts = chosen.router.get("model.moe.experts")
            mark = f"-{experts}experts" if experts else ""
            init = self.router(llm, seed, chosen.router, mark)
        return self.phase(f"stage3-{name}", llm, seed, run, init, chosen.roles)

    def phase(
        self,
        name: str,
        llm: str,
        seed: int,
        run: RunConfig,
        init: Cell,
        roles: tuple[str, ...],
        held_out: tuple[str, ...] = (),
    ) -> Cell:
        """Any phase of training: its folder is the workdir of `medmoe_jax.train`.

        Args:
          name: of the cell.
          llm: of the cell.
          seed: of the cell.
          run: its config; where it starts, its files and its seed are filled in.
          init: cell with the model to start from.
          roles: of the files to train on.
          held_out: of the rows that the router is judged by.
        """
        run = dataclasses.replace(run, seed=seed)
        spec: Json = {
            "kind": "phase",
            "run": {k: v for k, v in changed(run, RunConfig()).items() if k not in NOT_IN_SPEC},
            "router": run.router,
            "files": [self.content(role) for role in (*roles, *held_out)],
            "images": self.cfg.files.image_folder,
        }
        cache = self.cfg.compilation_cache

        def make(folder: Path, parents: list[Path]) -> None:
            data = parents[1] if self.phantoms else None
            ready = override(
                run,
                {
                    "init": str(parents[0] / "model"),
                    "compilation_cache": cache,
                    "data.files": sum((self.paths(role, data) for role in roles), ()),
                    "data.eval_files": sum((self.paths(role, data) for role in held_out), ()),
                    "data.image_folder": self.images(data),
                },
            )
            train.train(ready, folder)
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)

        return Cell(f"{name}-{llm}-s{seed}", spec, (init, *self.data(seed)), make, resumes=True)

    # --- answers ---

    def answers(self, model: Cell, seed: int, control: str = "shown", role: str = "tests") -> Cell:
        """Answers to all test files of a role, with their scores (`answers.read_scores`)."""
        how = self.cfg.answers
        mark = "" if control == "shown" else f"-{control}"
        kind = "" if role == "tests" else f"-{role}"
        spec: Json = {
            "kind": "answers",
            "how": {k: v for k, v in dataclasses.asdict(how).items() if k != "batch_size"},
            "control": control,
            "files": self.content(role),
            "images": self.cfg.files.image_folder,
        }

        def make(folder: Path, parents: list[Path]) -> None:
            data = parents[1] if self.phantoms else None
            named = [name.partition("=")[0] for name in self.names(role)]
            tests = dict(zip(named, map(Path, self.paths(role, data)), strict=True))
            answers.answer(parents[0] / "model", tests, self.images(data), control, how, folder)

        name = f"answers{mark}{kind}-{model.name}"
        return Cell(name, spec, (model, *self.data(seed)), make)


def file_of(role: str, entry: str) -> str:
    """The file that an entry of a role names."""
    return entry.partition("=")[2] if role in NAMED else entry


def split_tests(folder: Path) -> None:
    """Writes the three tests of a phantom study: what is seen in CT, MRI and X-rays, what signs
    mean there, and both in pathology."""
    seen = question_rows.read(folder / "test.json")
    meant = question_rows.read(folder / "signs_test.json")

    def save(name: str, chosen: list[dict[str, Any]]) -> None:
        (folder / name).write_text(json.dumps(chosen, indent=1) + "\n")

    for name, part in (("findings", seen), ("signs", meant)):
        save(f"{name}.json", [row for row in part if row["modality"] != "Pathology"])
    save("pathology.json", [row for row in seen + meant if row["modality"] == "Pathology"])
