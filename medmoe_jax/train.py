"""Training of any phase: `python -m medmoe_jax.train --config configs/stage3.py:phi2 --workdir
DIR`.

Read top to bottom: where the weights come from -> data -> what trains -> resume -> loop -> result.
Next stop: `models/medmoe.py`.

Weights come from a checkpoint in the workdir if there is one (then also the optimiser and the place
in the data), else from the model folder `config.init`. Frozen weights always come from `init`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import config_flags

from medmoe_jax import (
    checkpoint,
    command_line,
    compilation,
    distributed,
    flops,
    layout,
    limits,
    lora,
    optim,
    provenance,
    resume,
    router,
    sharding,
    step,
    upcycle,
)
from medmoe_jax.config import FRESH, ConfigError, ModelConfig, RunConfig
from medmoe_jax.data import check, images, pipeline, problems, sources, tokens
from medmoe_jax.report import NotFinite, Reporter, Trace
from medmoe_jax.validation import Validation

# May differ when a run goes on: how many devices and processes there are, and where programs are
# kept.
FREE = ("mesh", "cluster", "compilation_cache")


def say(text: str) -> None:
    """Prints in the leading process."""
    if distributed.leads():
        print(text, flush=True)


def starting_point(cfg: RunConfig) -> tuple[dict[str, Any], checkpoint.ModelMeta]:
    """Parameters and meta data that the phase starts from: `init`, with a new router or with
    experts. Nothing that is large is read yet.

    Raises:
      ConfigError: `init` is missing, or does not fit the phase.
    """
    if not cfg.init:
        raise ConfigError(
            "config.init is empty: give the folder of a model (`convert to-jax`, or `model` of an "
            "earlier phase)"
        )
    if cfg.lora.rank and checkpoint.read_meta(cfg.init).delta:
        raise ConfigError(
            f"config.init {cfg.init} holds adapters without their model; new ones need weights to "
            "stand beside: `python -m medmoe_jax.lora merge` makes them"
        )
    params, meta = checkpoint.open_model(Path(cfg.init))
    model, mixture = meta.model, cfg.model.moe
    base, line = params, f"{cfg.phase} from {cfg.init}"
    if cfg.objective == "router":
        if model.moe is not None or mixture is None:
            raise ConfigError(
                "the router phase needs a dense (stage 2) model in config.init and "
                "config.model.moe set"
            )
        mixture.validate(model.llm.layers)
        params = params | {"router": jax.device_get(router.fresh(model, mixture, cfg.seed))}
    elif mixture is not None and model.moe is None:
        if cfg.router == FRESH:
            source = jax.device_get(router.fresh(model, mixture, cfg.seed))
        else:
            source = checkpoint.load_router(cfg.router) if cfg.router else params.get("router")
        if source is None:
            raise ConfigError(
                f"{cfg.init} holds no router: start from the folder of the router phase, or set "
                f"config.router to a .pth file, or to {FRESH!r} for a random one"
            )
        params, model = upcycle.upcycle(params, model, mixture, source, cfg.upcycle)
        line += f", {mixture.experts} experts, top-{mixture.top_k}, {mixture.placement}"
        line += f", {cfg.upcycle} start"
        if cfg.router:
            line += f", router {cfg.router}"
        if mixture.routing != "router":
            line += f", {mixture.routing} routing"
    elif mixture is not None and mixture != model.moe:
        raise ConfigError(
            f"config.model.moe is {mixture}, but {cfg.init} holds {model.moe}: make them equal"
        )
    elif cfg.router:
        raise ConfigError(
            "config.router is read when a dense model becomes a MoE model; this one is one already"
        )
    delta = None
    if cfg.lora.rank:
        line += f", LoRA of rank {cfg.lora.rank}"
        known = distributed.gathered(lora.fingerprint(base) if distributed.leads() else "")[0]
        where = str(Path(cfg.init).absolute())
        delta = checkpoint.Delta(where, known, cfg.upcycle, cfg.lora)
    return params, dataclasses.replace(
        meta, stage=cfg.phase, model=model, history=[*meta.history, line], delta=delta
    )


def unread(asked: ModelConfig, found: ModelConfig) -> list[str]:
    """What `config.model` says otherwise than the model that a run starts from, whose shapes are
    used: a line such as `llm.layers 32 (there 24)` each. The mixture is no part of it."""
    wanted, used = (
        flatten_dict(dataclasses.asdict(dataclasses.replace(m, moe=None)), sep=".")
        for m in (asked, found)
    )
    return [f"{k} {v} (there {used[k]})" for k, v in wanted.items() if v != used[k]]


class Data(NamedTuple):
    """What a phase reads."""

    samples: list[sources.Sample]
    rest: list[sources.Sample]  # labelled rows to judge the router by
    left_out: list[problems.Problem]
    batches: Callable[[list[sources.Sample], bool], pipeline.Batches]  # (rows, training) -> batches


def load_data(cfg: RunConfig, model: ModelConfig) -> Data:
    """Reads and checks config.data.files with the tokenizer and the image settings of `init`.

    Raises:
      ConfigError: the image settings do not fit the vision tower.
      DataError: rows that cannot be used, unless config.data.on_error is 'skip'.
    """
    folder, llm = Path(cfg.init), model.llm
    tokenizer = tokens.load_tokenizer(folder / "tokenizer", llm.family, llm.vocab)
    settings = folder / "preprocessor_config.json"
    spec = images.read_image_spec(settings, cfg.data.image_aspect, cfg.data.view)
    if spec.crop != model.vision.image_size:
        raise ConfigError(
            f"{settings} makes images of {spec.crop} pixels, the vision tower takes "
            f"{model.vision.image_size}; use the file that belongs to the tower"
        )
    patches = model.vision.patches
    loaded = check.load_samples(cfg.data.files, cfg.data, tokenizer, patches)
    samples, rest = loaded.samples, []
    if cfg.objective == "router":
        samples = sources.choose_per_modality(samples, cfg.data.labels_per_modality, cfg.seed)
        drawn = {(s.file, s.row) for s in samples}
        rest = [s for s in loaded.samples if s.modality >= 0 and (s.file, s.row) not in drawn]
        if cfg.data.eval_files:
            rest = check.load_samples(cfg.data.eval_files, cfg.data, tokenizer, patches).samples
    say(f"{len(samples):,} rows to train on, {len(loaded.problems):,} left out")

    def batches(rows: list[sources.Sample], training: bool) -> pipeline.Batches:
        """Each process reads its share of every batch."""
        share = jax.process_index(), jax.process_count()
        size = cfg.optim.batch_size
        return pipeline.build(
            rows, tokenizer, spec, patches, cfg.data, size, cfg.seed, training, *share
        )

    return Data(samples, rest, loaded.problems, batches)


def all_problems(stream: pipeline.Batches) -> list[problems.Problem]:
    """What the processes found wrong in their parts of the data, each row once."""
    every = distributed.gathered([dataclasses.asdict(p) for p in stream.problems])
    return list(dict.fromkeys(problems.Problem(**one) for found in every for one in found))


def position(stream: pipeline.Batches) -> dict[str, Any]:
    """The place in the data, with the problems of all processes: one of them writes it down."""
    return stream.get_state() | {"problems": [dataclasses.asdict(p) for p in all_problems(stream)]}


def check_workdir(cfg: RunConfig, workdir: Path) -> None:
    """Raises ConfigError where the workdir holds another run, finished or not. One that ended
    before it saved anything may be begun anew with other settings."""
    path, steps = workdir / "run.json", (workdir / "checkpoints").glob("*")
    begun = (workdir / "model").exists() or any(step.name.isdigit() for step in steps)
    old = json.loads(path.read_text()) if begun and path.exists() else {}
    new = json.loads(json.dumps(dataclasses.asdict(cfg)))
    changed = [k for k in new if old and k not in FREE and new[k] != old.get(k)]
    if changed:
        raise ConfigError(
            f"{workdir} holds a run with another config (different: {', '.join(changed)}); "
            "use another --workdir, or the same config to resume"
        )


def write_run_config(cfg: RunConfig, workdir: Path) -> None:
    """Stores the run's config."""
    path, text = workdir / "run.json", json.dumps(dataclasses.asdict(cfg), indent=1)
    if distributed.leads():
        whole = path.with_suffix(".partial")
        whole.write_text(text)
        whole.replace(path)  # the other processes never see half a file


