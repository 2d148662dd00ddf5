"""The model folder: configuration, parameters, tokenizer and image settings of one model.

    DIR/config.json                what the model is and where it came from (`ModelMeta`)
    DIR/params/                    Orbax PyTree checkpoint of the parameter tree, in its own dtypes
    DIR/tokenizer/                 tokenizer files, where known
    DIR/preprocessor_config.json   image settings of CLIP, where known

A folder of adapters (`lora`) looks the same, but its `params/` holds the adapters alone (and a
router that came from elsewhere), and its `config.json` names the model that they belong to
(`Delta`). It is read as that model with the adapters in its weights.

`config.json` is written last, so a folder without it is an interrupted write and is not read. The
state of a running training (optimiser, data iterator) is not kept here.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from medmoe_jax import lora, stored
from medmoe_jax.config import (
    ConfigError,
    LoraConfig,
    ModelConfig,
    model_from_dict,
    model_to_dict,
)
from medmoe_jax.stored import CheckpointError, Stored
from medmoe_jax.upcycle import upcycle

FORMAT = "medmoe_jax"
VERSION = 1


@dataclass
class Delta:
    """What the adapters of a folder belong to.

    Attributes:
      base: model folder. It is also looked for where it lay as seen from the adapters' folder.
      fingerprint: of its parameters, see `lora.fingerprint`.
      upcycle: how a dense `base` becomes the model with experts (`upcycle.MODES`).
      lora: rank, scale and places of the adapters.
    """

    base: str
    fingerprint: str
    upcycle: str
    lora: LoraConfig


@dataclass
class ModelMeta:
    """What `config.json` of a model folder holds.

    Attributes:
      stage: how far the model has come: base, stage1, stage2, router, stage3, or a name of one's
        own.
      model: all shapes.
      dtypes: PyTorch key -> dtype of tensors that are exported in another dtype than their leaf's.
      torch_config: `config.json` of the PyTorch model this one came from, verbatim.
      clip_config: `config.json` of its CLIP folder, verbatim.
      history: one line a step of provenance, oldest first.
      delta: where `params/` holds adapters alone: what they belong to.
      phases: what each phase of training recorded (`provenance.phase`), oldest first.
    """

    stage: str
    model: ModelConfig
    dtypes: dict[str, str] = field(default_factory=dict)
    torch_config: dict[str, Any] | None = None
    clip_config: dict[str, Any] | None = None
    history: list[str] = field(default_factory=list)
    delta: Delta | None = None
    phases: list[dict[str, Any]] = field(default_factory=list)


@contextmanager
def _without_ocdbt_notice() -> Iterator[None]:
    """Drops Orbax's log line about OCDBT files to merge: `save_model` writes none, by choice."""
    logger = logging.getLogger("absl")

    def keep(record: logging.LogRecord) -> bool:
        return "Skipping merge of OCDBT" not in record.getMessage()

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def save_model(
    folder: str | os.PathLike[str],
    params: Mapping[str, Any],
    meta: ModelMeta,
    assets_from: str | os.PathLike[str] | None = None,
) -> None:
    """Writes a model folder; returns when it is on disk.

    A model folder of this format at the same place is replaced. The extra memory is a few hundred
    MiB however large the leaves are: they are written in chunks, straight from `params`, and by
    several processes each its share. (OCDBT, Orbax's one-file layout, is not used because it
    gathers the whole checkpoint in memory first.)

    Args:
      folder: where to write.
      params: nested dict of numpy arrays, JAX arrays (sharded ones included) and leaves of other
        model folders (`open_model`), any dtype.
      meta: written as `config.json`.
      assets_from: another model folder whose tokenizer and image settings are copied; None leaves
        those in `folder` as they are.

    Raises:
      CheckpointError: `folder` holds a `config.json` of another format.
    """
    folder = Path(folder).absolute()
    config_file = folder / "config.json"
    if config_file.exists() and read_json(config_file).get("format") != FORMAT:
        raise CheckpointError(
            f"{config_file} belongs to something else than a {FORMAT} model folder; write to "
            "another folder, or remove this one first"
        )
    primary = jax.process_index() == 0
    if primary:
        folder.mkdir(parents=True, exist_ok=True)
        config_file.unlink(missing_ok=True)
        if assets_from is not None and Path(assets_from).absolute() != folder:
            _copy_assets(Path(assets_from), folder)
    tree = dict(params)
    save_args = jax.tree.map(_save_args, tree)
    handlers = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, ocp.type_handlers.ArrayHandler()),
        (np.ndarray, stored.Handler()),
        (Stored, stored.Handler()),
    )
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False, use_compression=False, type_handler_registry=handlers
    )
    with _without_ocdbt_notice(), ocp.Checkpointer(handler) as checkpointer:
        args = ocp.args.PyTreeSave(tree, save_args=save_args)
        checkpointer.save(folder / "params", args=args, force=True)
    if primary:
        data = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(meta)}
        data["model"] = model_to_dict(meta.model)
        if meta.delta:
            data["delta"]["beside"] = os.path.relpath(meta.delta.base, folder)
        partial = folder / "config.json.partial"
        partial.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        partial.replace(config_file)


