"""Plans a phase for hardware that is not there: `python -m medmoe_jax.plan --config
configs/stage3.py:phi2 --target v5e:2x4`.

Compiles the step that training runs, from shapes alone, and says whether it fits, what it computes,
moves and sends, and how fast it can be at most. `docs/scaling.md` explains the figures.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from medmoe_jax import command_line, limits
from medmoe_jax.config import ConfigError, RunConfig
from medmoe_jax.plan import estimate, programs, report, search, targets

FLAGS = flags.FLAGS


def versions(target: targets.Target) -> dict[str, str]:
    """Versions of what compiles."""
    names = {"tpu": ["libtpu"], "cuda": ["jax-cuda13-plugin", "jax-cuda12-plugin"]}
    found = {}
    for name in ("jax", "jaxlib", *names.get(target.platform, [])):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def size_of(argument: str) -> str:
    """The size in configs/stage3.py:phi2."""
    return argument.partition(":")[2] or "phi2"


def plans(cfg: RunConfig, target: targets.Target) -> list[estimate.Plan]:
    """What the flags ask for."""
    length = FLAGS.length or cfg.data.max_length
    given: Any = FLAGS["config"]
    images, name = FLAGS.images, size_of(given.config_filename)

    def step(run: RunConfig) -> estimate.Plan:
        program = programs.train_step(run, target, length, images)
        return estimate.plan(program, run, target, name, length)

    def told(run: RunConfig) -> estimate.Plan:
        plan = step(run)
        peak = plan.memory.get("peak", 0.0) / report.GIB
        print(
            f"mesh {'x'.join(map(str, plan.mesh.values()))}, {plan.batch} rows, remat "
            f"{plan.remat}: {report.verdict(plan.fits)}, {peak:.2f} GiB, bound "
            f"{(plan.bound or 0) * 1e3:,.1f} ms",
            flush=True,
        )
        return plan

    if FLAGS.decode:
        found = programs.generation(cfg, target, length, images, FLAGS.new)
        return [estimate.plan(program, cfg, target, name, length) for program in found]
    if not FLAGS.search:
        return [step(cfg)]
    run, plan = search.search(cfg, target, length, images, told)
    mesh = " ".join(f"--config.mesh.{k}={v}" for k, v in vars(run.mesh).items())
    print(
        f"\nbest of those: {mesh} --config.optim.batch_size={run.optim.batch_size} "
        f"--config.remat={run.remat}\n"
    )
    return [plan]


def table(folder: Path) -> str:
    """The table of all plans in a folder, by file name."""
    files = sorted(folder.glob("*.json"))
    if not files:
        raise ConfigError(f"--table {folder}: there is no .json file of a plan in it")
    rows: list[dict[str, Any]] = []
    for file in files:
        try:
            rows += json.loads(file.read_text())
            report.table(rows[-1:])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{file} was not written by --json of this command") from error
    return report.table(rows)


def main(_: list[str]) -> None:
    """Prints the plan; faults in what was asked for end with a message and status 1."""
    try:
        if FLAGS.table:
            print(table(Path(FLAGS.table)))
            return
        if FLAGS.config is None or not FLAGS.target:
            raise ConfigError("give --config and --target, or --table FOLDER")
        limits.check(FLAGS.config)
        targets.prepare(FLAGS.target)
        target = targets.load(FLAGS.target)
        cfg: RunConfig = FLAGS.config
        if FLAGS.mesh:
            cfg = dataclasses.replace(cfg, mesh=programs.mesh_config(FLAGS.mesh))
        found = plans(cfg, target)
        print("\n\n".join(report.text(plan) for plan in found))
        if FLAGS.json:
            command = shlex.join(["python", "-m", "medmoe_jax.plan", *sys.argv[1:]])
            rows = [estimate.to_json(plan, versions(target), command) for plan in found]
            Path(FLAGS.json).write_text(json.dumps(rows, indent=1) + "\n")
    except ConfigError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    config_flags.DEFINE_config_file(
        "config", help_string="A file of configs/, as in configs/stage3.py:phi2"
    )
    flags.DEFINE_string("target", None, f"Devices to compile for: {targets.EXAMPLES}")
    flags.DEFINE_string("mesh", None, "data,fsdp,expert in place of config.mesh, as in 1,2,4")
    flags.DEFINE_integer("length", 0, "Tokens of a row; 0 = config.data.max_length", lower_bound=0)
    flags.DEFINE_integer("images", 1, "Images of a row", lower_bound=0)
    flags.DEFINE_boolean("decode", False, "Prefill and decoding instead of the training step")
    flags.DEFINE_integer("new", 64, "With --decode: places of the cache for new tokens")
    flags.DEFINE_boolean("search", False, "Try meshes, batch sizes and rematerialisation")
    flags.DEFINE_string("json", None, "File to write the plan to")
    flags.DEFINE_string("table", None, "Folder of such files to print as one Markdown table")
    command_line.run(main)
