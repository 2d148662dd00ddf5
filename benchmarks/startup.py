"""Seconds from the command to the first step of `medmoe_jax.train`, by the compilation cache.

Makes a few questions and a random tiny model, then starts phase 3 three times, each a process of
its own: without a cache, with an empty one, and with what that run has left there.

    python benchmarks/startup.py --out runs/benchmark
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
from timing import conditions

from medmoe_jax import checkpoint, presets
from medmoe_jax.config import MoeConfig
from medmoe_jax.convert.export_configs import preprocessor_config
from medmoe_jax.data import phantom
from medmoe_jax.demo.checkpoints import make_tokenizer
from medmoe_jax.models import layers, medmoe

PACKAGES = ("medmoe_jax", "jax", "flax", "orbax-checkpoint", "grain", "transformers")
RUNS = ("no cache", "empty cache", "filled cache")
CONFIG = Path(__file__).resolve().parents[1] / "configs" / "stage3.py"


def prepare(folder: Path, size: str) -> list[str]:
    """Writes questions with images and a random model; returns the command of a one-step run."""
    data, start = folder / "data", folder / "start"
    draw = [sys.executable, "-m", "medmoe_jax.data.phantom", "--out", str(data)]
    subprocess.run([*draw, "--train", "16", "--test", "8"], check=True, stdout=subprocess.DEVNULL)
    model = presets.model(size, MoeConfig())
    params = jax.device_get(layers.initialise(jax.random.key(0), medmoe.leaves(model)))
    checkpoint.save_model(start, params, checkpoint.ModelMeta("start", model))
    make_tokenizer(phantom.texts(0, 200), start / "tokenizer")
    settings = json.dumps(preprocessor_config(model.vision))
    (start / "preprocessor_config.json").write_text(settings)
    return [
        *(sys.executable, "-m", "medmoe_jax.train", f"--config={CONFIG}:{size}"),
        f"--config.init={start}",
        f"--config.data.files=('{next(data.glob('*train*.json'))}',)",
        f"--config.data.image_folder={data / 'images'}",
        *("--config.optim.steps=1", "--config.log.tensorboard=False"),
    ]


def first_step(command: list[str], workdir: Path) -> float:
    """Seconds until a run has written the figures of its first step.

    Raises:
      CalledProcessError: the run failed.
    """
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    metrics = workdir / "metrics.jsonl"
    start = time.perf_counter()
    with subprocess.Popen(
        [*command, f"--workdir={workdir}"], env=environment, stdout=subprocess.DEVNULL
    ) as run:
        while run.poll() is None and not (metrics.exists() and metrics.stat().st_size):
            time.sleep(0.02)
        seconds = time.perf_counter() - start
    if run.returncode:
        raise subprocess.CalledProcessError(run.returncode, command)
    return seconds


def main() -> None:
    """Measures, prints the table and writes it."""
    parser = argparse.ArgumentParser(description="Time to the first step of a training run.")
    parser.add_argument("--size", default="tiny", choices=("tiny", "tiny_stablelm"))
    parser.add_argument("--out", type=Path, help="folder for startup.md and startup.json")
    args = parser.parse_args()
    where = conditions(os.cpu_count() or 1, PACKAGES)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        command = prepare(folder, args.size)
        for name in RUNS:
            cache = [] if name == RUNS[0] else [f"--config.compilation_cache={folder / 'cache'}"]
            seconds = first_step([*command, *cache], folder / name.replace(" ", "_"))
            rows.append({"run": name, "seconds": seconds})
            print(f"{name}: {seconds:.1f} s", file=sys.stderr, flush=True)
    lines = [f"| phase 3, {args.size} | seconds to the first step |", "| --- | --- |"]
    lines += [f"| {row['run']} | {row['seconds']:.1f} |" for row in rows]
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    text = "\n".join(lines) + f"\n\n`{where['command']}`; {where['cpu']}; {versions}.\n"
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "startup.md").write_text(text)
        data = {"conditions": where, "runs": rows}
        (args.out / "startup.json").write_text(json.dumps(data, indent=2))


if __name__ == "__main__":
    main()
