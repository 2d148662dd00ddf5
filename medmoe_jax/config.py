"""Dataclass schema of a model and of a run: every setting, its unit and its default.

`ModelConfig` describes shapes and is hashable, so it can be a static argument of `jax.jit`.
`RunConfig` describes one training phase; the files in `configs/` fill it in. Model sizes by name:
`medmoe_jax/presets.py`.
"""

# No `from __future__ import annotations`: command-line overrides read the types of the fields.

import argparse
import dataclasses
from dataclasses import dataclass, field
from typing import Any, Self

PLACEMENTS = ("sparse", "first_half", "second_half", "dense")
MODALITIES = ("CT", "MRI", "X-ray", "Pathology")
ROUTINGS = ("router", "random", "uniform")
FRESH = "fresh"  # config.router: a random router instead of a pretrained one


class ConfigError(ValueError):
    """A setting that cannot work; the message names it and says what to write instead."""


def natural(text: str) -> int:
    """A whole number of 0 or more on a command line, such as a seed: a type of `argparse`."""
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{number} is below 0; give 0 or more")
    return number


def _check_numbers(part: str, config: Any) -> None:
    """Raises ConfigError where a number of `config` is none, a whole one is below 1, or another one
    below 0; where some have limits of their own, only the kind is checked here."""
    for one in dataclasses.fields(config):
        if one.type not in (int, float):
            continue
        value: Any = getattr(config, one.name)
        kind, least = ("whole number", 1) if one.type is int else ("number", 0)
        fits = isinstance(value, (int, one.type)) and not isinstance(value, bool)
        free = one.name in ("select_layer", "experts", "top_k")
        if not fits or not (free or value >= least):
            wanted = kind if free else f"{kind}, {least} or more"
            raise ConfigError(f"{part}: {one.name} is {value!r}; it must be a {wanted}")