def train(cfg: RunConfig, workdir: Path) -> None:
    """Runs one phase and writes `workdir/model`."""
    limits.check(cfg)
    own = ("cluster", "compilation_cache")
    same = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in own}
    distributed.check_alike("settings", same)
    check_workdir(cfg, workdir)
    if (workdir / "model" / "config.json").exists():
        say(f"{workdir} is finished: its model is in {workdir / 'model'}")
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_run_config(cfg, workdir)
    except OSError as error:
        raise ConfigError(
            f"--workdir {workdir} cannot be written ({error.strerror}); give another folder"
        ) from error

    # --- where the weights come from ---
    mesh = sharding.make_mesh(cfg.mesh)
    layout.check_batch_size(cfg, mesh)
    params, meta = starting_point(cfg)
    model = meta.model.validate()
    if other := unread(cfg.model, model):
        say(f"config.model is not what {cfg.init} holds, which is used: {', '.join(other)}")
    layout.check_experts(model, mesh)
    flat = flatten_dict(params, sep="/")
    flat |= lora.fresh(cfg, flat)

    # --- data ---
    data = load_data(cfg, model)
    stream = data.batches(data.samples, True)
    distributed.check_alike("data", stream.get_state())
    total = cfg.optim.steps or stream.order.batches(cfg.optim.epochs)

    # --- what trains ---
    label = layout.labels(cfg, flat)
    outline = layout.abstract_weights(cfg, flat, label, mesh)
    say(optim.group_table(outline[0] | outline[1], label))
    tx = optim.make(cfg.optim, total, label)
    trainable, kept = optim.split(flat, label)
    frozen = layout.place_weights(cfg, kept, label, mesh)

    # --- resume, or start ---
    checkpoints = resume.Checkpoints(workdir, cfg.log.keep)
    begun_from = {"init": provenance.digest(Path(cfg.init) / "config.json")}
    if (latest := checkpoints.latest()) is not None:
        state, place = checkpoints.restore(latest, layout.abstract_state(tx, *outline, mesh))
        if (begun_from | place)["init"] != begun_from["init"]:
            raise ConfigError(
                f"{cfg.init} is another model than the one that {workdir} began with, whose frozen "
                "weights are needed to go on; put it back, or use another --workdir"
            )
        stream.set_state(place)
        say(f"resumed at step {latest} of {total}")
    else:
        weights = layout.place_weights(cfg, trainable, label, mesh)
        state = layout.first_state(tx, weights, frozen, mesh)
    first = int(state.step)

    # --- loop ---
    validation = Validation(cfg, model, mesh) if cfg.evaluation.every else None
    run_step, trace = step.make_step(cfg, model, tx, state), Trace(cfg, workdir)
    seed = np.uint32(cfg.seed % 2**32)  # not part of the program: other seeds use the same one
    rate, costs = optim.schedule(cfg.optim, total), flops.costs(cfg, model, label)
    patches = model.vision.patches
    reporter = Reporter(cfg, workdir, first, total, rate, data.samples, costs, patches)
    with (
        closing(checkpoints),
        closing(stream),
        closing(reporter),
        closing(trace),
        jax.set_mesh(mesh),
        distributed.preemption() as preempted,
    ):
        # The run may have ended behind saving a step and before that step's evaluation.
        owed = validation if validation and first and validation.due(first, total) else None
        if owed and not reporter.has(first, owed.prefix):
            reporter.evaluated(first, owed(frozen | state.train))
        for number in range(first + 1, total + 1):
            trace.begin(number)
            asked = time.perf_counter()
            batch = next(stream)
            waited = time.perf_counter() - asked
            arrays = sharding.place_batch(layout.on_device(batch), mesh)
            state, metrics = run_step(state, frozen, arrays, seed)
            trace.end(number, metrics)
            # The metrics of the step before are read while this one runs.
            reporter.flush()
            reporter.add(number, metrics, batch, waited)
            ends = preempted(number) and number < total
            if ends or number % cfg.log.save_every == 0 or number == total:
                reporter.flush()
                checkpoints.save(state, position(stream) | begun_from)
            if ends:
                raise distributed.Preempted(
                    f"SIGTERM: stopped behind step {number} of {total}, which is saved; the same "
                    "command goes on from there"
                )
            if validation and validation.due(number, total):
                reporter.flush()
                reporter.evaluated(number, validation(frozen | state.train))
    left_out = [*data.left_out, *all_problems(stream)]

    # --- result ---
    outcome: dict[str, Any] = dict(reporter.latest)
    if cfg.objective == "router" and cfg.model.moe:
        judged = unflatten_dict(frozen | state.train, sep="/")
        held_out = data.batches(data.rest, False) if data.rest else None
        report = router.evaluate(
            judged, model, cfg.model.moe, held_out or [], jnp.dtype(cfg.compute_dtype), mesh
        )
        left_out += all_problems(held_out) if held_out else []
        say(router.report_table(report))
        outcome["router"] = report
        if distributed.leads():
            (workdir / "router.json").write_text(json.dumps(report, indent=1) + "\n")
    if distributed.leads():
        problems.write_problems(left_out, workdir / "skipped.jsonl")
        if left_out:
            print(f"{len(left_out):,} rows were left out: {workdir / 'skipped.jsonl'}", flush=True)
    # Frozen weights are copied from `init`: those on the devices are rounded for the computation.
    # Of a run with adapters nothing else is, but for a router that `init` does not hold.
    saved = flat if meta.delta is None else router.own(cfg, flat)
    result = unflatten_dict(saved | state.train, sep="/")
    record = provenance.phase(
        cfg,
        steps=total,
        samples=data.samples,
        left_out=len(left_out),
        parameters=provenance.sizes(flat, list(state.train)),
        outcome=outcome,
    )
    meta = dataclasses.replace(meta, phases=[*meta.phases, record])
    checkpoint.save_model(workdir / "model", result, meta, assets_from=cfg.init)
    say(f"model written to {workdir / 'model'}")


