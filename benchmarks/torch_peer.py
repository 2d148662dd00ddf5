"""The PyTorch side of the benchmarks: Hugging Face modules with the weights of our model.

Decoder layers, attention (SDPA), norms, rotary embedding, KV cache and CLIP are those of
`transformers`; the MoE layer sorts the tokens by expert and runs each chosen expert once, on its
own tokens (`Moe`), or does what the official code does (`OfficialMoe`). Of CLIP only the layers
below the selected feature are run, and a prompt's output layer sees the last position only, as on
our side.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    PhiConfig,
    PhiForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.models.phi.modeling_phi import PhiMLP
from transformers.models.stablelm.modeling_stablelm import StableLmMLP

from medmoe_jax.checkpoint import ModelMeta
from medmoe_jax.config import ModelConfig
from medmoe_jax.convert.export_configs import clip_config, plain_config
from medmoe_jax.convert.table import PROJECTOR, TOWER, Row, table

CACHES = ("dynamic", "static")
# Official names of the tensors of a MoE layer and theirs here.
NAMES = {
    "deepspeed_moe.gate.wg": "gate",
    "deepspeed_moe.experts.deepspeed_experts": "experts",
    "meta_moe": "meta",
}
LlmSettings = PhiConfig | StableLmConfig


class Linear(nn.Linear):
    """Computes in the dtype of its input, whatever its weights are kept in."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_in] -> [..., d_out]."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.weight.to(x.dtype), bias)


def ffn(config: LlmSettings) -> nn.Module:
    """The family's feed-forward network, as an expert that can be trained in float32."""
    network = PhiMLP(config) if isinstance(config, PhiConfig) else StableLmMLP(config)
    for name, layer in list(network.named_children()):
        if isinstance(layer, nn.Linear):
            setattr(
                network,
                name,
                Linear(layer.in_features, layer.out_features, bias=layer.bias is not None),
            )
    return network


class Moe(nn.Module):
    """Top-1 mixture of experts and the meta expert: w * expert(x) + meta(x)."""

    def __init__(self, config: LlmSettings, experts: int):
        super().__init__()
        # Decides in float32, as on our side.
        self.gate = nn.Linear(config.hidden_size, experts, dtype=torch.float32)
        self.experts = nn.ModuleList([ffn(config) for _ in range(experts)])
        self.meta = ffn(config)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        rows = x.flatten(0, 1)
        weight, choice = self.gate(rows.float()).softmax(-1).max(-1, keepdim=True)
        weight = weight.to(x.dtype)
        if len(rows) == 1:
            return (weight * self.experts[int(choice)](rows) + self.meta(rows)).view_as(x)
        choice = choice[:, 0]
        order = choice.argsort()
        counts = choice.bincount(minlength=len(self.experts)).tolist()
        groups = rows.index_select(0, order).split(counts)
        out = [expert(g) for expert, g in zip(self.experts, groups, strict=True) if len(g)]
        routed = torch.empty_like(rows).index_copy_(0, order, torch.cat(out))
        return (weight * routed + self.meta(rows)).view_as(x)


class OfficialMoe(Moe):
    """The same sum the official way: one-hot products into and out of padded buffers.

    Every expert runs on a buffer as long as the longest group, so that no token is dropped.

    Source: DeepSpeed `top1gating` and `MOELayer.forward`, which the official code calls with
    drop_tokens=False. Its random order of the tokens is left out: it changes no result.
    """

    def forward(self, x: Tensor) -> Tensor:
        """f32[B, T, D] -> f32[B, T, D]."""
        rows, n = x.flatten(0, 1), len(self.experts)
        gates = self.gate(rows.float()).softmax(-1).to(x.dtype)
        chosen = nn.functional.one_hot(gates.argmax(-1), n)
        place = ((chosen.cumsum(0) - 1) * chosen).sum(-1)
        capacity = int(chosen.sum(0).max())
        spot = nn.functional.one_hot(place, capacity).type_as(x)
        combine = torch.einsum("se,sc->sec", gates * chosen, spot)
        buffers = torch.einsum("sec,sd->ecd", combine.bool().type_as(x), rows)
        out = torch.stack([f(b) for f, b in zip(self.experts, buffers, strict=True)])
        routed = torch.einsum("sec,ecd->sd", combine, out)
        return (routed + self.meta(rows)).view_as(x)