@dataclass(unsafe_hash=True)
class VisionConfig:
    """CLIP vision tower (ViT). Defaults: CLIP ViT-L/14 at 336 pixels."""

    image_size: int = 336  # pixels, height = width
    patch_size: int = 14  # pixels
    width: int = 1024
    layers: int = 24
    heads: int = 16
    ffn: int = 4096
    norm_eps: float = 1e-5
    activation: str = "quick_gelu"  # quick_gelu | gelu
    select_layer: int = -2  # hidden state that is the feature; -1 = output of the last layer
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)  # of a channel, pixels in 0..1
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    @property
    def patches(self) -> int:
        """Image tokens of one image (class token not counted)."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def layers_run(self) -> int:
        """How many layers are computed to reach the selected hidden state (hidden state 0 =
        embeddings).
        """
        return self.select_layer if self.select_layer >= 0 else self.layers + 1 + self.select_layer

    def validate(self) -> None:
        """Raises ConfigError where the sizes do not fit together."""
        _check_numbers("vision", self)
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"vision: image_size {self.image_size} is not a multiple of patch_size "
                f"{self.patch_size}"
            )
        if self.width % self.heads:
            raise ConfigError(f"vision: width {self.width} is not a multiple of heads {self.heads}")
        if not 0 <= self.layers_run <= self.layers:
            raise ConfigError(
                f"vision: select_layer {self.select_layer} does not exist in {self.layers} layers"
            )


@dataclass(unsafe_hash=True)
class LlmConfig:
    """Decoder-only language model. Defaults: Phi-2."""

    family: str = "phi"  # phi (parallel block, biases) | stablelm (sequential block, SwiGLU)
    vocab: int = 51200  # words, also rows of the embedding
    width: int = 2560
    layers: int = 32
    ffn: int = 10240
    heads: int = 32
    kv_heads: int = 32
    rotary_fraction: float = 0.4  # share of the head dimension that is rotated
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    qkv_bias: bool = True  # phi: always; stablelm: a setting
    lm_head_bias: bool = False  # True only in a plain Phi checkpoint; Med-MoE has none
    max_positions: int = 2048

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.width // self.heads

    @property
    def rotary_dim(self) -> int:
        """Leading dimensions of a head that are rotated."""
        return int(self.rotary_fraction * self.head_dim)

    def validate(self) -> None:
        """Raises ConfigError where the sizes do not fit together."""
        _check_numbers("llm", self)
        if self.family not in ("phi", "stablelm"):
            raise ConfigError(f"llm: family {self.family!r} is unknown; use 'phi' or 'stablelm'")
        if self.width % self.heads or self.heads % self.kv_heads:
            raise ConfigError(
                f"llm: width {self.width}, heads {self.heads} and kv_heads {self.kv_heads} must "
                "divide one another in turn"
            )
        if (share := self.rotary_fraction) > 1:
            raise ConfigError(f"llm: rotary_fraction is {share}; it is a share, 0 to 1")
        if self.rotary_dim % 2:
            raise ConfigError(
                f"llm: rotary_fraction {self.rotary_fraction} gives an odd number "
                f"({self.rotary_dim}) of dimensions"
            )


@dataclass(unsafe_hash=True)
class MoeConfig:
    """Mixture of experts in place of the FFN of some layers (paper equation 4)."""

    experts: int = 4
    top_k: int = 1  # 1: weight = softmax probability; 2: the two weights sum to one
    placement: str = "sparse"  # sparse | first_half | second_half | dense | explicit, as in "0,3,5"
    meta: bool = True  # the meta expert, always on and unweighted
    use_residual: bool = False  # official option: c0 * routed + c1 * meta + meta, c learned
    aux_coef: float = 0.0  # coefficient of the load-balancing loss; 0 = off
    router_layers: int = 1  # linear layers of the router: 1 (official), 2 or 3
    noise: bool = False  # Gumbel noise on the second choice, in training only
    routing: str = "router"  # router | random | uniform: who decides (`moe.reassigned`)

    @property
    def active(self) -> int:
        """Experts that work on a token, the meta expert not counted."""
        return self.experts if self.routing == "uniform" else self.top_k

    def layers(self, n_layers: int) -> tuple[int, ...]:
        """Indices of the MoE layers in a decoder of `n_layers` layers, ascending.

        Raises:
          ConfigError: unknown placement, or an index that is out of range or doubled.
        """
        half = n_layers // 2
        named = {
            "sparse": range(0, n_layers, 2),
            "first_half": range(half),
            "second_half": range(half, n_layers),
            "dense": range(n_layers),
        }
        if self.placement in named:
            return tuple(named[self.placement])
        try:
            indices = tuple(int(i) for i in self.placement.split(","))
        except ValueError:
            raise ConfigError(
                f"moe.placement {self.placement!r} is unknown; use one of {', '.join(PLACEMENTS)} "
                "or indices like '0,3,5'"
            ) from None
        if len(set(indices)) != len(indices) or not all(0 <= i < n_layers for i in indices):
            raise ConfigError(
                f"moe.placement {self.placement!r}: indices must be different and below {n_layers}"
            )
        return tuple(sorted(indices))

    def validate(self, n_layers: int) -> None:
        """Raises ConfigError where the settings do not fit together."""
        _check_numbers("moe", self)
        if not self.layers(n_layers):
            raise ConfigError(f"moe.placement {self.placement!r} is none of {n_layers} layer(s)")
        if self.experts < 2:
            raise ConfigError(f"moe.experts is {self.experts}; a mixture needs at least 2")
        if self.top_k not in (1, 2):
            raise ConfigError(f"moe.top_k is {self.top_k}; 1 and 2 are defined")
        if self.routing not in ROUTINGS:
            raise ConfigError(
                f"moe.routing {self.routing!r} is unknown; use one of {', '.join(ROUTINGS)}"
            )
        if self.router_layers not in (1, 2, 3):
            raise ConfigError(f"moe.router_layers is {self.router_layers}; use 1, 2 or 3")
        if self.use_residual and not self.meta:
            raise ConfigError("moe.use_residual mixes in the meta expert; set moe.meta=True")


@dataclass(unsafe_hash=True)
class ModelConfig:
    """All shapes of one Med-MoE model."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    llm: LlmConfig = field(default_factory=LlmConfig)
    projector: str = "mlp2x_gelu"  # linear | mlpNx_gelu
    moe: MoeConfig | None = None  # None: a dense model (stages 1 and 2)

    @property
    def projector_layers(self) -> int:
        """Linear layers of the projector. Raises ConfigError on an unknown name."""
        if self.projector == "linear":
            return 1
        depth = str(self.projector).removeprefix("mlp").removesuffix("x_gelu")
        if self.projector == f"mlp{depth}x_gelu" and depth.isdigit() and int(depth) > 0:
            return int(depth)
        raise ConfigError(
            f"projector {self.projector!r} is unknown; use 'linear' or 'mlpNx_gelu', as in "
            "'mlp2x_gelu'"
        )

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the decoder's MoE layers; empty in a dense model."""
        return self.moe.layers(self.llm.layers) if self.moe else ()

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """Indices of the decoder's layers that have a plain FFN."""
        return tuple(i for i in range(self.llm.layers) if i not in self.moe_layers)

    def validate(self) -> Self:
        """Returns self. Raises ConfigError where the settings do not fit together."""
        self.vision.validate()
        self.llm.validate()
        _ = self.projector_layers
        if self.moe:
            self.moe.validate(self.llm.layers)
        return self


