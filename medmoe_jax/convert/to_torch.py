"""A model folder to PyTorch files: the official Med-MoE layout, or plain Hugging Face folders.

Official layout: `config.json`, the weights, tokenizer files, and the vision tower on its own in
`clip/`, since the official classes read it from there. Weights go to disk tensor by tensor.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medmoe_jax.checkpoint import ModelMeta, open_model
from medmoe_jax.convert.export_configs import (
    clip_config,
    official_config,
    plain_config,
    preprocessor_config,
)
from medmoe_jax.convert.report import ConversionError, Report, raise_all
from medmoe_jax.convert.sources import PROJECTOR_FILE
from medmoe_jax.convert.table import (
    PARTS,
    TOWER,
    Row,
    count_parameters,
    leaf_shapes,
    router_table,
    table,
)
from medmoe_jax.convert.to_jax import check_empty, whole_or_nothing
from medmoe_jax.convert.torch_files import FLOATS, import_torch, numpy_dtype
from medmoe_jax.convert.torch_output import (
    NewTensor,
    write_pickle,
    write_safetensors,
    write_sharded,
)
from medmoe_jax.stored import Stored

SHARD_BYTES = 2**30  # largest file of weights, a single larger tensor aside
LAYOUTS = ("official", "hf")


def to_torch(
    src: str | Path,
    dst: str | Path,
    *,
    layout: str | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Report:
    """Writes a model folder as PyTorch files.

    Args:
      src: model folder.
      dst: folder to write; must not exist, or be empty.
      layout: "official" for the folder that Med-MoE's classes load (LlavaPhi, LlavaStablelm, and
        with experts their MoE twins); "hf" for plain Hugging Face folders of a dense model: the
        language model in `dst`, the vision tower in `dst/clip`, the projector as
        `mm_projector.bin`. A folder with one part alone is written into `dst` itself.
        None: "official" where the model is whole, else "hf".
      dtype: float32, float16 or bfloat16 for all weights; None keeps each tensor's own.
        `router.pth` is always float32.
      shard_bytes: largest file of weights.

    Returns:
      What was done, to be printed.

    Raises:
      ConversionError: parameters that do not fit the configuration, or a layout that cannot hold
        the model.
    """
    src, dst = Path(src), Path(dst)
    check_empty(dst)
    params, meta = open_model(src)
    export = _Export(flatten(params), meta, dtype)
    parts = [part for part in PARTS if part in params]
    layout = layout or ("official" if len(parts) == len(PARTS) else "hf")
    _check_layout(layout, dtype, parts, meta)
    rows = table(meta.model, parts)
    router = _router_rows(params["router"]) if "router" in params else []
    _check_leaves(export.leaves, rows + router, src)
    report = Report(f"to-torch {src} -> {dst} ({layout} layout)", stage=meta.stage)
    report.parameters = count_parameters(rows + router)
    report.converted = len(rows) + len(router)
    projector = [row for row in rows if row.path.startswith("projector/")]
    if meta.stage != "stage1" and layout == "official":
        projector = []  # it is among the weights; a stage-1 folder has it as a file too
    if projector or router:
        import_torch("write mm_projector.bin or router.pth")
    with whole_or_nothing(dst):
        dst.mkdir(parents=True, exist_ok=True)
        if projector:
            write_pickle(dst / PROJECTOR_FILE, [export.tensor(row, row.key) for row in projector])
        if router:
            write_pickle(dst / "router.pth", [export.tensor(r, r.key, "float32") for r in router])
            report.notes.append(
                "router.pth: the router on its own, as the official stage 3 reads it"
            )
        if "vision" in parts:
            clip = dst / "clip" if "llm" in parts else dst
            _write_clip(clip, src, export, [row for row in rows if row.path.startswith("vision/")])
        if layout == "official":
            _write_official(dst, export, rows, shard_bytes, report)
        elif "llm" in parts:
            llm = [row for row in rows if row.path.startswith("llm/")]
            _write_plain(dst, export, llm, shard_bytes, report)
        if "llm" in parts and (src / "tokenizer").is_dir():
            shutil.copytree(src / "tokenizer", dst, dirs_exist_ok=True)
    return report


@dataclass(frozen=True)
class _Export:
    """Where tensors come from: leaves by path, meta data, and the dtype asked for (None: own)."""

    leaves: dict[str, Stored]  # read tensor by tensor
    meta: ModelMeta
    dtype: str | None

    def tensor(self, row: Row, key: str, dtype: str | None = None) -> NewTensor:
        """A row of the table, to be written under `key`, whose dtype is taken if none is given."""
        own = self.meta.dtypes.get(row.key.removeprefix(TOWER), self.leaves[row.path].dtype.name)
        dtype = dtype or self.dtype or self.meta.dtypes.get(key, own)
        return NewTensor(key, dtype, row.shape, lambda: self._array(row, dtype))

    def _array(self, row: Row, dtype: str) -> np.ndarray:
        array = row.to_torch(np.asarray(self.leaves[row.path][row.index]))
        if array.dtype.name == dtype:
            return array
        with np.errstate(over="ignore"):
            cast = array.astype(numpy_dtype(dtype))
        if np.isinf(cast).sum() > np.isinf(array).sum():
            raise ConversionError(
                f"{row.key}: has numbers beyond the range of {dtype}; use --dtype bfloat16 or "
                "float32"
            )
        return cast


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": x}} -> {"a/b": x}."""
    flat: dict[str, Any] = {}
    for name, node in tree.items():
        path = f"{prefix}{name}"
        flat |= flatten(node, f"{path}/") if isinstance(node, dict) else {path: node}
    return flat


