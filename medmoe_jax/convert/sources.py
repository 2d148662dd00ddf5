"""Finds out what the files given to `to-jax` are, and opens them.

Paths inside a configuration are followed where that is safe and plain: an absolute one that exists,
and a relative one inside the checkpoint's own folder. Everything else has to be given on the
command line.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from medmoe_jax.checkpoint import FORMAT, read_json
from medmoe_jax.config import VisionConfig
from medmoe_jax.convert.configs import (
    CLIP_TYPES,
    PLAIN_TYPES,
    family,
    read_mean_std,
    read_vision,
)
from medmoe_jax.convert.report import ConversionError, raise_all
from medmoe_jax.convert.torch_files import Weights, open_weights

PROJECTOR_FILE = "mm_projector.bin"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class Folder:
    """An opened checkpoint folder; `weights` is None where it has a configuration only."""

    path: Path
    config: dict[str, Any]
    weights: Weights | None

    @property
    def config_file(self) -> Path:
        """Its `config.json`."""
        return self.path / "config.json"


@dataclass(frozen=True)
class Sources:
    """Everything that one model folder is made from.

    Attributes:
      kind: what SRC is: "official" (Med-MoE with weights), "stage1" (Med-MoE, projector only),
        "llm", "clip", "router".
      llm: where the language model's weights are.
      vision: the CLIP folder; None where there is none.
      projector: a projector file that is used instead of the checkpoint's projector.
      router: a router file.
      config: the configuration that is kept for export; None for a router.
      config_file: where `config` was read.
      tokenizer: folder with tokenizer files; None where there is none.
    """

    kind: str
    llm: Folder | None
    vision: Folder | None
    projector: Weights | None
    router: Weights | None
    config: dict[str, Any] | None
    config_file: Path
    tokenizer: Path | None


def find_sources(
    src: Path,
    vision: Path | None,
    llm: Path | None,
    projector: Path | None,
    router: Path | None,
    tokenizer: Path | None,
) -> Sources:
    """Recognises and opens the sources; arguments as of `to_jax`.

    Raises:
      ConversionError: not a known kind of checkpoint, parts that do not go together, or files that
        cannot be read.
    """
    if src.is_file():
        others = {"vision": vision, "llm": llm, "projector": projector, "router": router}
        problems = [
            f"{src} is a router file; --{n} does not go with it" for n, v in others.items() if v
        ]
        raise_all("the parts do not go together", problems)
        return Sources("router", None, None, None, Weights([src]), None, src, None)
    source = open_folder(src)
    kind = _kind(source)
    tower = vision
    if tower is None and kind in ("official", "stage1"):
        tower = named_tower(source)
    problems = _misfits(source, kind, vision, llm, projector, router)
    if kind == "stage1" and tower is None:
        problems.append(
            f"{source.config_file}: mm_image_tower {source.config.get('mm_image_tower')!r} is not "
            "a folder here; give the CLIP folder with --vision"
        )
    raise_all("the parts do not go together", problems)
    if kind == "clip":
        return Sources(kind, None, source, None, None, source.config, source.config_file, None)
    base = source if kind != "stage1" else open_folder(llm or src)
    if kind == "stage1":
        if base.weights is None:
            raise ConversionError(
                f"{base.path}: holds no weights; --llm needs the base model's folder"
            )
        if projector is None:
            projector = src / PROJECTOR_FILE
    return Sources(
        kind,
        base,
        open_folder(tower) if tower else None,
        Weights([_projector_file(projector)]) if projector else None,
        Weights([_existing(router)]) if router else None,
        source.config,
        source.config_file,
        _tokenizer(tokenizer, [src, *([llm] if llm else [])]),
    )


def open_folder(path: Path) -> Folder:
    """Opens a checkpoint folder. Raises ConversionError where it has no `config.json`."""
    if not (path / "config.json").is_file():
        what = "has no config.json" if path.is_dir() else "does not exist"
        raise ConversionError(
            f"{path}: {what}; a checkpoint folder holds config.json beside its weights"
        )
    return Folder(path, read_json(path / "config.json", ConversionError), open_weights(path))


def read_tower(folder: Folder, select_layer: int = -2) -> VisionConfig:
    """Shapes of the vision tower that a CLIP folder describes, and how it wants its images.

    Args:
      folder: with or without weights.
      select_layer: hidden state that the language model sees.

    Raises:
      ConversionError: as `configs.read_vision` and `configs.read_mean_std`.
    """
    vision = read_vision(folder.config, folder.config_file, select_layer)
    mean, std = read_mean_std(*image_settings(folder.path))
    return replace(vision, mean=mean, std=std)


def image_settings(folder: Path) -> tuple[dict[str, Any], Path]:
    """The image settings in a CLIP folder, {} where there are none, and the file they are in.

    Raises ConversionError where the file is no JSON object.
    """
    file = folder / "preprocessor_config.json"
    if file.is_file():
        return read_json(file, ConversionError), file
    file = folder / "processor_config.json"  # newer releases keep them inside this one
    if file.is_file():
        return read_json(file, ConversionError).get("image_processor") or {}, file
    return {}, file


def named_tower(source: Folder) -> Path | None:
    """The CLIP folder that a Med-MoE configuration names, where it can be followed."""
    named = source.config.get("mm_image_tower")
    if not isinstance(named, str) or not named:
        return None
    path = Path(named)
    if not path.is_absolute() and ".." in path.parts:
        return None
    path = source.path / path  # an absolute path stays what it is
    return path if (path / "config.json").is_file() else None


def _kind(source: Folder) -> str:
    """What the folder SRC is."""
    model_type = source.config.get("model_type")
    if source.config.get("format") == FORMAT:
        raise ConversionError(f"{source.path}: is a model folder of this project already")
    if model_type in CLIP_TYPES:
        if source.weights is None:
            raise ConversionError(
                f"{source.path}: holds no weights (model.safetensors or pytorch_model.bin)"
            )
        return "clip"
    family(source.config, source.config_file)  # raises on an unknown one
    if source.weights is None:
        if (source.path / PROJECTOR_FILE).is_file():
            return "stage1"
        raise ConversionError(
            f"{source.path}: holds no weights (model.safetensors, pytorch_model.bin, their "
            f"indices, or {PROJECTOR_FILE})"
        )
    return "llm" if model_type in PLAIN_TYPES else "official"


def _misfits(
    source: Folder,
    kind: str,
    vision: Path | None,
    llm: Path | None,
    projector: Path | None,
    router: Path | None,
) -> list[str]:
    """What is given but cannot be used, or needed but not given."""
    problems: list[str] = []
    src = source.path
    if kind == "stage1" and llm is None:
        problems.append(
            f"{src}: holds a projector only; give the base language model's folder with --llm"
        )
    if kind != "stage1" and llm is not None:
        problems.append(
            f"{src}: has a language model or is none; --llm goes with a stage-1 folder only"
        )
    if kind == "clip":
        for name, value in (("vision", vision), ("projector", projector), ("router", router)):
            if value is not None:
                problems.append(
                    f"{src}: is a CLIP folder; give the language model as SRC and this one as "
                    f"--vision, then --{name}"
                )
    if kind == "llm" and vision is None:
        for name, value in (("projector", projector), ("router", router)):
            if value is not None:
                problems.append(f"{src}: is a language model alone; --{name} needs --vision too")
    return problems


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ConversionError(f"{path}: does not exist, or is no file")
    return path


def _projector_file(path: Path) -> Path:
    """The projector file: the path itself, or the usual file in that folder."""
    return _existing(path / PROJECTOR_FILE if path.is_dir() else path)


def _tokenizer(given: Path | None, candidates: list[Path]) -> Path | None:
    """Folder to take tokenizer files from. Raises ConversionError where the given one has none."""
    if given is None:
        return next((path for path in candidates if tokenizer_files(path)), None)
    if not tokenizer_files(given):
        raise ConversionError(
            f"{given}: holds no tokenizer files ({', '.join(TOKENIZER_FILES[:2])}, ...)"
        )
    return given


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer files in a folder; code that some repositories keep beside them is left out."""
    if not folder.is_dir():
        return []
    named = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    return named + sorted(folder.glob("*.tiktoken"))
