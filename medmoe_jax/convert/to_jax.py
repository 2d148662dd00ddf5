"""PyTorch checkpoints to a model folder, in one pass over the files.

Every leaf of the parameter tree is allocated once, in its final dtype, and filled tensor by tensor.
All keys, shapes and dtypes are checked before the first tensor is read (`plan.py`), and nothing is
written before all is read.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from medmoe_jax.checkpoint import ModelMeta, save_model
from medmoe_jax.config import LlmConfig, VisionConfig
from medmoe_jax.convert.export_configs import preprocessor_config
from medmoe_jax.convert.pieces import Piece, source_order
from medmoe_jax.convert.plan import Plan, make_plan
from medmoe_jax.convert.report import ConversionError, Report, raise_all
from medmoe_jax.convert.sources import Sources, find_sources, image_settings, tokenizer_files
from medmoe_jax.convert.table import TOWER, Row, count_parameters, leaf_shapes
from medmoe_jax.convert.torch_files import numpy_dtype


def to_jax(
    src: str | Path,
    dst: str | Path,
    *,
    vision: str | Path | None = None,
    llm: str | Path | None = None,
    projector: str | Path | None = None,
    router: str | Path | None = None,
    tokenizer: str | Path | None = None,
    seed: int = 0,
) -> Report:
    """Converts PyTorch files into a model folder.

    Args:
      src: an official Med-MoE folder of any stage, a Hugging Face Phi, StableLM-2 or CLIP folder,
        or a router `.pth`.
      dst: folder to write; must not exist, or be empty.
      vision: CLIP folder; needed where the one that the configuration names is not there. With a
        language model as `src` it makes a Med-MoE model at its start. Weights in the folder are
        used instead of those in `src`, as the official code does; a folder with a `config.json`
        alone describes those in `src`.
      llm: the base language model, for a stage-1 folder (which holds a projector only).
      projector: `mm_projector.bin`, or a stage-1 folder with one.
      router: `.pth` file. A dense model keeps it as `router/...`; in a MoE model it replaces every
        layer's router.
      tokenizer: folder with tokenizer files, where neither `src` nor `llm` has them.
      seed: of a projector that no file holds.

    Returns:
      What was done, to be printed.

    Raises:
      ConversionError: with every problem found; nothing is written then.
    """
    src, dst = Path(src), Path(dst)
    check_empty(dst)
    report = Report(f"to-jax {src} -> {dst}")
    sources = find_sources(
        src,
        vision=_path(vision),
        llm=_path(llm),
        projector=_path(projector),
        router=_path(router),
        tokenizer=_path(tokenizer),
    )
    plan = make_plan(sources, report)
    params, dtypes = _fill(plan, seed)
    dtypes |= _compare_tower(plan, params, dtypes, report)
    report.converted = sum(len(found) for found in plan.pieces.values())
    report.stage = _describe(plan)
    report.parameters = count_parameters(plan.rows)
    meta = ModelMeta(
        stage=plan.stage,
        model=plan.model,
        dtypes=dtypes,
        torch_config=sources.config if sources.kind != "clip" else None,
        clip_config=sources.vision.config if sources.vision else None,
        history=[f"converted from PyTorch: {src.name}, {report.stage}"],
    )
    with whole_or_nothing(dst):
        _copy_assets(sources, dst, plan.model.vision, report)
        save_model(dst, nest(params), meta)
    return report


def check_empty(dst: Path) -> None:
    """Raises ConversionError where the destination exists already and holds something."""
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise ConversionError(
            f"{dst}: exists already; give another destination, or remove it first"
        )


@contextmanager
def whole_or_nothing(dst: Path) -> Iterator[None]:
    """Removes a destination, empty before, where writing it fails or is stopped: the same command
    then begins anew."""
    try:
        yield
    except BaseException:
        shutil.rmtree(dst, ignore_errors=True)
        raise


def nest(flat: dict[str, np.ndarray]) -> dict[str, Any]:
    """{"a/b": x} -> {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def _path(value: str | Path | None) -> Path | None:
    return None if value is None else Path(value)


def _fill(plan: Plan, seed: int) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads every tensor into its place.

    Returns:
      Path -> leaf, and PyTorch key -> dtype of those tensors whose leaf had to take a wider one.
    """
    names: dict[str, set[str]] = {}
    for row in plan.rows:
        found = plan.pieces.get(row.key)
        names.setdefault(row.path, set()).update([found[0].info.dtype] if found else ["float32"])
    # float32 holds float16 and bfloat16 exactly, so mixed tensors come back as they were
    dtype = {path: next(iter(n)) if len(n) == 1 else "float32" for path, n in names.items()}
    params = {
        path: np.empty(shape, numpy_dtype(dtype[path]))
        for path, shape in leaf_shapes(plan.rows).items()
    }
    narrower: dict[str, str] = {}
    problems: list[str] = []
    llm = plan.model.llm
    for row in source_order(plan.rows, plan.pieces):
        first, *others = plan.pieces[row.key]
        array = first.read(llm)
        problems += [p for other in others if (p := _difference(first, array, other, llm))]
        params[row.path][row.index] = row.to_jax(array)
        if first.info.dtype != dtype[row.path]:
            key = row.key.removeprefix(TOWER) if plan.external else row.key
            narrower[key] = first.info.dtype
    raise_all("tensors that should be the same differ", problems)
    if plan.fresh:
        _init_projector(plan.rows, params, seed)
    return params, narrower


def _difference(first: Piece, array: np.ndarray, other: Piece, llm: LlmConfig) -> str | None:
    """What is wrong with a second copy of a tensor; None where it is equal to the bit."""
    copy = other.read(llm)
    if _same_bits(copy, array):
        return None
    return (
        f"{other.info.file}: keys {first.info.key!r} and {other.info.key!r} are one parameter of "
        "the model but differ; remove the wrong one"
    )


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays have the same dtype, shape and bits (NaN is NaN, -0.0 is not 0.0)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    word = f"u{a.dtype.itemsize}"
    return np.array_equal(np.ascontiguousarray(a).view(word), np.ascontiguousarray(b).view(word))


def _init_projector(rows: list[Row], params: dict[str, np.ndarray], seed: int) -> None:
    """Fills the projector with uniform numbers within 1/sqrt(inputs).

    Source: torch.nn.Linear.reset_parameters.
    """
    rng = np.random.default_rng(seed)
    for row in rows:
        if row.path.startswith("projector/"):
            kernel = params[row.path.rsplit("/", 1)[0] + "/kernel"]
            bound = kernel.shape[0] ** -0.5
            leaf = params[row.path]
            leaf[...] = rng.uniform(-bound, bound, leaf.shape)


def _compare_tower(
    plan: Plan, params: dict[str, np.ndarray], narrower: dict[str, str], report: Report
) -> dict[str, str]:
    """Compares the CLIP weights inside the checkpoint, which are not used, with the CLIP folder's.

    Returns:
      PyTorch key -> dtype of the copies that are the same numbers in another dtype, to be exported
      in it again.
    """
    dtypes: dict[str, str] = {}
    different: list[str] = []
    rows = {row.key: row for row in plan.rows}
    for key, piece in plan.tower.items():
        report.ignore(key, "CLIP weights come from the CLIP folder, as in the official code")
        row = rows.get(key)
        copy = piece.read(plan.model.llm)
        if row is None or row.shape != copy.shape:
            different.append(key)
            continue
        leaf = params[row.path][row.index]
        if not _same_bits(row.to_torch(leaf).astype(copy.dtype), copy):
            different.append(key)
        elif piece.info.dtype != narrower.get(key.removeprefix(TOWER), leaf.dtype.name):
            dtypes[key] = piece.info.dtype
    if different:
        report.notes.append(
            f"{len(different)} CLIP tensors inside the checkpoint differ from the CLIP folder's, "
            f"which are used, as in the official code ({different[0]}, ...)"
        )
    return dtypes


def _describe(plan: Plan) -> str:
    """The stage in words."""
    moe = plan.model.moe
    if plan.stage == "router" and not any(row.path.startswith("llm/") for row in plan.rows):
        return f"{plan.stage} (a router for width {plan.model.llm.width} alone)"
    if moe is None:
        return f"{plan.stage} (dense)"
    layers = ",".join(map(str, plan.model.moe_layers))
    return f"{plan.stage} (top-{moe.top_k} of {moe.experts} experts in layers {layers})"


def _copy_assets(sources: Sources, dst: Path, vision: VisionConfig, report: Report) -> None:
    """Copies tokenizer files and image settings."""
    dst.mkdir(parents=True, exist_ok=True)
    files = tokenizer_files(sources.tokenizer) if sources.tokenizer else []
    generation = sources.config_file.parent / "generation_config.json"
    if sources.kind not in ("clip", "router"):
        if files:
            report.notes.append(f"tokenizer: {sources.tokenizer}")
        else:
            report.notes.append("no tokenizer files found; give their folder with --tokenizer")
        files += [generation] if generation.is_file() else []
    if files:
        (dst / "tokenizer").mkdir()
    for file in files:
        shutil.copyfile(file, dst / "tokenizer" / file.name)
    if sources.vision:
        _copy_preprocessor(sources.vision.path, dst, vision, report)


def _copy_preprocessor(clip: Path, dst: Path, vision: VisionConfig, report: Report) -> None:
    """Copies CLIP's image settings; where it has none, writes its usual ones."""
    settings, file = image_settings(clip)
    target = dst / "preprocessor_config.json"
    if settings and file.name == target.name:
        shutil.copyfile(file, target)
        return
    if not settings:
        settings = preprocessor_config(vision)
        report.notes.append(
            f"{clip} has no image settings; CLIP's own steps at {vision.image_size} pixels are used"
        )
    target.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