def main(_: list[str]) -> None:
    """Runs the phase of --config; faults in the user's input end with a message and status 1, a run
    that was asked to end with status 75, one of several processes that has lost another with 69."""
    logging.set_verbosity(logging.WARNING)
    try:
        distributed.join(flags.FLAGS.config.cluster)
        compilation.keep(flags.FLAGS.config.compilation_cache)
        distributed.end_when_asked()
        train(flags.FLAGS.config, Path(flags.FLAGS.workdir))
    except distributed.Preempted as reason:
        say(str(reason))
        sys.exit(distributed.PREEMPTED)
    except (
        ConfigError,
        checkpoint.CheckpointError,
        problems.DataError,
        NotFinite,
    ) as error:
        distributed.stop(f"error: {error}")
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        distributed.stop(
            f"error: {error}\nProbably another process of this run has ended; its own output says "
            "why. Start all of them again: the run goes on from its last checkpoint",
            distributed.LOST,
        )


if __name__ == "__main__":
    config_flags.DEFINE_config_file(
        "config", help_string="A file of configs/, as in configs/stage3.py:phi2"
    )
    flags.DEFINE_string(
        "workdir", None, "Folder of the run: checkpoints, metrics and the finished model"
    )
    flags.mark_flags_as_required(["config", "workdir"])
    command_line.run(main)
