"""The whole path on phantom data: `python -m medmoe_jax.demo --workdir DIR [--llm phi|stablelm]`.

Every step is a command that a user would type; it is printed before it runs. Finished steps are not
run again, so an interrupted demonstration goes on where it was. `--quick` trains a fraction of the
steps and ends with the model of phase 3: what the notebooks start from.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from medmoe_jax.config import ConfigError, natural
from medmoe_jax.demo.checkpoints import PRESET

CONFIGS = Path(__file__).resolve().parents[2] / "configs"  # of the clone that this file is in
SETTINGS = "settings.json"  # what a workdir was begun with
# What --quick adds to the commands of some steps.
QUICK: dict[str, tuple[object, ...]] = {
    "phantom studies": ("--train", 400, "--test", 80),
    "tiny checkpoints": ("--studies", 1000, "--vision-steps", 400, "--language-steps", 150),
    "stage1": ("--config.optim.steps=40",),
    "stage2": ("--config.optim.steps=100",),
    "router": ("--config.optim.steps=30", "--config.data.labels_per_modality=50"),
    "stage3": ("--config.optim.steps=60",),
}
SHOWN = 6  # questions printed with their answers
EVALUATED = (
    ("stage 2", "stage2", "shown"),
    ("stage 3", "stage3", "shown"),
    ("blank", "stage3", "blank"),
)


class Demo:
    """Runs the steps in order and remembers how long each took."""

    def __init__(self, workdir: Path, llm: str, seed: int, quick: bool) -> None:
        """Raises ConfigError where the workdir was begun with other settings, or no configs are
        here."""
        self.dir, self.llm, self.seed, self.quick = workdir, llm, seed, quick
        if not CONFIGS.is_dir():
            raise ConfigError(
                f"{CONFIGS} does not exist: the phases are read from there; clone the project and "
                "install it with `pip install -e .`"
            )
        settings, file = {"llm": llm, "seed": seed, "quick": quick}, workdir / SETTINGS
        before = json.loads(file.read_text()) if file.exists() else settings
        if before != settings:
            raise ConfigError(f"{workdir} was begun with {before}; take another --workdir")
        workdir.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings) + "\n")
        self.size = PRESET[llm]
        self.data = workdir / "data"
        self.seconds: dict[str, float] = {}

    def step(self, name: str, module: str, *args: object, makes: Path | None = None) -> None:
        """Runs `python -m medmoe_jax.MODULE ARGS`, unless it finished in an earlier run. What one
        that was stopped left in the folder `makes` is removed: the command wants it empty."""
        more = QUICK.get(name, ()) if self.quick else ()
        words = [sys.executable, "-m", f"medmoe_jax.{module}", *map(str, (*args, *more))]
        shown = ["python", *words[1:]]
        mark = self.dir / "done" / f"{name}.json"
        print(f"\n=== {name} ===\n$ {shlex.join(shown)}", flush=True)
        if mark.exists():
            self.seconds[name] = json.loads(mark.read_text())["seconds"]
            print("(done before)", flush=True)
            return
        if makes is not None:
            shutil.rmtree(makes, ignore_errors=True)
        started = time.perf_counter()
        status = subprocess.run(words, check=False).returncode
        if status:
            sys.exit(f"the step {name!r} failed with status {status}; its output is above")
        self.seconds[name] = time.perf_counter() - started
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text(json.dumps({"seconds": self.seconds[name]}))

    def train(self, phase: str, init: str, file: str, *more: str) -> None:
        """One phase of training on `file`, from the model folder `init`."""
        self.step(
            phase,
            "train",
            f"--config={os.path.relpath(CONFIGS / phase)}.py:{self.size}",
            f"--workdir={self.dir / phase}",
            f"--config.init={self.dir / init}",
            f"--config.data.files=('{self.data / file}',)",
            f"--config.data.image_folder={self.data / 'images'}",
            f"--config.seed={self.seed}",
            *more,
        )

    def ask(self, name: str, phase: str, images: str) -> None:
        """Answers the test questions with a phase's model and scores them."""
        test, answers = self.data / "test.json", self.dir / f"{name}.jsonl".replace(" ", "_")
        self.step(
            f"ask {name}",
            "predict",
            *("--model-path", self.dir / phase / "model"),
            *("--question-file", test),
            *("--image-folder", self.data / "images"),
            *("--answers-file", answers),
            *("--images", images, "--batch-size", 32, "--max-new-tokens", 16),
        )
        out = answers.with_suffix(".metrics.json")
        self.step(f"score {name}", "evaluate", "--gt", test, "--pred", answers, "--out", out)

    def make(self) -> None:
        """Data, checkpoints and all phases."""
        torch, data = self.dir / "torch", self.data
        self.step("phantom studies", "data.phantom", "--out", data, "--seed", self.seed)
        self.step(
            "tiny checkpoints",
            "demo.checkpoints",
            *("--out", torch, "--llm", self.llm, "--seed", self.seed),
            makes=torch,
        )
        self.step(
            "to JAX",
            "convert",
            "to-jax",
            *(torch / "llm", self.dir / "start", "--vision", torch / "clip", "--seed", self.seed),
            makes=self.dir / "start",
        )
        heldout = f"--config.data.eval_files=('{data / 'instruct_heldout.json'}',)"
        self.train("stage1", "start", "alignment.json")
        self.train("stage2", "stage1/model", "instruct.json")
        self.train("router", "stage2/model", "instruct.json", heldout)
        self.train("stage3", "router/model", "train_all.json")

    def judge(self) -> None:
        """Answers, figures, and the way back to PyTorch."""
        data = self.data
        for name, phase, images in EVALUATED:
            self.ask(name, phase, images)
        exported, record = self.dir / "exported", self.dir / "pytorch.safetensors"
        words = ("convert", "to-torch", self.dir / "stage3/model", exported)
        self.step("to PyTorch", *words, makes=exported)
        self.step(
            "PyTorch answers",
            "demo.record",
            *("--torch", exported, "--question-file", data / "test.json"),
            *("--image-folder", data / "images", "--out", record),
        )
        self.step("same logits", "convert", "check", self.dir / "stage3/model", "--io", record)

    def table(self) -> str:
        """What was reached, and how long it took."""
        lines = [f"{'':<28}{'closed accuracy':>16}{'open recall':>14}"]
        names = {"blank": "stage 3, blank images"}
        for name, _, _ in EVALUATED:
            summary = self._json(f"{name}.metrics.json".replace(" ", "_"))["summary"]
            values = (summary["closed accuracy"], summary["open recall"])
            lines.append(f"{names.get(name, name):<28}{values[0]:>14.1f} %{values[1]:>12.1f} %")
        router = self._json("router/router.json")
        lines.append(f"{'router accuracy':<28}{100 * router['accuracy']:>14.1f} %")
        lines.append("")
        lines += [f"{name:<28}{seconds:>14.0f} s" for name, seconds in self.seconds.items()]
        lines.append(f"{'all steps':<28}{sum(self.seconds.values()):>14.0f} s")
        return "\n".join(lines)

    def examples(self) -> str:
        """A few questions with the true answer and the model's."""
        said = {
            row["question_id"]: row
            for row in map(json.loads, (self.dir / "stage_3.jsonl").read_text().splitlines())
        }
        lines = []
        for row in json.loads((self.data / "test.json").read_text())[:SHOWN]:
            answer = said[row["id"]]
            truth, sure = row["conversations"][1]["value"], answer["metadata"]["confidence"]
            lines.append(f"{row['image']}: {answer['prompt']}")
            lines.append(f"    answer: {answer['text']} ({sure:.0%}); truth: {truth}")
        return "\n".join(lines)

    def _json(self, name: str) -> dict[str, Any]:
        return json.loads((self.dir / name).read_text())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Med-MoE from checkpoint to checkpoint, small.")
    parser.add_argument("--workdir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--llm", choices=sorted(PRESET), default="phi")
    parser.add_argument("--seed", type=natural, default=0)
    parser.add_argument("--quick", action="store_true", help="few steps of training, no figures")
    args = parser.parse_args()
    try:
        demo = Demo(args.workdir, args.llm, args.seed, args.quick)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    demo.make()
    if args.quick:
        print(f"\nmodel: {demo.dir / 'stage3/model'}, data: {demo.data}")
        return
    demo.judge()
    print(f"\n{demo.examples()}\n\n{demo.table()}")


if __name__ == "__main__":
    main()
