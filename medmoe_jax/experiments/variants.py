"""What the tables vary: changes to the config of phase 3, and to the router that it starts from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from medmoe_jax.config import FRESH, ConfigError
from medmoe_jax.experiments.config import StudyConfig

EXPERTS = "llm/moe/(experts|meta)/.*"


@dataclass(frozen=True)
class Variant:
    """One way to do phase 3.

    Attributes:
      title: in tables.
      changes: dotted path -> value, of the phase-3 config.
      router: the same for the config of the router phase; None: starts from phase 2, without one.
      roles: data files, as `StudyConfig.files` names them.
    """

    title: str
    changes: dict[str, Any] = field(default_factory=dict)
    router: dict[str, Any] | None = field(default_factory=dict)
    roles: tuple[str, ...] = ("tune",)


def variants(cfg: StudyConfig) -> dict[str, Variant]:
    """All of them by name; "moe" is Med-MoE as the config has it."""
    found = {
        "moe": Variant("Med-MoE"),
        "dense": Variant(
            "SFT: language model and projector",
            {"model.moe": None, "train": ("projector/.*", "llm/.*")},
            None,
        ),
        "dense_ffn": Variant("SFT: FFNs only", {"model.moe": None, "train": ("llm/mlp/.*",)}, None),
        "no_meta": Variant("no meta expert", {"model.moe.meta": False}),
        "learned": Variant(
            "router learned in phase 3",
            {
                "router": FRESH,
                "model.moe.aux_coef": cfg.aux_coef,
                "train": (EXPERTS, "llm/moe/router/.*"),
            },
            None,
        ),
        "preserving": Variant("function-preserving start", {"upcycle": "function_preserving"}),
        "random": Variant("random routing", {"model.moe.routing": "random"}),
        "uniform": Variant("uniform routing", {"model.moe.routing": "uniform"}),
        "classify": Variant("Med-MoE", roles=("tune", "classify")),
        "classify_more": Variant(
            "Med-MoE, more classification data", roles=("tune", "classify", "classify_more")
        ),
    }
    for rank in cfg.lora_ranks:
        found[f"lora{rank}"] = Variant(f"LoRA, rank {rank}", {"lora.rank": rank})
    for k in (1, 2):
        found[f"top{k}"] = Variant(f"top-{k}", {"model.moe.top_k": k})
    for experts in (2, 4, 6):
        size = {"model.moe.experts": experts}
        changes = {"model.moe.top_k": 2} | size
        found[f"experts{experts}"] = Variant(f"{experts} experts", changes, size)
    return found


def variant(cfg: StudyConfig, name: str) -> Variant:
    """One of them. Raises ConfigError on an unknown name."""
    known = variants(cfg)
    if name not in known:
        raise ConfigError(f"unknown variant {name!r}; use one of {', '.join(known)}")
    return known[name]
