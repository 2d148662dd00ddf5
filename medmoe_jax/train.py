"""Training of any phase: `python -m medmoe_jax.train --config configs/stage3.py:phi2 --workdir
DIR`.

Read top to bottom: model -> what trains -> data -> resume -> loop -> model folder. Next stop:
`models/medmoe.py`.

Where the weights come from: a checkpoint in the workdir if there is one (then also the optimiser
and the place in the data), else the model folder `config.init`. Frozen weights always come from
`config.init`.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax.traverse_util import flatten_dict
from ml_collections import config_flags

from medmoe_jax import checkpoint, log, optim, resume, router, sharding, step, upcycle
from medmoe_jax.config import ConfigError, RunConfig
from medmoe_jax.data import pipeline, sources, tokens

_CONFIG = config_flags.DEFINE_config_file(
    "config", help_string="A file of configs/, as in configs/stage3.py:phi2"
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run: checkpoints, metrics and the finished model"
)

# The router decides in float32 whatever the rest of the model is stored in.
KEEP_FLOAT32 = ("router/", "llm/moe/router/", "llm/moe/coefficient/")


class NotFinite(RuntimeError):
    """A loss or a gradient became NaN or infinite."""


def starting_point(cfg: RunConfig) -> tuple[dict[str, Any], checkpoint.ModelMeta]:
    """Host parameters and meta data that the phase starts from: `init`, with a new router or with
    experts.

    Raises:
      ConfigError: `init` is missing, or does not fit the phase.
    """
    if not cfg.init:
        raise ConfigError(
            "config.init is empty: give the folder of a model (`convert to-jax`, or `model` of an "
            "earlier phase)"
        )
    params, meta = checkpoint.load_model(Path(cfg.init))
    model, mixture = meta.model, cfg.model.moe
    line = f"{cfg.phase} from {cfg.init}"
    if cfg.objective == "router":
        if model.moe is not None or mixture is None:
            raise ConfigError(
                "the router phase needs a dense (stage 2) model in config.init and "
                "config.model.moe set"
            )
        params = params | {"router": jax.device_get(router.fresh(model, mixture, cfg.seed))}
    elif mixture is not None and model.moe is None:
        source = checkpoint.load_router(Path(cfg.router)) if cfg.router else params.get("router")
        if source is None:
            raise ConfigError(
                f"{cfg.init} holds no router: start from the folder of the router phase, or set "
                "config.router to a .pth file"
            )
        params, model = upcycle.upcycle(params, model, mixture, source, cfg.upcycle)
        line += f", {mixture.experts} experts, top-{mixture.top_k}, {mixture.placement}, {cfg.upcycle} start"
    elif mixture is not None and mixture != model.moe:
        raise ConfigError(
            f"config.model.moe is {mixture}, but {cfg.init} holds {model.moe}: make them equal"
        )
    elif cfg.router:
        raise ConfigError(
            "config.router is read when a dense model becomes a MoE model; this one is one already"
        )
    return params, dataclasses.replace(
        meta, stage=cfg.phase, model=model, history=[*meta.history, line]
    )


def placed(
    cfg: RunConfig, flat: dict[str, Any], label: dict[str, str], mesh: jax.sharding.Mesh
) -> Any:
    """(trainable in float32, frozen in config.frozen_dtype) on the devices; the router stays
    float32.
    """
    train, frozen = optim.split(flat, label)
    train = {k: np.asarray(v, np.float32) for k, v in train.items()}
    dtype = jnp.dtype(cfg.frozen_dtype)
    frozen = {
        k: np.asarray(v, np.float32 if k.startswith(KEEP_FLOAT32) else dtype)
        for k, v in frozen.items()
    }
    return sharding.place(train, mesh), sharding.place(frozen, mesh)


def load_samples(cfg: RunConfig, workdir: Path) -> list[sources.Sample]:
    """Rows of config.data.files, bad ones reported; for the router phase as many as asked for a
    modality.
    """
    if not cfg.data.files:
        raise ConfigError("config.data.files is empty: name the JSON files to train on")
    return sources.load(
        cfg.data.files, cfg.data.image_folder, cfg.data.on_error, workdir / "skipped.jsonl"
    )


def check_finite(number: int, metrics: dict[str, Any], rows: list[str]) -> None:
    """Raises NotFinite naming the metric, and the rows of the batch whose loss is not finite."""
    bad = [k for k in ("loss", "grad_norm") if not np.isfinite(metrics[k])]
    if bad:
        at = np.flatnonzero(~np.isfinite(metrics["rows"]))
        named = [rows[i] for i in at] or rows
        raise NotFinite(
            f"step {number}: {', '.join(bad)} is not finite; rows: {'; '.join(named)}. "
            "Look at these rows, lower config.optim.lr or set config.optim.clip_norm=1.0"
        )


def write_run_config(cfg: RunConfig, workdir: Path) -> None:
    """Stores the run's config; a workdir that holds another run is an error."""
    path = workdir / "run.json"
    text = json.dumps(dataclasses.asdict(cfg), indent=1)
    if path.exists() and path.read_text() != text:
        old = json.loads(path.read_text())
        new = json.loads(text)
        changed = [k for k in new if new[k] != old.get(k)]
        raise ConfigError(
            f"{workdir} holds a run with another config (different: {', '.join(changed)}); "
            "use another --workdir, or the same config to resume"
        )
    path.write_text(text)