def language_model(cfg: ModelConfig) -> nn.Module:
    """A dense language model with random weights."""
    config = settings(plain_config(ModelMeta("", cfg), (), "float32"))
    if cfg.llm.family == "stablelm":
        return StableLmForCausalLM(StableLmConfig(**config))
    model = PhiForCausalLM(PhiConfig(**config))
    model.lm_head = nn.Linear(cfg.llm.width, cfg.llm.vocab, bias=False)  # Med-MoE's has none
    return model


def vision_tower(cfg: ModelConfig) -> nn.Module:
    """The layers of CLIP below the selected feature, with random weights."""
    config = settings(clip_config(ModelMeta("", cfg), "float32"))
    config["num_hidden_layers"] = cfg.vision.layers_run
    return CLIPVisionModel(CLIPVisionConfig(**config))


def settings(config: dict[str, Any]) -> dict[str, Any]:
    """What a class of `transformers` is made with, from a config.json."""
    shapes = {k: v for k, v in config.items() if k not in ("torch_dtype", "architectures")}
    return shapes | {"attn_implementation": "sdpa", "pad_token_id": None}


def own_key(key: str) -> str:
    """The name in a `Peer` of a tensor of an official checkpoint."""
    key = key.replace(f"{TOWER}vision_model.", "clip.").replace(PROJECTOR, "projector.")
    for official, ours in NAMES.items():
        key = key.replace(official, ours)
    return key if key.startswith(("clip.", "projector.")) else f"llm.{key}"


