"""The one table that both directions of the conversion are made of.

A row says: this place of this JAX leaf is that PyTorch tensor, by this transform. The rows follow
from the model's configuration alone. `to_jax` reads them from right to left, `to_torch` from left
to right; a transform is a pair of inverses that only moves elements, so that a round trip is exact
to the bit in every dtype.

Source: names and shapes as the official Med-MoE classes save them (llava_phi_moe.py,
llava_stablelm_moe.py, multimodal_projector/builder.py, clip_encoder.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import numpy as np

from medmoe_jax.config import ModelConfig

PARTS = ("vision", "projector", "llm")
TOWER = "model.image_tower.image_tower."  # prefix of the CLIP tower inside a Med-MoE checkpoint
PROJECTOR = "model.mm_projector.image_spatial_proj."
GATE = "mlp.deepspeed_moe.gate.wg."

# name -> (PyTorch to JAX, JAX to PyTorch)
TRANSFORMS: dict[str, tuple[Callable, Callable]] = {
    "same": (lambda x: x, lambda x: x),
    "transpose": (lambda x: x.T, lambda x: x.T),  # [out, in] <-> [in, out]
    "conv": (lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)),  # OIHW, HWIO
}


@dataclass(frozen=True)
class Row:
    """One PyTorch tensor and its place in the parameter tree.

    Attributes:
      path: leaf of the parameter tree, as in "llm/layers/attn/q/kernel".
      index: place along the leaf's leading (stacked) axes; () where the leaf is not stacked.
      key: PyTorch key, in the spelling of the official checkpoint.
      transform: name of a pair in TRANSFORMS.
      shape: shape of the PyTorch tensor.
    """

    path: str
    index: tuple[int, ...]
    key: str
    transform: str
    shape: tuple[int, ...]

    @property
    def jax_shape(self) -> tuple[int, ...]:
        """Shape of the tensor in JAX, without stacked axes."""
        return self.to_jax(np.broadcast_to(np.uint8(0), self.shape)).shape

    def to_jax(self, array: np.ndarray) -> np.ndarray:
        """The PyTorch tensor in JAX's layout (a view)."""
        return TRANSFORMS[self.transform][0](array)

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """Inverse of `to_jax` (a view)."""
        return TRANSFORMS[self.transform][1](array)


def table(config: ModelConfig, parts: Collection[str] = PARTS) -> list[Row]:
    """All rows of a model.

    Args:
      config: the shapes.
      parts: which of "vision", "projector", "llm" the model folder has.
    """
    rows: list[Row] = []
    if "vision" in parts:
        rows += _vision(config)
    if "projector" in parts:
        rows += _projector(config)
    if "llm" in parts:
        rows += _llm(config)
    return rows


def router_table(width: int, experts: int, layers: int) -> list[Row]:
    """Rows of a router on its own: leaves `router/fc1/...`, and a `.pth` file with `fc1....`.

    Args:
      width: of the language model.
      experts: outputs of the last layer.
      layers: linear layers, 1 to 3.
    """
    rows: list[Row] = []
    for i in range(1, layers + 1):
        out = experts if i == layers else width
        rows += _linear(f"router/fc{i}", (), f"fc{i}", out, width)
    return rows


def leaf_shapes(rows: Iterable[Row]) -> dict[str, tuple[int, ...]]:
    """Path -> full shape of every leaf that the rows fill, in the order of the rows."""
    lead: dict[str, tuple[int, ...]] = {}
    inner: dict[str, tuple[int, ...]] = {}
    for row in rows:
        last = lead.get(row.path, row.index)
        lead[row.path] = tuple(max(pair) for pair in zip(last, row.index, strict=True))
        inner.setdefault(row.path, row.jax_shape)
    return {path: tuple(i + 1 for i in lead[path]) + inner[path] for path in lead}


def count_parameters(rows: Iterable[Row]) -> dict[str, int]:
    """Component ("vision", "projector", "llm", "router") -> number of parameters."""
    counts: dict[str, int] = {}
    for row in rows:
        part = row.path.split("/")[0]
        counts[part] = counts.get(part, 0) + math.prod(row.shape)
    return counts


def _linear(
    path: str, index: tuple[int, ...], key: str, out: int, inp: int, bias: bool = True
) -> list[Row]:
    """Rows of a linear layer."""
    rows = [Row(f"{path}/kernel", index, f"{key}.weight", "transpose", (out, inp))]
    if bias:
        rows.append(Row(f"{path}/bias", index, f"{key}.bias", "same", (out,)))
    return rows


def _norm(path: str, index: tuple[int, ...], key: str, width: int) -> list[Row]:
    """Rows of a layer norm."""
    return [
        Row(f"{path}/scale", index, f"{key}.weight", "same", (width,)),
        Row(f"{path}/bias", index, f"{key}.bias", "same", (width,)),
    ]