def train(cfg: RunConfig, workdir: Path) -> None:
    """Runs one phase and writes `workdir/model`."""
    if (workdir / "model" / "config.json").exists():
        print(f"{workdir} is finished: its model is in {workdir / 'model'}")
        return
    workdir.mkdir(parents=True, exist_ok=True)
    write_run_config(cfg, workdir)

    # --- model
    # ----------------------------------------------------------------------------------------------------
    mesh = sharding.make_mesh(cfg.mesh)
    host, meta = starting_point(cfg)
    model = meta.model.validate()
    flat = flatten_dict(host, sep="/")

    # --- what trains
    # ------------------------------------------------------------------------------------------------
    label = optim.labels(list(flat), cfg.train)
    weights, frozen = placed(cfg, flat, label, mesh)
    print(optim.group_table(weights | frozen, label), flush=True)

    # --- data
    # -------------------------------------------------------------------------------------------------------
    tokenizer = tokens.load_tokenizer(Path(cfg.init) / "tokenizer", model.llm.family)
    samples = load_samples(cfg, workdir)
    if cfg.data.labels_per_modality:
        samples, rest = sources.choose_per_modality(samples, cfg.data.labels_per_modality, cfg.seed)
    make = pipeline.Maker.from_config(cfg.data, tokenizer, model.vision)
    stream = make.stream(samples, cfg.optim.batch_size, seed=cfg.seed)
    total = cfg.optim.steps or max(1, round(len(samples) * cfg.optim.epochs / cfg.optim.batch_size))

    # --- optimiser, resume
    # --------------------------------------------------------------------------------------------
    tx = optim.make(cfg.optim, total, label)
    state = step.State(jnp.zeros((), jnp.int32), weights, tx.init(weights | frozen))
    checkpoints = resume.Checkpoints(workdir, cfg.log.keep)
    if (latest := checkpoints.latest()) is not None:
        state, place = checkpoints.restore(latest, state)
        stream.set_state(place)
        print(f"resumed at step {latest} of {total}", flush=True)
    first = int(state.step)

    # --- loop
    # ---------------------------------------------------------------------------------------------------------
    writer = log.MetricWriter(workdir, first, cfg.log.tensorboard)
    run_step = step.make_step(cfg, model, tx)
    bar = log.progress(total, first, cfg.phase)
    pending: tuple[int, dict[str, Any], list[str], dict[str, Any]] | None = None
    with jax.set_mesh(mesh):
        for number in range(first + 1, total + 1):
            started = time.perf_counter()
            batch = next(stream)
            waited = time.perf_counter() - started
            arrays = sharding.place_batch(pipeline.device_part(batch), mesh)
            state, metrics = run_step(state, frozen, arrays)
            # The metrics of the step before are read while this one runs.
            if pending:
                finish(pending, writer, bar, cfg)
            names = [samples[i].name for i in batch["row"]]
            pending = (
                number,
                metrics,
                names,
                {"wait": waited, "started": started, "mask": batch["mask"]},
            )
            if number % cfg.log.save_every == 0 or number == total:
                finish(pending, writer, bar, cfg)
                pending = None
                checkpoints.save(state, stream.get_state())
    bar.close()
    writer.close()
    checkpoints.close()
