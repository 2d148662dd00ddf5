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


def plans(cfg: RunConfig, size: str, target: targets.Target) -> list[estimate.Plan]:
    """What the flags ask for, without a search."""
    length, images = FLAGS.length or cfg.data.max_length, FLAGS.images
    if FLAGS.decode:
        mesh = cfg.mesh if FLAGS.mesh else None
        found = programs.generation(cfg, target, length, images, FLAGS.new, mesh)
    else:
        found = [programs.train_step(cfg, target, length, images)]
    return [estimate.plan(program, cfg, target, size, length) for program in found]


def searched(cfg: RunConfig, size: str, target: targets.Target) -> estimate.Plan:
    """The best of many. Each is told and written to --json as soon as it is known; Ctrl-C ends the
    search with the best so far.

    Raises:
      ConfigError: nothing fits.
    """
    length, images = FLAGS.length or cfg.data.max_length, FLAGS.images
    found: list[search.Found] = []

    def measure(trial: search.Trial) -> estimate.Plan:
        run, number = trial.run, len(found) + 1
        axes = "x".join(str(n) for n in vars(run.mesh).values())
        print(
            f"{number} of at most {number + trial.left}: mesh {axes}, {run.optim.batch_size} "
            f"row(s), remat {run.remat}: ",
            end="",
            flush=True,
        )
        if trial.obstacle:
            program = programs.left_out(run, target, length, images, trial.obstacle)
        else:
            program = programs.train_step(run, target, length, images)
        plan = estimate.plan(program, run, target, size, length)
        print(report.line(plan), flush=True)
        return plan

    stopped = False
    try:
        for pair in search.search(cfg, target, length, images, measure):
            found.append(pair)
            write([plan for _, plan in found], target, search.best(found))
    except KeyboardInterrupt:
        stopped = True
    chosen = search.best(found)
    if chosen is None and stopped:
        raise ConfigError("the search was interrupted before it had found anything that fits")
    if chosen is None:
        raise ConfigError(
            f"nothing fits on {target.name}, not even one row of {length} tokens a device; use "
            "more devices, shorter rows (--length) or a chip with more memory"
        )
    run, plan = chosen
    flags_of = {f"mesh.{axis}": n for axis, n in vars(run.mesh).items()}
    flags_of |= {"optim.batch_size": run.optim.batch_size, "remat": run.remat}
    words = " ".join(f"--config.{name}={value}" for name, value in flags_of.items())
    print(f"\nbest {'so far' if stopped else 'of those'}: {words}\n")
    return plan


def write(
    found: list[estimate.Plan], target: targets.Target, best: search.Found | None = None
) -> None:
    """Writes plans to the file of --json, if there is one; of a search also which is the best."""
    if not FLAGS.json:
        return
    command = shlex.join(["python", "-m", "medmoe_jax.plan", *sys.argv[1:]])
    rows = [estimate.to_json(plan, versions(target), command) for plan in found]
    if FLAGS.search:
        chosen = None if best is None else best[1]
        rows = [row | {"best": plan is chosen} for row, plan in zip(rows, found, strict=True)]
    file = Path(FLAGS.json)
    part = file.with_name(f"{file.name}.part")
    part.write_text(json.dumps(rows, indent=1) + "\n")
    part.replace(file)  # whoever reads it meanwhile, or stops us, never sees half a file


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
        if FLAGS.search and (FLAGS.decode or FLAGS.mesh):
            raise ConfigError(
                "--search tries meshes for the training step; leave out --mesh and --decode"
            )
        limits.check(FLAGS.config)
        targets.prepare(FLAGS.target)
        target = targets.load(FLAGS.target)
        cfg: RunConfig = FLAGS.config
        if FLAGS.mesh:
            cfg = dataclasses.replace(cfg, mesh=programs.mesh_config(FLAGS.mesh))
        given: Any = FLAGS["config"]
        size = size_of(given.config_filename)
        if FLAGS.search:
            print(report.text(searched(cfg, size, target)))
            return
        found = plans(cfg, size, target)
        print("\n\n".join(report.text(plan) for plan in found))
        write(found, target)
        if any(plan.obstacle and plan.fits is None for plan in found):
            raise ConfigError(
                "the compiler fails, see above; another mesh, batch size or --config.remat may do"
            )
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
    flags.DEFINE_boolean(
        "decode",
        False,
        "Prefill and decoding instead of the training step, on one device or on --mesh",
    )
    flags.DEFINE_integer("new", 64, "With --decode: places of the cache for new tokens")
    flags.DEFINE_boolean("search", False, "Try meshes, batch sizes and rematerialisation")
    flags.DEFINE_string("json", None, "File to write the plan to")
    flags.DEFINE_string("table", None, "Folder of such files to print as one Markdown table")
    command_line.run(main)
