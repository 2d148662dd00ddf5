"""Decides which tensor of which file fills which place of the parameter tree, and checks it all."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from medmoe_jax.config import ConfigError, LlmConfig, ModelConfig, VisionConfig
from medmoe_jax.convert.configs import number, projector_name, read_llm, read_moe
from medmoe_jax.convert.pieces import Piece, collect, leave_out
from medmoe_jax.convert.report import ConversionError, Report, raise_all
from medmoe_jax.convert.sources import PROJECTOR_FILE, Sources, read_tower
from medmoe_jax.convert.table import PARTS, PROJECTOR, TOWER, Row, router_table, table
from medmoe_jax.convert.torch_files import FLOATS, Weights

_ROUTER = "llm/moe/router/"


@dataclass
class Plan:
    """What is read from where.

    Attributes:
      stage: the stage recognised.
      model: shapes.
      rows: the part of the table that the model folder is to hold.
      pieces: key in the table's spelling -> the tensors found for it; several must be equal.
      tower: the CLIP weights inside the checkpoint that a CLIP folder takes precedence over.
      external: whether the vision tower comes from a CLIP folder.
      fresh: whether the projector is initialised at random, since no file has one.
    """

    stage: str
    model: ModelConfig
    rows: list[Row]
    pieces: dict[str, list[Piece]]
    tower: dict[str, Piece] = field(default_factory=dict)
    external: bool = False
    fresh: bool = False


def make_plan(sources: Sources, report: Report) -> Plan:
    """Plans the conversion of `sources`; tells `report` what is left out and why.

    Raises:
      ConversionError: configurations that cannot be read, and every missing, unknown or misshapen
        tensor.
    """
    if sources.kind == "router":
        assert sources.router
        plan = _plan_router(sources.router)
        report.notes.append("a router alone: of the model's description, the width alone is known")
    elif sources.kind == "clip" or (sources.kind == "llm" and sources.vision is None):
        plan = _plan_part(sources, report)
    else:
        plan = _plan_whole(sources, report)
    _check(plan)
    return plan


def _plan_router(weights: Weights) -> Plan:
    """A router file on its own."""
    rows = _router_rows(weights)
    width = rows[0].shape[1]
    llm = LlmConfig(width=width, heads=1, kv_heads=1, rotary_fraction=0.0)
    return Plan("router", ModelConfig(llm=llm), rows, collect(weights, Report("")))


def _plan_part(sources: Sources, report: Report) -> Plan:
    """A CLIP tower or a language model alone, to be kept as it is."""
    folder = sources.vision if sources.kind == "clip" else sources.llm
    assert folder and folder.weights
    pieces = collect(folder.weights, report)
    if sources.kind == "clip":
        model = ModelConfig(vision=read_tower(folder))
        return Plan("base", model, table(model, ["vision"]), pieces, external=True)
    model = ModelConfig(llm=read_llm(folder.config, pieces, folder.config_file))
    return Plan("base", model, table(model, ["llm"]), pieces)


def _plan_whole(sources: Sources, report: Report) -> Plan:
    """A Med-MoE model, from one checkpoint or from parts."""
    base, config, where = sources.llm, sources.config, sources.config_file
    assert base and base.weights and config is not None
    pieces = collect(base.weights, report)
    leave_out(pieces, "lm_head.bias", "Med-MoE's output layer has no bias", report)
    tower = {key: found[0] for key, found in pieces.items() if key.startswith(TOWER)}
    vision = _place_vision(sources, pieces, tower, report)
    moe_keys = set(pieces)
    if sources.projector:
        leave_out(pieces, PROJECTOR, "replaced by the projector file", report)
        pieces |= collect(sources.projector, report)
        projector = projector_name(list(pieces), next(iter(sources.projector.files)))
    else:
        projector = config.get("image_projector_type", "linear")
    fresh = sources.kind == "llm" and sources.projector is None
    if fresh:
        projector = "mlp2x_gelu"
        report.notes.append("no projector given: a new one (mlp2x_gelu) is initialised at random")
    llm = read_llm(base.config, pieces, base.config_file)
    moe = read_moe(config, llm.layers, moe_keys, where)
    model = ModelConfig(vision=vision, llm=llm, projector=projector, moe=moe)
    try:
        model.validate()
    except ConfigError as error:
        raise ConversionError(f"{where}: {error}") from error
    router_rows = _router_rows(sources.router) if sources.router else []
    if moe and sources.router:
        model = _place_router(model, sources.router, router_rows, pieces, report)
        router_rows = []
    elif sources.router:
        pieces |= collect(sources.router, report)
    rows = table(model, PARTS) + router_rows
    if sources.router is None and (where.parent / "router.pth").is_file():
        report.notes.append("router.pth beside the weights is not used; give it with --router")
    external = sources.vision is not None and sources.vision.weights is not None
    return Plan(
        stage=_stage(sources, model),
        model=model,
        rows=rows,
        pieces=pieces,
        tower=tower if external else {},
        external=external,
        fresh=fresh,
    )


def _place_vision(
    sources: Sources, pieces: dict[str, list[Piece]], tower: dict[str, Piece], report: Report
) -> VisionConfig:
    """Chooses the vision tower's weights: the CLIP folder's, else those in the checkpoint."""
    config = sources.config or {}
    given = config.get("mm_vision_select_layer", -2)
    select = int(number(given, "mm_vision_select_layer", sources.config_file))
    folder = sources.vision
    if folder and folder.weights:
        for key in tower:
            del pieces[key]
        pieces |= collect(folder.weights, report)
        report.notes.append(f"vision tower: {folder.path}")
        return read_tower(folder, select)
    named = config.get("mm_image_tower")
    if not tower:
        raise ConversionError(
            f"{sources.config_file}: mm_image_tower {named!r} is not a folder here, and the "
            "checkpoint holds no vision tower; give the CLIP folder with --vision"
        )
    report.notes.append(
        f"vision tower: the one inside the checkpoint, since mm_image_tower {named!r} is not a "
        "folder here (the official code would refuse; --vision gives another)"
    )
    if folder:
        return read_tower(folder, select)
    return _infer_vision(tower, select, report)


def _infer_vision(tower: dict[str, Piece], select: int, report: Report) -> VisionConfig:
    """Shapes of a CLIP tower of which only the weights are known."""
    root = f"{TOWER}vision_model."
    shapes = {key.removeprefix(root): piece.info.shape for key, piece in tower.items()}
    layers = sum(
        key.startswith("encoder.layers.") and key.endswith(".mlp.fc1.bias") for key in shapes
    )
    try:
        width, _, patch, _ = shapes["embeddings.patch_embedding.weight"]
        patches = shapes["embeddings.position_embedding.weight"][0] - 1
        ffn = shapes["encoder.layers.0.mlp.fc1.bias"][0]
    except (KeyError, ValueError) as error:
        file = next(iter(tower.values())).info.file
        raise ConversionError(
            f"{file}: the vision tower is incomplete ({error}); give the CLIP folder with --vision"
        ) from error
    if width % 64 or width < 512:
        raise ConversionError(
            f"the number of heads of a vision tower of width {width} cannot be told from its "
            "weights; give the CLIP folder with --vision (its config.json alone is enough)"
        )
    side = math.isqrt(patches)
    vision = VisionConfig(
        image_size=side * patch,
        patch_size=patch,
        width=width,
        layers=layers,
        heads=width // 64,
        ffn=ffn,
        select_layer=select,
    )
    report.notes.append(
        f"vision tower: {vision.heads} heads and quick_gelu taken for granted, as in OpenAI's "
        "CLIP models"
    )
    return vision


def _place_router(
    model: ModelConfig,
    weights: Weights,
    router_rows: list[Row],
    pieces: dict[str, list[Piece]],
    report: Report,
) -> ModelConfig:
    """Puts the router of a file into every MoE layer; returns the shapes with its depth."""
    assert model.moe
    file = next(iter(weights.files))
    experts = router_rows[-1].shape[0]
    if experts != model.moe.experts:
        raise ConversionError(
            f"{file}: the router has {experts} outputs, the model {model.moe.experts} experts; "
            "give a router made for it"
        )
    for row in table(model, ["llm"]):
        if row.path.startswith(_ROUTER):
            leave_out(pieces, row.key, "replaced by the router file", report)
    model = replace(model, moe=replace(model.moe, router_layers=len(router_rows) // 2))
    found = collect(weights, report)
    keys = {row.path.removeprefix("router/"): row.key for row in router_rows}
    for row in table(model, ["llm"]):
        if row.path.startswith(_ROUTER):
            pieces[row.key] = found.get(keys[row.path.removeprefix(_ROUTER)], [])
    return model


def _router_rows(weights: Weights) -> list[Row]:
    """The table of a router file, of its sizes. Raises ConversionError where it is no router."""
    file = next(iter(weights.files))
    first = weights.infos.get("fc1.weight")
    layers = sum(key.endswith(".weight") for key in weights.infos)
    last = weights.infos.get(f"fc{layers}.weight")
    if first is None or last is None or len(first.shape) != 2 or len(last.shape) != 2 or layers > 3:
        raise ConversionError(
            f"{file}: is not a router (fc1.weight and fc1.bias, up to fc3); it has "
            f"{sorted(weights.infos)[:6]}"
        )
    return router_table(first.shape[1], last.shape[0], layers)


def _stage(sources: Sources, model: ModelConfig) -> str:
    """The stage that a whole model has reached."""
    if model.moe:
        return "stage3"
    if sources.router:
        return "router"
    if sources.kind == "llm" and sources.projector is None:
        return "base"
    # a stage-2 folder has no projector file; a stage-1 folder by `to-torch` has it and the weights
    projector_file = (sources.config_file.parent / PROJECTOR_FILE).is_file()
    return "stage2" if sources.kind == "official" and not projector_file else "stage1"


def _check(plan: Plan) -> None:
    """Raises ConversionError where a tensor is missing, unknown, misshapen or of a wrong dtype."""
    problems: list[str] = []
    llm = plan.model.llm
    known = {row.key for row in plan.rows}
    files = sorted({p.info.file for found in plan.pieces.values() for p in found})
    searched = ", ".join(map(str, files[:4])) + (", ..." if len(files) > 4 else "")
    for row in plan.rows:
        found = plan.pieces.get(row.key, [])
        if not found and not (plan.fresh and row.key.startswith(PROJECTOR)):
            problems.append(
                f"{searched}: key {row.key!r} of shape {list(row.shape)} is missing; the download "
                "is incomplete, or config.json belongs to other weights"
            )
        problems += [text for piece in found if (text := _mismatch(piece, row, llm))]
    for key, found in plan.pieces.items():
        if key not in known:
            problems += [
                f"{piece.info.file}: key {piece.info.key!r} of shape {list(piece.info.shape)} is "
                "not part of the model that config.json describes; use the config.json of these "
                "weights"
                for piece in found
            ]
    raise_all("the weights do not fit the configuration", problems)


def _mismatch(piece: Piece, row: Row, llm: LlmConfig) -> str | None:
    """What is wrong with a tensor; None where it fits its row."""
    info = piece.info
    if piece.shape(llm) != row.shape:
        part = f" (with {row.key!r} of shape {list(row.shape)} in it)" if piece.slice else ""
        expected = "another first axis" if piece.slice else str(list(row.shape))
        return (
            f"{info.file}: key {info.key!r} has shape {list(info.shape)}, config.json asks for "
            f"{expected}{part}; use the config.json of these weights"
        )
    if info.dtype not in FLOATS:
        return (
            f"{info.file}: key {info.key!r} has dtype {info.dtype}; {', '.join(FLOATS)} are read: "
            "save the checkpoint in one of them"
        )
    return None
