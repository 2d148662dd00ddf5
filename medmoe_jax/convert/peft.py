"""A folder of adapters to an adapter folder of the library `peft`, and back.

`adapter_config.json` names the modules of the official PyTorch model one by one, and
`adapter_model.safetensors` holds `lora_A` [r, in] and `lora_B` [out, r] of each. The rows of the
conversion table say which place of which leaf a module is. `peft` itself is not needed.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np

from medmoe_jax import lora
from medmoe_jax.checkpoint import Delta, open_model, read_json, read_meta, read_params, save_model
from medmoe_jax.config import LoraConfig, ModelConfig
from medmoe_jax.convert.report import ConversionError, Report, raise_all
from medmoe_jax.convert.table import Row, table
from medmoe_jax.convert.to_jax import check_empty, nest, whole_or_nothing
from medmoe_jax.convert.to_torch import flatten
from medmoe_jax.convert.torch_files import Weights
from medmoe_jax.convert.torch_output import NewTensor, write_safetensors

CONFIG, WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."  # of all keys: the model inside of peft's two wrappers
FACTORS = {lora.A: "lora_A.weight", lora.B: "lora_B.weight"}
# Settings that would mean more than y = x W + scale x A B, unless empty.
BEYOND = (
    *("fan_in_fan_out", "modules_to_save", "rank_pattern", "alpha_pattern", "use_dora"),
    *("lora_bias", "layer_replication", "trainable_token_indices", "target_parameters"),
    *("alora_invocation_tokens", "megatron_config", "use_qalora", "use_bdlora", "velora_config"),
    *("monteclora_config", "arrow_config", "kasa_config"),
)
# Starting values that leave the model's own weights alone.
STARTS = (True, False, "gaussian", "orthogonal", "eva")


def to_peft(src: str | Path, dst: str | Path) -> Report:
    """Writes adapters as an adapter folder of `peft`.

    The folder belongs to the model that `python -m medmoe_jax.lora base` writes, in PyTorch.

    Args:
      src: model folder of a run with config.lora.rank.
      dst: folder to write; must not exist, or be empty.

    Returns:
      What was done, to be printed.

    Raises:
      ConversionError: `src` holds no adapters, or others than its config.json says.
    """
    src, dst = Path(src), Path(dst)
    check_empty(dst)
    meta = read_meta(src)
    if meta.delta is None:
        raise ConversionError(f"{src} holds no adapters; `to-torch` converts a whole model")
    params, settings = read_params(src), meta.delta.lora
    leaves = flatten(params)
    rows = [row for row in _modules(meta.model) if _beside(row, lora.A) in leaves]
    tensors = [
        _tensor(leaves[_beside(row, name)][row.index], f"{PREFIX}{_module(row)}.{theirs}")
        for row in rows
        for name, theirs in FACTORS.items()
    ]
    alpha = settings.scale * settings.rank
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": settings.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": settings.dropout,
        "target_modules": [_module(row) for row in rows],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with whole_or_nothing(dst):
        dst.mkdir(parents=True, exist_ok=True)
        write_safetensors(dst / WEIGHTS[0], tensors)
        (dst / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    report = Report(f"to-peft {src} -> {dst}", stage=meta.stage, converted=len(tensors))
    report.parameters = {"adapters": sum(math.prod(tensor.shape) for tensor in tensors)}
    if "router" in params:
        report.notes.append("the router is not part of it: `lora base` writes it with its model")
    return report


def from_peft(src: str | Path, dst: str | Path, base: str | Path) -> Report:
    """Reads an adapter folder of `peft` as adapters of a model folder.

    Modules of a kind (say, one expert's fc1) that the folder leaves out get an adapter that adds
    nothing, if others of the kind have one.

    Args:
      src: folder with adapter_config.json and adapter_model.safetensors (or .bin).
      dst: folder to write; must not exist, or be empty.
      base: model folder of the model that the adapters belong to.

    Returns:
      What was done, to be printed.

    Raises:
      ConversionError: settings that are more than LoRA on matrices, or tensors that are not of
        this model; with every problem found.
    """
    src, dst, base = Path(src), Path(dst), Path(base)
    check_empty(dst)
    settings = _read_settings(src)
    file = next((src / name for name in WEIGHTS if (src / name).is_file()), None)
    if file is None:
        raise ConversionError(f"{src}: holds neither {' nor '.join(WEIGHTS)}; get the folder again")
    weights, meta = Weights([file]), read_meta(base)
    if meta.delta is not None:
        raise ConversionError(f"{base} holds adapters itself; merge them first (medmoe_jax.lora)")
    leaves, empty = _read_leaves(weights, meta.model, settings.rank, str(file))
    paths = [path.rpartition("/")[0] + "/kernel" for path in leaves]
    kinds = [name for name in lora.TARGETS if any(lora.is_target(name, path) for path in paths)]
    known = lora.fingerprint(open_model(base)[0])
    chosen = dataclasses.replace(settings, targets=tuple(kinds))
    delta = Delta(str(base.absolute()), known, "paper", chosen)
    line = f"LoRA of rank {settings.rank} from the peft folder {src.name}"
    new = dataclasses.replace(meta, history=[*meta.history, line], delta=delta)
    with whole_or_nothing(dst):
        save_model(dst, nest(leaves), new, assets_from=base)
    report = Report(f"from-peft {src} -> {dst}", stage=meta.stage, converted=len(weights.infos))
    report.parameters = {"adapters": sum(leaf.size for leaf in leaves.values())}
    if empty:
        report.notes.append(f"{empty} modules without an adapter got one that adds nothing")
    return report


def _tensor(array: np.ndarray, key: str) -> NewTensor:
    return NewTensor(key, "float32", array.T.shape, lambda: array.T)


def _modules(model: ModelConfig) -> list[Row]:
    """Rows of the weights of all modules that can have an adapter."""
    rows = table(model, ("llm",))
    return [row for row in rows if any(lora.is_target(name, row.path) for name in lora.TARGETS)]


def _module(row: Row) -> str:
    return row.key.removesuffix(".weight")


def _beside(row: Row, name: str) -> str:
    return row.path.removesuffix("kernel") + name


def _read_settings(src: Path) -> LoraConfig:
    """Rank, alpha and dropout. Raises ConversionError on what cannot be expressed here."""
    file = src / CONFIG
    data = read_json(file, ConversionError)
    if data.get("peft_type") != "LORA":
        raise ConversionError(f"{file}: peft_type is {data.get('peft_type')!r}; LORA can be read")
    problems = [
        f"{name} is {data[name]!r}; only adapters without it can be read"
        for name in BEYOND
        if data.get(name)
    ]
    if data.get("bias", "none") != "none":
        problems.append(f"bias is {data['bias']!r}; only 'none' can be read")
    if data.get("init_lora_weights", True) not in STARTS:
        problems.append(
            f"init_lora_weights is {data['init_lora_weights']!r}, which changes the model's own "
            "weights; convert it to plain LoRA with peft first (path_initial_model_for_weight_"
            "conversion)"
        )
    rank, alpha = data.get("r"), data.get("lora_alpha")
    dropout = data.get("lora_dropout", 0.0)
    if not isinstance(rank, int) or rank < 1:
        problems.append(f"r is {rank!r}; a rank of 1 or more is needed")
    if not isinstance(alpha, int | float) or alpha <= 0:
        problems.append(f"lora_alpha is {alpha!r}; a number above 0 is needed")
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        problems.append(f"lora_dropout is {dropout!r}; a number in [0, 1) is needed")
    raise_all(f"{file} cannot be expressed", problems)
    assert isinstance(rank, int) and isinstance(alpha, int | float)
    # Rank-stabilised adapters are scaled by alpha / sqrt(r).
    alpha = alpha * math.sqrt(rank) if data.get("use_rslora") else alpha
    return LoraConfig(rank, float(alpha), float(dropout))


def _read_leaves(
    weights: Weights, model: ModelConfig, rank: int, file: str
) -> tuple[dict[str, np.ndarray], int]:
    """Adapter leaves by path, and how many modules of theirs the file leaves out."""
    places = {
        f"{PREFIX}{_module(row)}.{theirs}": (row, name)
        for row in _modules(model)
        for name, theirs in FACTORS.items()
    }
    problems, leaves, found = [], {}, set()
    stacks: dict[str, tuple[int, ...]] = {}
    for row, _ in places.values():
        last = stacks.get(row.path, row.index)
        stacks[row.path] = tuple(map(max, last, row.index))
    for key, info in weights.infos.items():
        row, name = places.get(key, (None, ""))
        if row is None:
            problems.append(f"{key!r} belongs to no module of this model that can have an adapter")
            continue
        out, inp = row.shape
        shape = (rank, inp) if name == lora.A else (out, rank)
        other = f"{PREFIX}{_module(row)}.{FACTORS[lora.B if name == lora.A else lora.A]}"
        if tuple(info.shape) != shape:
            problems.append(f"{key!r} has shape {list(info.shape)}, {list(shape)} is needed")
        if other not in weights.infos:
            problems.append(f"{other!r} is missing")
        path = _beside(row, name)
        if path not in leaves:
            stack = tuple(n + 1 for n in stacks[row.path])
            leaves[path] = np.zeros((*stack, *shape[::-1]), np.float32)
        if not problems:
            leaves[path][row.index] = weights.read(key).T.astype(np.float32)
        found.add(_module(row))
    if not weights.infos:
        problems.append("it holds no tensor")
    raise_all(f"{file} does not fit the model", problems)
    mine = [row for row in _modules(model) if _beside(row, lora.A) in leaves]
    return leaves, len(mine) - len(found)