def _router_rows(router: dict[str, Any]) -> list[Row]:
    """The table of the lone router in the tree, of the sizes that it has."""
    width = router["fc1"]["kernel"].shape[0]
    return router_table(width, router[f"fc{len(router)}"]["kernel"].shape[1], len(router))


def _check_leaves(leaves: dict[str, Stored], rows: Sequence[Row], src: Path) -> None:
    """Raises ConversionError where the tree is not the one that the configuration describes."""
    shapes = leaf_shapes(rows)
    problems = []
    for path, shape in shapes.items():
        leaf = leaves.get(path)
        if leaf is None:
            problems.append(f"leaf {path!r} of shape {list(shape)} is missing")
        elif leaf.shape != shape:
            was, asked = list(leaf.shape), list(shape)
            problems.append(f"leaf {path!r} has shape {was}, config.json asks for {asked}")
        elif leaf.dtype.name not in FLOATS:
            problems.append(f"leaf {path!r} has dtype {leaf.dtype.name}, not {', '.join(FLOATS)}")
    for path in leaves.keys() - shapes.keys():
        problems.append(f"leaf {path!r} is not part of the model that config.json describes")
    raise_all(
        f"{src}: params/ and config.json do not fit; restore the one that was changed", problems
    )


def _check_layout(layout: str, dtype: str | None, parts: Sequence[str], meta: ModelMeta) -> None:
    """Raises ConversionError where the layout cannot hold the model."""
    problems = []
    if layout not in LAYOUTS:
        problems.append(f"layout {layout!r} is unknown; use one of {', '.join(LAYOUTS)}")
    if dtype is not None and dtype not in FLOATS:
        problems.append(f"dtype {dtype!r} is unknown; use one of {', '.join(FLOATS)}")
    if layout == "official" and len(parts) < len(PARTS):
        missing = ", ".join(part for part in PARTS if part not in parts)
        problems.append(
            f"the official layout needs a whole model, this has no {missing}; use --layout hf"
        )
    if layout == "hf" and meta.model.moe:
        problems.append(
            "a model with experts has no plain Hugging Face form; use --layout official"
        )
    raise_all("the model cannot be written", problems)


def _write_clip(folder: Path, src: Path, export: _Export, rows: Sequence[Row]) -> None:
    """Writes the vision tower as Hugging Face's CLIPVisionModel, with its image settings."""
    folder.mkdir(exist_ok=True)
    tensors = [export.tensor(row, row.key.removeprefix(TOWER)) for row in rows]
    write_safetensors(folder / "model.safetensors", tensors)
    _write_json(folder / "config.json", clip_config(export.meta, tensors[0].dtype))
    settings = src / "preprocessor_config.json"
    if settings.is_file():
        shutil.copyfile(settings, folder / "preprocessor_config.json")
    else:
        vision = export.meta.model.vision
        _write_json(folder / "preprocessor_config.json", preprocessor_config(vision))


def _write_plain(
    dst: Path, export: _Export, rows: Sequence[Row], shard_bytes: int, report: Report
) -> None:
    """Writes the language model as Hugging Face's PhiForCausalLM or StableLmForCausalLM."""
    tensors = [export.tensor(row, row.key) for row in rows]
    dtype, llm = tensors[0].dtype, export.meta.model.llm
    if llm.family == "phi" and not llm.lm_head_bias:
        zeros = np.zeros(llm.vocab, numpy_dtype(dtype))
        tensors.append(NewTensor("lm_head.bias", dtype, (llm.vocab,), lambda: zeros))
        report.notes.append("lm_head.bias: zeros, since PhiForCausalLM has one and this model none")
    write_sharded(dst, tensors, shard_bytes)
    _write_json(dst / "config.json", plain_config(export.meta, {t.key for t in tensors}, dtype))


def _write_official(
    dst: Path, export: _Export, rows: Sequence[Row], shard_bytes: int, report: Report
) -> None:
    """Writes weights and configuration of the official layout."""
    tensors = [export.tensor(row, row.key) for row in rows]
    names = write_sharded(dst, tensors, shard_bytes)
    report.notes.append(f"weights: {len(names)} file{'s' if len(names) > 1 else ''}")
    moe = export.meta.model.moe
    if moe and not moe.meta:
        report.notes.append(
            "no meta experts: the official classes always have them, and will not load this"
        )
    if moe and moe.router_layers > 1:
        report.notes.append(
            f"the router has {moe.router_layers} layers: the official classes have one, and will "
            "not load this"
        )
    dtype = next(t.dtype for t in tensors if t.key == "model.embed_tokens.weight")
    tower = _tower_path(export.meta, dst)
    report.notes.append(f"mm_image_tower: {tower} (the tower is in {dst / 'clip'})")
    keys = {tensor.key for tensor in tensors}
    _write_json(dst / "config.json", official_config(export.meta, keys, dtype, tower))


def _tower_path(meta: ModelMeta, dst: Path) -> str:
    """What `mm_image_tower` is to say: as before where that leads somewhere, else `./clip`."""
    named = (meta.torch_config or {}).get("mm_image_tower") or ""
    on_hub = named.startswith(("openai/", "laion/"))  # names that the official code fetches
    if on_hub or (named and (dst / named / "config.json").is_file()):
        return named
    return "./clip"


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
