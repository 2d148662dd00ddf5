"""Training, generation and loading at full size on one GPU beside PyTorch on the same GPU.

Writes random bfloat16 weights, as a checkpoint for PyTorch and as a model folder. Every measurement
is a process of its own (`accelerator_side.py`), the sides in turn: weights, gradients and optimiser
state of both do not fit on one GPU. Before anything is timed the two must agree in scores and in
the losses of a few steps. On a CPU a tiny model goes the same way.

    python benchmarks/accelerator.py --device gpu --size stablelm --out runs/benchmark
    python benchmarks/accelerator.py
    python benchmarks/accelerator.py --compile-only --target h200:1 --size phi2
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import convert_memory
import ml_dtypes
import numpy as np
import torch
from accelerator_side import DTYPE, Result, Task
from flax.traverse_util import flatten_dict
from timing import Figure, conditions, table

from medmoe_jax import flops, hardware, presets
from medmoe_jax.config import ConfigError, ModelConfig, MoeConfig, RunConfig
from medmoe_jax.convert.table import Row
from medmoe_jax.data import phantom
from medmoe_jax.demo.checkpoints import make_tokenizer
from medmoe_jax.models import medmoe
from medmoe_jax.models.layers import REMAT
from medmoe_jax.plan import estimate, programs, report, targets

SIDES, PARTS = ("jax", "torch"), ("generation", "training")
SCORES, LOSSES = 0.05, 0.02  # how far the sides may be apart in 16 bits, see `compare`
GOALS = {"train step": 0.45, "decode, batch 1": 0.60}  # shares of the device's limit
# Numbers of `Task`, where the command line does not say them.
FULL = {"rows": 8, "length": 2048, "text": 128, "new": 128, "repeats": 10}
QUICK = {"rows": 2, "length": 128, "text": 64, "new": 8, "repeats": 3}
FOLDER = Path(__file__).parent
NOISE = 1_000_003  # random numbers, repeated in every tensor: a prime, so that no rows are alike


def fault(device: str) -> str:
    """What stands against a run on the device, and the remedy; "" if nothing."""
    if device == "cpu":
        return ""
    if torch.version.cuda is None:
        return "this PyTorch is built for the CPU alone; install a CUDA build (pytorch.org)"
    if not torch.cuda.is_available():
        return (
            "PyTorch finds no NVIDIA GPU (does nvidia-smi?); without one, --device cpu runs a tiny "
            "model and --compile-only --target h200:1 compiles the programs"
        )
    if not any(importlib.util.find_spec(f"jax_cuda{v}_plugin") for v in (13, 12)):
        return "JAX has no CUDA plugin; pip install 'medmoe_jax[cuda]'"
    return ""


def write_folders(size: str, scratch: Path) -> tuple[Path, Path]:
    """Writes random weights, one tensor at a time: a checkpoint in the official layout with a
    tokenizer, and the model folder that it is converted to."""
    official, model = scratch / "checkpoint", scratch / "model"
    leaves = flatten_dict(medmoe.leaves(presets.model(size, MoeConfig())), sep="/")
    noise = np.random.default_rng(0).standard_normal(NOISE, np.float32)

    def draw(row: Row) -> np.ndarray:
        leaf = leaves[row.path]
        mean, std = (0.0, leaf.std) if leaf.const is None else (leaf.const, 0.02)
        own = np.roll(noise, convert_memory.generator(row).integers(NOISE))
        return np.resize((mean + std * own).astype(ml_dtypes.bfloat16), row.shape)

    convert_memory.write_checkpoint(official, size, "stage3", "safetensors", draw)
    make_tokenizer(phantom.texts(0, 200), official)
    convert_memory.run("to-jax", str(official), str(model))
    return official, model


def run(task: Task, scratch: Path) -> Result:
    """Does a task in a process of its own."""
    gpu = task.device == "gpu"
    surroundings = {
        "jax": {
            "JAX_PLATFORMS": "cuda" if gpu else "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(scratch / "compiled"),
            # Takes what it needs, and nearly everything if need be.
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
        },
        "torch": {
            "JAX_PLATFORMS": "cpu",
            "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        },
    }
    file = scratch / "task.json"
    file.write_text(json.dumps(asdict(task)))
    print(f"{task.side}: {task.part}", file=sys.stderr, flush=True)
    command = [sys.executable, str(FOLDER / "accelerator_side.py"), str(file)]
    done = subprocess.run(command, env=os.environ | surroundings[task.side])
    if done.returncode:
        raise SystemExit(f"error: the part {task.part!r} of {task.side} failed, see above")
    found = Result(**json.loads(Path(task.result).read_text()))
    for name, seconds in found.seconds.items():
        print(f"  {name}: {statistics.median(seconds):.4f} s", file=sys.stderr, flush=True)
    return found


def compare(losses: Sequence[Sequence[float]], scores: Sequence[np.ndarray]) -> dict[str, float]:
    """How far the sides are apart.

    A token whose two best experts are nearly equal may go either way in 16 bits. So of scores the
    median of the rows is judged, and of losses, each a mean over many tokens, the largest error.

    Args:
      losses: of both sides, step by step.
      scores: f32[B, V] of both sides.

    Returns:
      The two errors; that of scores is relative.

    Raises:
      AssertionError: too far.
    """
    ours, theirs = scores
    error = np.linalg.norm(ours - theirs, axis=-1) / np.linalg.norm(theirs, axis=-1)
    apart = {
        "scores": float(np.median(error)),
        "losses": float(np.abs(np.subtract(*losses)).max()),
    }
    assert apart["scores"] < SCORES, f"scores differ by {apart['scores']:.1%}"
    assert apart["losses"] < LOSSES, f"losses differ by {apart['losses']:.1e}"
    return apart


def decode_bytes(model: ModelConfig, rows: int, places: float) -> float:
    """Bytes that one decoding step cannot do without, in 16 bits: every weight but those of experts
    that nobody chose (experts being equally likely), and the cache of `places` places a row."""
    total = 0.0
    for path, leaf in flatten_dict(medmoe.shapes(model)["llm"], sep="/").items():
        share = 1.0
        if path.startswith("moe/experts/"):
            share = flops.chosen(model.moe, rows)
        elif path.startswith("embed/"):
            share = rows / model.llm.vocab
        total += 2 * share * leaf.size
    llm = model.llm
    return total + 2 * rows * places * llm.layers * 2 * llm.kv_heads * llm.head_dim


def limits(task: Task, work: float, kind: str) -> dict[str, float]:
    """Figure -> least seconds by the published figures of the device; {} where there are none."""
    chip = hardware.by_kind(kind)
    if chip is None:
        return {}
    places = task.config.vision.patches + task.text + task.new / 2
    decode = {
        f"decode, batch {rows}": (task.new - 1) * decode_bytes(task.config, rows, places)
        for rows in task.batches
    }
    least = {name: nbytes / chip.bandwidth for name, nbytes in decode.items()}
    return least | {"train step": work / chip.peak[DTYPE]}


def joined(results: Sequence[Result]) -> Result:
    """What several processes of one side found, as one."""
    whole = Result(kind=results[0].kind)
    for found in results:
        for name, seconds in found.seconds.items():
            whole.seconds.setdefault(name, []).extend(seconds)
        for name, size in found.memory.items():
            whole.memory[name] = max(size, whole.memory.get(name, 0.0))
        whole.notes |= found.notes
    return whole


def figures(task: Task, ours: Result, theirs: Result) -> list[Figure]:
    """What was timed several times."""
    found = []
    for name, seconds in ours.seconds.items():
        if name != "load":
            decodes = name.startswith("decode")
            amount = int(name.split()[-1]) * (task.new - 1) if decodes else 1
            unit = "tokens/s" if decodes else "ms"
            found.append(Figure(name, unit, amount, seconds, theirs.seconds[name], 0.0, None))
    return found


def markdown(found: list[Figure], least: dict[str, float], sides: Sequence[Result]) -> str:
    """Speed, and then loading and memory."""
    of = ("JAX of limit", "PyTorch of limit", "goal")
    head = ["", "unit", "JAX", "PyTorch", "faster", "quartiles", *of]
    lines = []
    for figure in found:
        shares = ["-", "-"]
        if figure.name in least:
            medians = map(statistics.median, (figure.jax, figure.torch))
            shares = [f"{least[figure.name] / seconds:.0%}" for seconds in medians]
        goal = GOALS.get(figure.name)
        lines.append([*figure.cells()[:6], *shares, "-" if goal is None else f"{goal:.0%}"])
    speed = table(head, lines)
    loads = [f"{statistics.median(side.seconds['load']):.1f}" for side in sides]
    lines = [["load, s", *loads]]
    for name in sides[0].memory:
        sizes = (side.memory.get(name) for side in sides)
        lines.append([f"{name}, GiB", *("-" if n is None else f"{n / 2**30:.2f}" for n in sizes)])
    return f"{speed}\n{table(['', 'JAX', 'PyTorch'], lines)}"


def about(where: dict[str, Any], task: Task, sides: Sequence[Result]) -> str:
    """What the tables hold for."""
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    chosen = (
        f"{name}: " + ", ".join(f"{k} {v}" for k, v in side.notes.items() if k != "flops")
        for name, side in zip(("JAX", "PyTorch"), sides, strict=True)
    )
    return (
        f"`{where['command']}`; {where['device']}; {where['cpu']}; {versions}, CUDA "
        f"{where['cuda'] or 'none'}; {task.size}, {where['dtype']}; steps of {task.rows} x "
        f"{task.length} tokens; prompts of {task.config.vision.patches} image + {task.text} text "
        f"tokens, {task.new} ids. {'; '.join(chosen)}. Medians; limits are the device's published "
        "FLOP/s (train step) and memory bandwidth (decode). Before: scores "
        f"{where['apart']['scores']:.2%} apart, losses {where['apart']['losses']:.4f}."
    )


def measure(args: argparse.Namespace, task: Task, scratch: Path) -> tuple[str, dict[str, Any]]:
    """All parts of both sides, as Markdown and as JSON."""
    where = conditions(torch.get_num_threads())
    official, model = write_folders(task.size, scratch)
    task = replace(task, checkpoint=str(official), model=str(model))

    def do(side: str, part: str) -> Result:
        result = str(scratch / f"{part}.{side}.json")
        return run(replace(task, side=side, part=part, result=result), scratch)

    losses = [do(side, "check").losses for side in SIDES]
    apart = compare(losses, [np.load(scratch / f"check.{side}.npy") for side in SIDES])
    results: dict[str, list[Result]] = {side: [] for side in SIDES}
    for number in range(args.rounds):
        for part in PARTS:
            for side in SIDES if number % 2 == 0 else SIDES[::-1]:
                results[side].append(do(side, part))
    both = ours, theirs = joined(results["jax"]), joined(results["torch"])
    least = limits(task, ours.notes["flops"], ours.kind)
    found = figures(task, ours, theirs)
    where |= {"device": ours.kind, "dtype": DTYPE, "cuda": torch.version.cuda, "apart": apart}
    data = {
        "conditions": where,
        "task": asdict(task),
        "figures": [asdict(f) | {"ratio": f.ratio, "least": least.get(f.name)} for f in found],
        "jax": asdict(ours),
        "torch": asdict(theirs),
    }
    return f"{markdown(found, least, both)}\n{about(where, task, both)}\n", data


def compiled(args: argparse.Namespace, task: Task) -> tuple[str, dict[str, Any]]:
    """Our programs for a device that need not be there, as Markdown and as JSON.

    Raises:
      ConfigError: the target is unknown, or its compiler is not installed.
    """
    targets.prepare(args.target)
    target, run, rows = targets.load(args.target), task.run, []

    def add(program: programs.Program, cfg: RunConfig, length: int) -> estimate.Plan:
        plan = estimate.plan(program, cfg, target, task.size, length)
        rows.append(estimate.to_json(plan, {}, " ".join(["python", *sys.argv])))
        print(report.text(plan), file=sys.stderr, flush=True)
        return plan

    for remat in task.remat:
        cfg = replace(run, remat=remat)
        program = programs.train_step(cfg, target, task.length, 1)
        if add(program, cfg, task.length).fits is not False:
            break
    prompt = task.config.vision.patches + task.text
    for size in task.batches:
        cfg = replace(run, optim=replace(run.optim, batch_size=size))
        for program in programs.generation(cfg, target, prompt, 1, task.new):
            add(program, cfg, prompt)
    about = f"`{' '.join(['python', *sys.argv])}`: compiled for {args.target}, not run."
    return f"{report.table(rows)}\n\n{about}\n", {"programs": rows}


def main() -> None:
    """Measures or compiles, prints the table and writes it."""
    parser = argparse.ArgumentParser(description="Full size on one GPU beside PyTorch.")
    add = parser.add_argument
    add("--device", choices=("cpu", "gpu"), default="cpu", help="cpu: a tiny model")
    add("--quick", action="store_true", help="a tiny model on a GPU: does it run at all?")
    add("--size", choices=("stablelm", "phi2", "tiny_stablelm", "tiny"), help="default: stablelm")
    add("--rows", type=int, help="of a training step")
    add("--length", type=int, help="tokens of a row of a training step, image included")
    add("--text", type=int, help="text tokens of a prompt, beside those of an image")
    add("--new", type=int, help="ids of an answer")
    add("--repeats", type=int, help="timed runs of a process")
    add("--rounds", type=int, default=2, help="processes of each side and part")
    tried = "what our step may recompute; the first that fits is taken"
    # Nothing recomputed is not quickest: a loop over the layers copies everything that is kept.
    add("--remat", nargs="+", choices=REMAT, default=["dots", "attention", "full"], help=tried)
    add("--torch-compile", default="", metavar="MODE", help="default, reduce-overhead, ...")
    add("--folder", help="place for twice the weights; default: a temporary folder")
    add("--compile-only", action="store_true", help="compile our programs for --target")
    add("--target", default="h200:1", help="with --compile-only, as of medmoe_jax.plan")
    add("--out", type=Path, help="folder for accelerator.md and accelerator.json")
    args = parser.parse_args()
    full = args.compile_only or (args.device == "gpu" and not args.quick)
    size = args.size or ("stablelm" if full else "tiny_stablelm")
    if not full and not presets.is_tiny(size):
        parser.error(f"--size {size} takes a GPU: --device gpu, without --quick")
    amounts = {k: getattr(args, k) or v for k, v in (FULL if full else QUICK).items()}
    task = Task(
        *("", "", args.device, size, "", "", ""),
        **amounts,
        remat=tuple(args.remat),
        compiled=args.torch_compile,
    )
    os.environ["JAX_PLATFORMS"] = "cpu"  # of this process, and of the conversion
    if args.compile_only:
        try:
            text, data = compiled(args, task)
        except ConfigError as error:
            sys.exit(f"error: {error}")
    else:
        if obstacle := fault(args.device):
            sys.exit(f"error: {obstacle}")
        with tempfile.TemporaryDirectory(prefix="accelerator_", dir=args.folder) as scratch:
            text, data = measure(args, task, Path(scratch))
    print(text)
    if args.out:
        name = "compiled" if args.compile_only else "accelerator"
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / f"{name}.md").write_text(text)
        (args.out / f"{name}.json").write_text(json.dumps(data, indent=2))


if __name__ == "__main__":
    main()
