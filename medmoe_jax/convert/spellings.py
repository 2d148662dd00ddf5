"""From the many spellings of PyTorch keys to the one of the table.

Today's and older Hugging Face Phi, StableLM and CLIP checkpoints, Microsoft's own Phi-2 files and
the official Med-MoE files name the same tensors differently, fuse some, repeat some and add
buffers. Each key is renamed to the table's spelling, or set aside with a reason.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from medmoe_jax.config import LlmConfig
from medmoe_jax.convert.table import TOWER

# pattern -> reason; such tensors hold nothing that was learned, or nothing that the model uses
_IGNORED = (
    (
        r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached|scale)$",
        "rotary frequencies, computed from the configuration",
    ),
    (r"(^|\.)position_ids$", "position numbers 0, 1, 2, ..., not a parameter"),
    (
        r"^(text_model\.|text_projection\.|visual_projection\.|logit_scale$)",
        "CLIP's text side and shared space: only the vision tower is used",
    ),
)

_RENAMED = (
    # CLIP: towers saved by transformers 5 have no prefix, older ones and full models have
    (
        r"^(vision_model\.)?(embeddings|encoder|pre_layrnorm|post_layernorm)\.",
        TOWER + r"vision_model.\2.",
    ),
    # the official residual form: its MLP and the meta expert are the same parameters
    (r"\.mlp\.mlp\.", ".mlp.meta_moe."),
    # Microsoft's own Phi-2 files (model type phi-msft)
    (r"^transformer\.embd\.wte\.", "model.embed_tokens."),
    (r"^transformer\.h\.(\d+)\.", r"model.layers.\1."),
    (r"^(model\.layers\.\d+)\.ln\.", r"\1.input_layernorm."),
    (r"\.mixer\.out_proj\.", ".self_attn.dense."),
    (r"\.mixer\.", ".self_attn."),
    (r"^lm_head\.ln\.", "model.final_layernorm."),
    (r"^lm_head\.linear\.", "lm_head."),
)

# fused query, key and value: last name of the module -> how the three lie in the rows
_FUSED = {"Wqkv": "blocks", "query_key_value": "heads"}


@dataclass(frozen=True)
class Slice:
    """One of query (0), key (1), value (2) in a fused projection.

    Attributes:
      layout: "blocks" (all query rows, then key, then value: Microsoft's files) or "heads" (head by
        head, each its query, key and value rows: transformers 4.36).
      number: which of the three.
    """

    layout: str
    number: int

    def shape(self, fused: tuple[int, ...], config: LlmConfig) -> tuple[int, ...] | None:
        """Shape of the slice, or None where `fused` does not have the rows it should have."""
        kv = config.kv_heads * config.head_dim
        grouped = self.layout == "heads" and kv != config.width  # never written by that release
        if grouped or not fused or fused[0] != config.width + 2 * kv:
            return None
        return (kv if self.number else config.width, *fused[1:])

    def cut(self, fused: np.ndarray, config: LlmConfig) -> np.ndarray:
        """The slice of a fused tensor: [out, in] or [out]."""
        if self.layout == "heads":
            heads = fused.reshape(config.heads, 3, config.head_dim, *fused.shape[1:])
            return heads[:, self.number].reshape(config.width, *fused.shape[1:])
        kv = config.kv_heads * config.head_dim
        begin = (0, config.width, config.width + kv)[self.number]
        return fused[begin : begin + (kv if self.number else config.width)]


def ignored(key: str) -> str | None:
    """Why a key is not converted; None where it is to be."""
    return next((reason for pattern, reason in _IGNORED if re.search(pattern, key)), None)


def canonical(key: str) -> list[tuple[str, Slice | None]]:
    """The table's spelling of a key; three of them, with slices, for a fused projection."""
    for pattern, replacement in _RENAMED:
        key = re.sub(pattern, replacement, key)
    for name, layout in _FUSED.items():
        if f".self_attn.{name}." in key:
            return [
                (key.replace(f".{name}.", f".{target}."), Slice(layout, number))
                for number, target in enumerate(("q_proj", "k_proj", "v_proj"))
            ]
    return [(key, None)]