def _save_args(leaf: Any) -> ocp.SaveArgs:
    """How a leaf is cut: one of more than a chunk into its stacked matrices first."""
    stacked = range(leaf.ndim - 2) if leaf.nbytes > stored.CHUNK_BYTES else ()
    return ocp.SaveArgs(chunk_byte_size=stored.CHUNK_BYTES, shard_axes=tuple(stacked))


def read_meta(folder: str | os.PathLike[str]) -> ModelMeta:
    """Reads `config.json` of a model folder, without its parameters.

    Raises:
      CheckpointError: not a model folder, an incomplete one, or one of another version.
    """
    config_file = Path(folder) / "config.json"
    if not config_file.is_file():
        raise CheckpointError(
            f"{config_file} does not exist: {folder} is not a model folder, or its writing was "
            "interrupted; make one with `python -m medmoe_jax.convert to-jax`"
        )
    data = read_json(config_file)
    if data.get("format") != FORMAT:
        raise CheckpointError(
            f"{config_file} is not of a {FORMAT} model folder (no format: {FORMAT}); a PyTorch "
            "folder is read with `python -m medmoe_jax.convert to-jax`"
        )
    if data.get("version") != VERSION:
        raise CheckpointError(
            f"{config_file}: version {data.get('version')} is not known, this program reads "
            f"version {VERSION}; use the release that wrote the folder, or convert again"
        )
    try:
        return ModelMeta(
            stage=data["stage"],
            model=model_from_dict(data["model"]),
            dtypes=data.get("dtypes") or {},
            torch_config=data.get("torch_config"),
            clip_config=data.get("clip_config"),
            history=data.get("history") or [],
            delta=_read_delta(data["delta"], Path(folder)) if data.get("delta") else None,
            phases=data.get("phases") or [],
        )
    except (KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{config_file}: {error}") from error


def _read_delta(data: dict[str, Any], folder: Path) -> Delta:
    """Raises KeyError or TypeError where something is missing or too much."""
    base = Path(data["base"])
    if not base.exists() and (folder / data["beside"]).exists():
        base = (folder / data["beside"]).resolve()
    settings = data["lora"] | {"targets": tuple(data["lora"]["targets"])}
    return Delta(str(base), data["fingerprint"], data["upcycle"], LoraConfig(**settings))


def open_model(
    folder: str | os.PathLike[str], base: str | os.PathLike[str] | None = None
) -> tuple[dict[str, Any], ModelMeta]:
    """Opens a model folder without reading its parameters.

    Args:
      folder: of a model, or of adapters, which stand in the weights they belong to.
      base: with adapters, the model folder that they belong to, where it is elsewhere now.

    Returns:
      The parameters, a nested dict of `Stored` leaves in the dtypes they were saved in, and the
      meta data, in which `delta` is None. Of adapters all is read once, a piece at a time: is the
      model theirs?

    Raises:
      CheckpointError: not a complete model folder, or adapters without the model they belong to;
        damage inside a leaf is found when it is read.
    """
    meta, params = read_meta(folder), _open_params(folder)
    if meta.delta is None:
        if base is not None:
            raise CheckpointError(f"{folder} is a whole model; there is no base to it")
        return params, meta
    both = lora.joined(open_base(folder, base), {"llm": params["llm"]})
    return lora.merge(both, meta.delta.lora.scale), dataclasses.replace(meta, delta=None)


def _open_params(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What `params/` of a model folder holds, as `Stored` leaves. Raises CheckpointError."""
    params_dir = Path(folder).absolute() / "params"
    if not params_dir.is_dir():
        raise CheckpointError(f"{params_dir} does not exist; copy the whole model folder again")
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            tree = checkpointer.metadata(params_dir).item_metadata.tree
        return jax.tree.map(lambda leaf: stored.open_leaf(params_dir / leaf.name), tree)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{params_dir} cannot be read ({error}); copy the whole model folder again"
        ) from error


def load_model(
    folder: str | os.PathLike[str], base: str | os.PathLike[str] | None = None
) -> tuple[dict[str, Any], ModelMeta]:
    """Reads a model folder into host memory: numpy arrays. Else as `open_model`."""
    params, meta = open_model(folder, base)
    return jax.tree.map(np.asarray, params), meta


def open_base(
    folder: str | os.PathLike[str], base: str | os.PathLike[str] | None = None
) -> dict[str, Any]:
    """The parameters that the adapters in `folder` stand beside. Arguments and errors as in
    `open_model`."""
    meta = read_meta(folder)
    if meta.delta is None:
        raise CheckpointError(f"{folder} is a whole model; there is no base to it")
    where = Path(base or meta.delta.base)
    if not (where / "config.json").is_file():
        raise CheckpointError(
            f"{folder} holds adapters for the model {where}, which is not there; put it back, or "
            "name its folder: `python -m medmoe_jax.lora merge ADAPTERS OUT --base FOLDER`"
        )
    params, found = open_model(where)
    if lora.fingerprint(params) != meta.delta.fingerprint:
        raise CheckpointError(
            f"{where} is not the model that the adapters in {folder} were trained on: its weights "
            "are others (fingerprint); find the right one and name it with --base of "
            "`python -m medmoe_jax.lora merge`"
        )
    if meta.model.moe and not found.model.moe:
        router = jax.tree.map(np.asarray, (params | _open_params(folder))["router"])
        params, _ = upcycle(params, found.model, meta.model.moe, router, meta.delta.upcycle)
    return params


def read_params(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What `params/` of a model folder holds, as it is, in host memory. Raises CheckpointError."""
    read_meta(folder)
    return jax.tree.map(np.asarray, _open_params(folder))


def load_router(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a trained router.

    Args:
      path: a `.pth` file, {"fc1.weight": [E, D], "fc1.bias": [E]} and fc2, fc3 where it is deeper,
        as the official code and `convert to-torch` write it; or a model folder of the router phase.

    Returns:
      {"fc1": {"kernel": [D, E], "bias": [E]}, ...}, numpy arrays, float32 from a file.

    Raises:
      CheckpointError: neither of the two, or torch is missing, which reads the file.
    """
    path = Path(path)
    if path.is_dir():
        params, meta = open_model(path)
        if "router" not in params:
            raise CheckpointError(
                f"{path}: holds no router (it is of stage {meta.stage}); give the folder of a "
                "router phase, or a .pth file"
            )
        return jax.tree.map(np.asarray, params["router"])
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; give a router .pth or a model folder")
    try:
        import torch
    except ImportError:
        raise CheckpointError(
            f"torch is needed to read {path}: pip install 'medmoe_jax[torch]'"
        ) from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        layers = range(1, len(state) // 2 + 1)
        router = {
            f"fc{i}": {
                "kernel": state[f"fc{i}.weight"].float().numpy().T.copy(),
                "bias": state[f"fc{i}.bias"].float().numpy(),
            }
            for i in layers
        }
    except Exception as error:  # damaged files fail in the unpickler in a dozen ways
        # not torch's own words: they advise to switch off the check
        raise CheckpointError(
            f"{path}: is not a whole router file, of fc1.weight, fc1.bias, ... alone "
            f"({type(error).__name__}); get it again"
        ) from error
    if not router or len(state) != 2 * len(router):
        raise CheckpointError(f"{path}: is not a router file; its keys are {sorted(state)[:6]}")
    return router


def read_json(path: Path, fault: type[ValueError] = CheckpointError) -> dict[str, Any]:
    """The JSON object in a file. Raises `fault` where there is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise fault(f"{path}: cannot be read as JSON ({error}); get the file again") from error
    if not isinstance(data, dict):
        raise fault(f"{path}: holds no JSON object; get the file again")
    return data


def _copy_assets(source: Path, folder: Path) -> None:
    """Copies tokenizer and image settings of model folder `source`, where it has them."""
    if (source / "tokenizer").is_dir():
        shutil.copytree(source / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
    if (source / "preprocessor_config.json").is_file():
        shutil.copyfile(source / "preprocessor_config.json", folder / "preprocessor_config.json")
