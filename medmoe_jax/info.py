"""Parameter counts of a configuration, total and activated: `python -m medmoe_jax.info --config
configs/stage3.py:phi2`.

Counts come from shapes alone; nothing is allocated.
"""

from __future__ import annotations

import sys
from math import prod
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from medmoe_jax import command_line, lora
from medmoe_jax.config import ConfigError, ModelConfig, RunConfig
from medmoe_jax.models import layers, medmoe

# Paper Table 14: (activated, total) in billions, by family.
PAPER = {"phi": (3.6, 5.3), "stablelm": (2.0, 2.9)}


def _size(tree: Any) -> int:
    """Numbers in a nested dict of `Leaf`."""
    if isinstance(tree, layers.Leaf):
        return prod(tree.shape)
    return sum(_size(v) for v in tree.values())


def _always(*trees: Any) -> tuple[int, int]:
    """(total, activated) of what every token goes through."""
    size = sum(_size(tree) for tree in trees)
    return size, size


def components(cfg: ModelConfig) -> dict[str, tuple[int, int]]:
    """(total, activated for a token) parameters of each component.

    The vision tower and the projector work for image tokens only; the embedding is a look-up and
    counts as activated, as in the paper's figures.
    """
    tree = medmoe.leaves(cfg)
    llm = tree["llm"]
    parts = {
        "vision tower": _always(tree["vision"]),
        "projector": _always(tree["projector"]),
        "embedding": _always(llm["embed"]),
        "attention and norms": _always(llm["layers"], llm["final_ln"]),
        "language-model head": _always(llm["lm_head"]),
    }
    if "mlp" in llm:
        parts["plain FFNs"] = _always(llm["mlp"])
    if cfg.moe:
        experts = _size(llm["moe"]["experts"])
        parts["experts"] = (experts, experts * cfg.moe.active // cfg.moe.experts)
        parts["router"] = _always(llm["moe"]["router"], llm["moe"].get("coefficient", {}))
        if cfg.moe.meta:
            parts["meta expert"] = _always(llm["moe"]["meta"])
    return parts


def adapters(cfg: RunConfig) -> tuple[int, int]:
    """(total, activated for a token) parameters of the adapters, which are all that trains.

    Raises ConfigError as `lora.adapted` does.
    """
    flat: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(medmoe.shapes(cfg.model)):
        flat[jax.tree_util.keystr(path, simple=True, separator="/")] = leaf
    total = active = 0
    for path, leaf in lora.shapes(cfg, flat).items():
        total += leaf.size
        routed = cfg.model.moe if "/experts/" in path else None
        active += leaf.size * routed.active // routed.experts if routed else leaf.size
    return total, active


def report(cfg: ModelConfig) -> str:
    """The table as text, beside the paper's Table 14 where the model is one of the paper's."""
    parts = components(cfg)
    lines = [f"{'component':<24}{'total':>16}{'activated':>16}"]
    lines += [f"{name:<24}{total:>16,}{active:>16,}" for name, (total, active) in parts.items()]
    language = [v for k, v in parts.items() if k not in ("vision tower", "projector")]
    meta = parts.get("meta expert", (0, 0))

    def line(name: str, rows: list[tuple[int, int]], less: tuple[int, int] = (0, 0)) -> str:
        total, active = (
            sum(column) - off for column, off in zip(zip(*rows, strict=True), less, strict=True)
        )
        unit, word = (1e9, "B") if total >= 1e8 else (1e6, "M")
        short = f"{total / unit:.2f}{word} / {active / unit:.2f}{word}"
        return f"{name:<24}{total:>16,}{active:>16,}   {short}"

    lines += ["-" * 56, line("all", list(parts.values())), line("language model", language)]
    if cfg.moe:
        lines.append(line("  without meta expert", language, meta))
        lines += ["", f"MoE layers: {', '.join(map(str, cfg.moe_layers))} of {cfg.llm.layers}"]
        lines += _paper(cfg)
    return "\n".join(lines)


def _paper(cfg: ModelConfig) -> list[str]:
    moe = cfg.moe
    full = cfg.llm.width in (2048, 2560)
    if not full or moe is None or (moe.experts, moe.placement) != (4, "sparse"):
        return []
    active, total = PAPER[cfg.llm.family]
    name = {"phi": "Phi-2", "stablelm": "StableLM-2"}[cfg.llm.family]
    lines = [
        "",
        f"Paper, Table 14 ({name}): {active}B activated, {total}B in all (language model only).",
        "Its activated figure is the language model with two FFNs active in each MoE layer: top-1 "
        "+ meta expert, as the",
        "official scripts run it (top-2 without a meta expert would give the same number). Its "
        "total counts the four",
        "experts and leaves the meta expert out: compare it with the total of the line 'without "
        "meta expert'.",
    ]
    if cfg.llm.family == "stablelm":
        lines.append(
            "Table 14 gives StableLM width 2560, 32 layers and 16 MoE layers; the checkpoint has "
            "width 2048, 24 layers and 12."
        )
    return lines


def main(_: list[str]) -> None:
    """Prints the report of --config; faults in it end with a message and status 1."""
    config = flags.FLAGS.config
    try:
        found = report(config.model.validate())
        if config.lora.rank:
            total, active = adapters(config)
            found += f"\n{f'adapters of rank {config.lora.rank}':<24}{total:>16,}{active:>16,}"
    except ConfigError as error:
        sys.exit(f"error: {error}")
    print(f"{config.phase}: {config.model.llm.family}, projector {config.model.projector}")
    print(found)


if __name__ == "__main__":
    config_flags.DEFINE_config_file(
        "config", help_string="A file of configs/, as in configs/stage3.py:phi2"
    )
    flags.mark_flag_as_required("config")
    command_line.run(main)
