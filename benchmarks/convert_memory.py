"""Peak memory of the conversion at full size, both ways.

Writes random bfloat16 checkpoints of the real shapes, converts them to a model folder and back in
processes of their own, compares every tensor, and prints a row a checkpoint. The limit is the
checkpoint's size + 2 GiB; exit 1 where one exceeds it. Needs about four times the checkpoint's size
on disk, and removes its files.

    python benchmarks/convert_memory.py --models stablelm phi2 --folder /tmp
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np

from medmoe_jax import presets
from medmoe_jax.checkpoint import ModelMeta
from medmoe_jax.config import MoeConfig
from medmoe_jax.convert.export_configs import clip_config, official_config, plain_config
from medmoe_jax.convert.table import TOWER, Row, table
from medmoe_jax.convert.torch_files import open_weights
from medmoe_jax.convert.torch_output import NewTensor, write_pickle, write_sharded

GIB = 2**30
MARGIN = 2 * GIB
FORMS = ("llm", "stage2", "stage3")


def generator(row: Row) -> np.random.Generator:
    """The same for a tensor wherever it is written."""
    return np.random.default_rng(zlib.crc32(row.key.encode()))


def random_bits(row: Row) -> np.ndarray:
    """A bfloat16 tensor of random bits."""
    bits = generator(row).integers(0, 2**16, row.shape, np.uint16)
    return bits.view(ml_dtypes.bfloat16)


def write_checkpoint(
    folder: Path,
    size: str,
    form: str,
    kind: str,
    draw: Callable[[Row], np.ndarray] = random_bits,
) -> int:
    """Writes a checkpoint: a language model alone, or a Med-MoE folder with its CLIP folder.

    One tensor at a time is in memory.

    Args:
      folder: where to.
      size: preset with the shapes.
      form: "llm", "stage2" or "stage3".
      kind: "safetensors" or "bin".
      draw: makes a bfloat16 tensor.

    Returns:
      Bytes of its weights, those in the CLIP folder not counted.
    """
    model = presets.model(size, MoeConfig() if form == "stage3" else None)
    rows = table(model, ["llm"] if form == "llm" else ["vision", "projector", "llm"])
    keys, meta = {row.key for row in rows}, ModelMeta(form, model)
    folder.mkdir()

    def tensors(rows: Iterable[Row], prefix: str = "") -> list[NewTensor]:
        return [
            NewTensor(row.key.removeprefix(prefix), "bfloat16", row.shape, partial(draw, row))
            for row in rows
        ]

    if form == "llm":
        config = plain_config(meta, keys, "bfloat16")
        if model.llm.family == "phi":  # PhiForCausalLM has a bias that Med-MoE has not
            rows.append(Row("", (), "lm_head.bias", "same", (model.llm.vocab,)))
    else:
        config = official_config(meta, keys, "bfloat16", "./clip")
        (folder / "clip").mkdir()
        vision = (row for row in rows if row.path.startswith("vision/"))
        write_sharded(folder / "clip", tensors(vision, TOWER), GIB)
        (folder / "clip/config.json").write_text(json.dumps(clip_config(meta, "bfloat16")))
    (folder / "config.json").write_text(json.dumps(config))
    every = tensors(rows)
    if kind == "bin":
        write_pickle(folder / "pytorch_model.bin", every)
    else:
        write_sharded(folder, every, GIB)
    return sum(tensor.nbytes for tensor in every)


def run(*arguments: str) -> tuple[int, float]:
    """Runs one command of the conversion; returns its peak memory in bytes and its seconds.

    Raises:
      RuntimeError: it failed.
    """
    start = time.monotonic()
    command = [sys.executable, "-m", "medmoe_jax.convert", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with status {process.returncode}")
    return usage.ru_maxrss * 1024, time.monotonic() - start  # ru_maxrss is in KiB on Linux


def count_different(first: Path, second: Path) -> int:
    """How many tensors of `first`, the vision tower's aside, are not in `second` to the bit."""
    a, b = open_weights(first), open_weights(second)
    assert a and b
    different = 0
    for key in a.infos:
        if not key.startswith(TOWER):  # the CLIP folder's weights are written there
            x, y = a.read(key), b.read(key) if key in b.infos else None
            different += y is None or not np.array_equal(x.view(np.uint16), y.view(np.uint16))
    return different


def measure(folder: Path, size: str, form: str, kind: str) -> bool:
    """Prints the row of one checkpoint; returns whether both directions kept to the limit."""
    source, model, back = folder / "source", folder / "model", folder / "back"
    nbytes = write_checkpoint(source, size, form, kind)
    jax_peak, jax_time = run("to-jax", str(source), str(model))
    torch_peak, torch_time = run("to-torch", str(model), str(back))
    different = count_different(source, back)
    fits = max(jax_peak, torch_peak) < nbytes + MARGIN and not different
    print(
        f"{size:<10} {form:<7} {kind:<12} {nbytes / GIB:>6.2f} {(nbytes + MARGIN) / GIB:>6.2f} "
        f"{jax_peak / GIB:>7.2f} {jax_time:>6.0f} {torch_peak / GIB:>9.2f} {torch_time:>6.0f} "
        f"{different:>10}  {'ok' if fits else 'FAIL'}",
        flush=True,
    )
    return fits


def main() -> int:
    """Measures every combination asked for; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Peak memory of the conversion at full size, both ways."
    )
    parser.add_argument("--models", nargs="+", default=["stablelm", "phi2"])
    parser.add_argument("--forms", nargs="+", default=["llm"], choices=FORMS)
    parser.add_argument("--kind", default="safetensors", choices=("safetensors", "bin"))
    parser.add_argument("--folder", help="where the files are written; default: a temporary one")
    args = parser.parse_args()
    print(
        f"{'model':<10} {'form':<7} {'files':<12} {'GiB':>6} {'limit':>6} {'to-jax':>7} {'s':>6} "
        f"{'to-torch':>9} {'s':>6} {'different':>10}"
    )
    fits = True
    for size in args.models:
        for form in args.forms:
            folder = Path(tempfile.mkdtemp(prefix="convert_memory_", dir=args.folder))
            try:
                fits &= measure(folder, size, form, args.kind)
            finally:
                shutil.rmtree(folder)
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