def model_to_dict(config: ModelConfig) -> dict[str, Any]:
    """Plain nested dict of a ModelConfig, for JSON."""
    return dataclasses.asdict(config)


def model_from_dict(data: dict[str, Any]) -> ModelConfig:
    """Inverse of `model_to_dict`. Raises ConfigError on unknown or missing parts."""
    try:
        moe = data.get("moe")
        vision: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in data["vision"].items()
        }
        return ModelConfig(
            vision=VisionConfig(**vision),
            llm=LlmConfig(**data["llm"]),
            projector=data["projector"],
            moe=MoeConfig(**moe) if moe else None,
        ).validate()
    except (KeyError, TypeError) as error:
        raise ConfigError(f"not a medmoe_jax model description: {error}") from error


@dataclass(unsafe_hash=True)
class ViewConfig:
    """What is shown of a DICOM or NIfTI file; other images are shown as they are."""

    window: str = ""  # "" = the file's own | file:1 (its second) | rgb | lung ... | LOW:HIGH
    slice: int = -1  # slice of a volume or frame of a DICOM file, from 0; -1 = the middle one
    axis: str = "axial"  # axial | coronal | sagittal: how a volume is cut


@dataclass
class DataConfig:
    """What is read and how it becomes batches."""

    files: tuple[str, ...] = ()  # JSON, JSONL (LLaVA-Med's, Med-MoE's, prepared) or record folders
    weights: tuple[float, ...] = ()  # share of each file in an epoch; () = every row once
    image_folder: str = ""  # paths in the files are relative to it; "" = `images` beside each file
    eval_files: tuple[str, ...] = ()  # held-out rows: router accuracy (router phase)
    template: str = "phi"  # phi | stablelm | plain
    image_aspect: str = "pad"  # pad (to a square) | square (centre crop only, as CLIP)
    view: ViewConfig = field(default_factory=ViewConfig)  # of DICOM and NIfTI files
    max_length: int = 2048  # tokens of a row; a sample, images expanded, that is longer is an error
    batching: str = "group"  # shuffle | group (rows of like length) | pack (several samples a row)
    buckets: tuple[int, ...] = ()  # tokens: lengths that batches are padded to; () = chosen
    most_buckets: int = 6  # how many to choose; each is a compilation
    workers: int = 0  # processes that read ahead; 0 = in the main process
    on_error: str = "error"  # error | skip: what a bad row does
    labels_per_modality: int = 0  # router phase: rows drawn for each modality; 0 = all