class Peer(nn.Module):
    """CLIP, projector and language model; no parameter has a gradient at first."""

    def __init__(self, cfg: ModelConfig, moe_layer: type[Moe] = Moe):
        """Raises ValueError for a model that the peer has no modules for."""
        super().__init__()
        llm, vision, moe = cfg.llm, cfg.vision, cfg.moe
        if moe and (moe.top_k != 1 or not moe.meta):
            raise ValueError("the peer is dense or has top-1 experts and a meta expert")
        self.llm: Any = language_model(cfg)
        for i in cfg.moe_layers:
            assert moe is not None
            self.llm.model.layers[i].mlp = moe_layer(self.llm.config, moe.experts)
        self.clip = vision_tower(cfg)
        steps: list[nn.Module] = [nn.Linear(vision.width, llm.width)]
        for _ in range(cfg.projector_layers - 1):
            steps += [nn.GELU(), nn.Linear(llm.width, llm.width)]
        self.projector = nn.Sequential(*steps)
        for name, value in (("mean", vision.mean), ("std", vision.std)):
            values = torch.tensor(value, dtype=torch.float32)
            self.register_buffer(name, values.view(3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    @classmethod
    def filled(cls, cfg: ModelConfig, params: dict[str, Any], moe_layer: type[Moe] = Moe) -> Peer:
        """The peer of `cfg` with the weights of our parameter tree (stacked, host arrays)."""
        peer = cls(cfg, moe_layer)

        def weight(row: Row) -> Tensor:
            leaf: Any = params
            for name in row.path.split("/"):
                leaf = leaf[name]
            return torch.from_numpy(np.array(row.to_torch(leaf[row.index])))

        peer.fill((row.key, weight(row)) for row in table(cfg))
        return peer

    @classmethod
    def read(cls, cfg: ModelConfig, folder: Path, dtype: torch.dtype, device: str) -> Peer:
        """The peer of `cfg` with the weights of an official checkpoint in safetensors files, made
        and filled on the device."""
        usual = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                peer = cls(cfg)
        finally:
            torch.set_default_dtype(usual)

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for file in sorted(folder.glob("*.safetensors")):
                with safe_open(file, "pt", device=device) as opened:
                    for key in opened.offset_keys():
                        yield key, opened.get_tensor(key)

        peer.fill(tensors())
        return peer

    @torch.no_grad()
    def fill(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copies the tensors of an official checkpoint; those of layers that are not run are left.

        Raises:
          ValueError: one is missing.
        """
        own = self.state_dict()
        for key, value in tensors:
            if (name := own_key(key)) in own:
                own.pop(name).copy_(value)
        if own:
            raise ValueError(f"{len(own)} tensors are missing: {', '.join(list(own)[:5])}")

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.llm.lm_head.weight.device

    def train_experts(self) -> list[nn.Parameter]:
        """The parameters of all experts and meta experts, in float32 and with gradients from now
        on."""
        layers = [x.mlp for x in self.llm.model.layers if isinstance(x.mlp, Moe)]
        found = [p for x in layers for m in (x.experts, x.meta) for p in m.parameters()]
        for parameter in found:
            parameter.data = parameter.data.float()
        return [parameter.requires_grad_() for parameter in found]

    def recompute(self) -> None:
        """Computes every layer again in the backward pass, which takes less memory."""
        for layer in self.llm.model.layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)

    def new_cache(self, kind: str, length: int) -> Cache:
        """An empty KV cache; `length` places where it is static."""
        config = self.llm.config
        if kind == "static":
            return StaticCache(config=config, max_cache_len=length)
        return DynamicCache(config=config)

    def _embed(self, before: Tensor, images: Tensor, after: Tensor) -> Tensor:
        """[B, T0 + I + T1, D] of one image a row between two texts, see `prefill`."""
        pixels = (images.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        dtype = self.llm.lm_head.weight.dtype
        features = self.clip(pixels.to(dtype)).last_hidden_state[:, 1:]
        embed = self.llm.model.embed_tokens
        return torch.cat([embed(before), self.projector(features), embed(after)], 1)

    def loss(self, images: Tensor, text: Tensor, labels: Tensor) -> Tensor:
        """Mean next-token loss behind one image a row.

        Args:
          images: u8[B, H, W, 3].
          text: i64[B, T1].
          labels: i64[B, I + T1], -100 where there is nothing to learn.

        Returns:
          f32[].
        """
        with torch.no_grad():
            embeds = self._embed(text[:, :0], images, text)
        hidden = self.llm.model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        logits = self.llm.lm_head(hidden[:, :-1]).float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())

    def _step(self, embeds: Tensor, cache: Cache) -> Tensor:
        out = self.llm.model(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
        return self.llm.lm_head(out.last_hidden_state[:, -1])

    @torch.inference_mode()
    def prefill(self, before: Tensor, images: Tensor, after: Tensor, cache: Cache) -> Tensor:
        """Reads one image a row between two texts.

        Args:
          before: i64[B, T0]; T0 may be 0.
          images: u8[B, H, W, 3].
          after: i64[B, T1].
          cache: empty; is filled.

        Returns:
          f32[B, V], scores of the next id.
        """
        return self._step(self._embed(before, images, after), cache)

    @torch.inference_mode()
    def decode(self, logits: Tensor, cache: Cache, new: int, eos: int | None = None) -> Tensor:
        """Greedy ids i64[B, n], n <= new, of which the first is chosen from `logits`.

        `eos`: end of a single row (it is part of the result); None = none.
        """
        ids = [logits.argmax(-1)]
        while len(ids) < new and (eos is None or ids[-1].item() != eos):
            ids.append(self._step(self.llm.model.embed_tokens(ids[-1])[:, None], cache).argmax(-1))
        return torch.stack(ids, 1)
