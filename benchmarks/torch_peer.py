"""The PyTorch side of the benchmarks: Hugging Face modules with the weights of our model.

Decoder layers, attention (SDPA), norms, rotary embedding, KV cache and CLIP are those of
`transformers`; the MoE layer sorts the tokens by expert and runs each chosen expert once, on its
own tokens (`Moe`), or does what the official code does (`OfficialMoe`). Of CLIP only the layers
below the selected feature are run, and a prompt's output layer sees the last position only, as on
our side.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, StableLmConfig, StableLmForCausalLM
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.models.stablelm.modeling_stablelm import StableLmMLP

from medmoe_jax.config import ModelConfig
from medmoe_jax.convert.table import PROJECTOR, TOWER, table

CACHES = ("dynamic", "static")
# Official names of the tensors of a MoE layer and theirs here.
NAMES = {
    "deepspeed_moe.gate.wg": "gate",
    "deepspeed_moe.experts.deepspeed_experts": "experts",
    "meta_moe": "meta",
}


class Moe(nn.Module):
    """Top-1 mixture of experts and the meta expert: w * expert(x) + meta(x)."""

    def __init__(self, config: StableLmConfig, experts: int):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, experts)
        self.experts = nn.ModuleList([StableLmMLP(config) for _ in range(experts)])
        self.meta = StableLmMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        """f32[B, T, D] -> f32[B, T, D]."""
        rows = x.flatten(0, 1)
        weight, choice = self.gate(rows).softmax(-1).max(-1, keepdim=True)
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
        gates = self.gate(rows).softmax(-1)
        chosen = nn.functional.one_hot(gates.argmax(-1), n)
        place = ((chosen.cumsum(0) - 1) * chosen).sum(-1)
        capacity = int(chosen.sum(0).max())
        spot = nn.functional.one_hot(place, capacity).type_as(x)
        combine = torch.einsum("se,sc->sec", gates * chosen, spot)
        buffers = torch.einsum("sec,sd->ecd", combine.bool().type_as(x), rows)
        out = torch.stack([f(b) for f, b in zip(self.experts, buffers, strict=True)])
        routed = torch.einsum("sec,ecd->sd", combine, out)
        return (routed + self.meta(rows)).view_as(x)


class Peer(nn.Module):
    """CLIP, projector and language model in float32; no parameter has a gradient at first."""

    def __init__(self, cfg: ModelConfig, moe_layer: type[Moe] = Moe):
        """Raises ValueError for a model that the peer has no modules for."""
        super().__init__()
        llm, vision, moe = cfg.llm, cfg.vision, cfg.moe
        if llm.family != "stablelm" or (moe and (moe.top_k != 1 or not moe.meta)):
            raise ValueError("the peer is StableLM, dense or with top-1 experts and meta expert")
        config = StableLmConfig(
            vocab_size=llm.vocab,
            hidden_size=llm.width,
            intermediate_size=llm.ffn,
            num_hidden_layers=llm.layers,
            num_attention_heads=llm.heads,
            num_key_value_heads=llm.kv_heads,
            max_position_embeddings=llm.max_positions,
            layer_norm_eps=llm.norm_eps,
            use_qkv_bias=llm.qkv_bias,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": llm.rope_theta,
                "partial_rotary_factor": llm.rotary_fraction,
            },
            attn_implementation="sdpa",
            pad_token_id=None,
        )
        self.llm = StableLmForCausalLM(config)
        for i in cfg.moe_layers:
            assert moe is not None
            self.llm.model.layers[i].mlp = moe_layer(config, moe.experts)
        self.clip = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=vision.width,
                intermediate_size=vision.ffn,
                num_hidden_layers=vision.layers_run,
                num_attention_heads=vision.heads,
                image_size=vision.image_size,
                patch_size=vision.patch_size,
                layer_norm_eps=vision.norm_eps,
                hidden_act=vision.activation,
                attn_implementation="sdpa",
            )
        )
        steps: list[nn.Module] = [nn.Linear(vision.width, llm.width)]
        for _ in range(cfg.projector_layers - 1):
            steps += [nn.GELU(), nn.Linear(llm.width, llm.width)]
        self.projector = nn.Sequential(*steps)
        for name, value in (("mean", vision.mean), ("std", vision.std)):
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    @classmethod
    def filled(cls, cfg: ModelConfig, params: dict[str, Any], moe_layer: type[Moe] = Moe) -> Peer:
        """The peer of `cfg` with the weights of our parameter tree (stacked, host arrays)."""
        peer = cls(cfg, moe_layer)
        state = {}
        for row in table(cfg):
            leaf: Any = params
            for name in row.path.split("/"):
                leaf = leaf[name]
            key = row.key.replace(f"{TOWER}vision_model.", "clip.").replace(PROJECTOR, "projector.")
            for official, ours in NAMES.items():
                key = key.replace(official, ours)
            key = key if key.startswith(("clip.", "projector.")) else f"llm.{key}"
            state[key] = torch.from_numpy(np.array(row.to_torch(leaf[row.index])))
        for i in range(cfg.vision.layers_run, cfg.vision.layers):  # not run, so not there
            state = {k: v for k, v in state.items() if f"clip.encoder.layers.{i}." not in k}
        peer.load_state_dict(state)
        return peer

    def new_cache(self, kind: str, length: int) -> Cache:
        """An empty KV cache; `length` places where it is static."""
        config = self.llm.config
        if kind == "static":
            return StaticCache(config=config, max_cache_len=length)
        return DynamicCache(config=config)

    def experts(self) -> list[nn.Parameter]:
        """The parameters of all experts and meta experts."""
        layers = [x.mlp for x in self.llm.model.layers if isinstance(x.mlp, Moe)]
        return [p for x in layers for m in (x.experts, x.meta) for p in m.parameters()]

    def _embed(self, before: Tensor, images: Tensor, after: Tensor) -> Tensor:
        """[B, T0 + I + T1, D] of one image a row between two texts, see `prefill`."""
        pixels = (images.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        features = self.clip(pixels).last_hidden_state[:, 1:]
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
        logits = self.llm.lm_head(hidden[:, :-1])
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