@dataclass
class OptimConfig:
    """AdamW and its schedule (paper Tables 12, 13)."""

    lr: float = 2e-5  # peak learning rate
    warmup: float = 0.03  # share of all steps
    schedule: str = "cosine"  # cosine | constant
    epochs: float = 1.0
    steps: int = 0  # optimiser steps; 0 = from epochs
    batch_size: int = 128  # rows of one optimiser step, over all devices and accumulation
    accumulate: int = 1  # micro-batches of one optimiser step
    weight_decay: float = 0.0  # of all that trains but biases and norms
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float = 0.0  # largest norm of the trainable gradient; 0 = no clipping


@dataclass
class LoraConfig:
    """Low-rank adapters (LoRA): they alone train, beside frozen weights."""

    rank: int = 0  # of the adapters, 1 or more; 0 = none, `train` says which weights train whole
    alpha: float = 0.0  # what an adapter adds is multiplied by alpha / rank; 0 = twice the rank
    dropout: float = 0.05  # share of an adapter's input that is dropped in training
    targets: tuple[str, ...] = ()  # experts, meta, mlp, attention; () = those that `train` covers

    @property
    def scale(self) -> float:
        """What an adapter's output is multiplied by."""
        return (self.alpha or 2.0 * self.rank) / self.rank


@dataclass
class MeshConfig:
    """Devices along each axis; -1 fills one axis with what is left."""

    data: int = -1
    fsdp: int = 1
    expert: int = 1


@dataclass
class ClusterConfig:
    """How the processes of one run find each other (`distributed.join`)."""

    join: str = "auto"  # auto: where SLURM, Open MPI, GKE or a TPU pod started several; yes; no
    coordinator: str = ""  # host:port of process 0; "" = the cluster says
    processes: int = 0  # with coordinator: how many there are
    process: int = 0  # with coordinator: number of this one
    heartbeat: int = 100  # seconds without a sign of life after which the others stop


@dataclass
class LogConfig:
    """What is written, and how often."""

    every: int = 10  # steps between lines in metrics.jsonl and TensorBoard
    save_every: int = 500  # steps between checkpoints
    keep: int = 2  # checkpoints kept
    tensorboard: bool = True
    profile_steps: tuple[int, ...] = ()  # (first, last): a trace of these steps in workdir/profile


@dataclass
class EvaluationConfig:
    """Questions answered and scored during training, as `predict` and `evaluate` do."""

    every: int = 0  # steps between two evaluations, the last step always; 0 = none
    file: str = ""  # questions with answers, JSON or JSONL
    split: str = "val"  # name of the figures: "val/closed accuracy"
    image_folder: str = ""  # "" = data.image_folder
    rows: int = 0  # most questions, from the start of the file; 0 = all
    batch_size: int = 16
    max_new_tokens: int = 64


@dataclass
class RunConfig:
    """One training phase."""

    phase: str = "stage3"  # a name for the logs
    init: str = ""  # model folder to start from: `convert to-jax`, or `model` of an earlier phase
    router: str = ""  # stage 3, instead of the router in `init`: .pth, model folder or "fresh"
    model: ModelConfig = field(default_factory=ModelConfig)
    upcycle: str = "paper"  # stage 3, how experts start: paper | function_preserving
    objective: str = "answer"  # answer (next token) | router (modality)
    router_level: str = "token"  # router phase: label every token | the sample's mean score
    train: tuple[str, ...] = ()  # regexes of the parameters that train; everything else is frozen
    lora: LoraConfig = field(default_factory=LoraConfig)  # train adapters on those instead
    official_aux: bool = False  # count padding in the load-balancing loss, as the official code
    compute_dtype: str = "bfloat16"
    frozen_dtype: str = "bfloat16"  # of frozen weights; int8, int4: of matrices among them
    remat: str = "full"  # none | dots | experts | attention | full: see `models.layers.remat`
    loss_chunk: int = 512  # places of a row whose logits exist at once; 0 = all
    seed: int = 0
    compilation_cache: str = ""  # folder that keeps compiled programs between runs; "" = none
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    log: LogConfig = field(default_factory=LogConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