def _vision(config: ModelConfig) -> list[Row]:
    """Rows of the CLIP tower."""
    c = config.vision
    width, patch, root = c.width, c.patch_size, f"{TOWER}vision_model."
    emb = f"{root}embeddings."
    rows = [
        Row("vision/class_embedding", (), f"{emb}class_embedding", "same", (width,)),
        Row(
            "vision/patch_embedding/kernel",
            (),
            f"{emb}patch_embedding.weight",
            "conv",
            (width, 3, patch, patch),
        ),
        Row(
            "vision/position_embedding",
            (),
            f"{emb}position_embedding.weight",
            "same",
            (c.patches + 1, width),
        ),
    ]
    rows += _norm("vision/pre_ln", (), f"{root}pre_layrnorm", width)  # sic
    for i in range(c.layers):
        key, at = f"{root}encoder.layers.{i}", (i,)
        rows += _norm("vision/layers/ln1", at, f"{key}.layer_norm1", width)
        for ours, theirs in (
            ("q", "q_proj"),
            ("k", "k_proj"),
            ("v", "v_proj"),
            ("out", "out_proj"),
        ):
            rows += _linear(
                f"vision/layers/attn/{ours}", at, f"{key}.self_attn.{theirs}", width, width
            )
        rows += _norm("vision/layers/ln2", at, f"{key}.layer_norm2", width)
        rows += _linear("vision/layers/fc1", at, f"{key}.mlp.fc1", c.ffn, width)
        rows += _linear("vision/layers/fc2", at, f"{key}.mlp.fc2", width, c.ffn)
    return rows + _norm("vision/post_ln", (), f"{root}post_layernorm", width)


def _projector(config: ModelConfig) -> list[Row]:
    """Rows of the projector: a lone Linear, or a Sequential of Linear, GELU, Linear, ..."""
    out = config.llm.width
    rows: list[Row] = []
    for i in range(config.projector_layers):
        place = "" if config.projector == "linear" else f"{2 * i}"
        key = f"{PROJECTOR}{place}".removesuffix(".")
        rows += _linear(f"projector/fc{i}", (), key, out, out if i else config.vision.width)
    return rows


def _llm(config: ModelConfig) -> list[Row]:
    """Rows of the language model."""
    c = config.llm
    phi = c.family == "phi"
    kv = c.kv_heads * c.head_dim
    rows = [Row("llm/embed/embedding", (), "model.embed_tokens.weight", "same", (c.vocab, c.width))]
    for i in range(c.layers):
        key, at = f"model.layers.{i}", (i,)
        rows += _norm("llm/layers/ln1", at, f"{key}.input_layernorm", c.width)
        for name, out in (("q", c.width), ("k", kv), ("v", kv)):
            path, torch_key = f"llm/layers/attn/{name}", f"{key}.self_attn.{name}_proj"
            rows += _linear(path, at, torch_key, out, c.width, bias=phi or c.qkv_bias)
        dense = f"{key}.self_attn.dense" if phi else f"{key}.self_attn.o_proj"
        rows += _linear("llm/layers/attn/out", at, dense, c.width, c.width, bias=phi)
        if not phi:
            rows += _norm("llm/layers/ln2", at, f"{key}.post_attention_layernorm", c.width)
    for place, i in enumerate(config.dense_layers):
        rows += _ffn(config, "llm/mlp", (place,), f"model.layers.{i}.mlp")
    for place, i in enumerate(config.moe_layers):
        rows += _moe(config, place, f"model.layers.{i}.")
    rows += _norm("llm/final_ln", (), "model.final_layernorm" if phi else "model.norm", c.width)
    return rows + _linear("llm/lm_head", (), "lm_head", c.vocab, c.width, bias=c.lm_head_bias)


def _ffn(config: ModelConfig, path: str, index: tuple[int, ...], key: str) -> list[Row]:
    """Rows of one feed-forward network."""
    width, ffn = config.llm.width, config.llm.ffn
    if config.llm.family == "phi":
        return _linear(f"{path}/fc1", index, f"{key}.fc1", ffn, width) + _linear(
            f"{path}/fc2", index, f"{key}.fc2", width, ffn
        )
    return (
        _linear(f"{path}/gate", index, f"{key}.gate_proj", ffn, width, bias=False)
        + _linear(f"{path}/up", index, f"{key}.up_proj", ffn, width, bias=False)
        + _linear(f"{path}/down", index, f"{key}.down_proj", width, ffn, bias=False)
    )


def _moe(config: ModelConfig, place: int, key: str) -> list[Row]:
    """Rows of the MoE layer whose keys begin with `key`, the `place`-th of the model."""
    moe, width = config.moe, config.llm.width
    assert moe is not None
    rows: list[Row] = []
    for i in range(1, moe.router_layers + 1):
        # a single layer is the gate itself, as in the official code; more are named as the router's
        gate = f"{key}{GATE}fc{i}" if moe.router_layers > 1 else f"{key}{GATE}".removesuffix(".")
        out = moe.experts if i == moe.router_layers else width
        rows += _linear(f"llm/moe/router/fc{i}", (place,), gate, out, width)
    for e in range(moe.experts):
        expert = f"{key}mlp.deepspeed_moe.experts.deepspeed_experts.{e}"
        rows += _ffn(config, "llm/moe/experts", (place, e), expert)
    if moe.meta:
        rows += _ffn(config, "llm/moe/meta", (place,), f"{key}mlp.meta_moe")
    if moe.use_residual:
        rows += _linear("llm/moe/coefficient", (place,), f"{key}mlp.coefficient", 2, width)
    return rows
