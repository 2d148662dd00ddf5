"""Med-MoE in PyTorch, for checks: Hugging Face's own modules and a small, obvious MoE layer.

It shares no code with the JAX model: attention, norms, rotary embedding and CLIP are those of the
installed `transformers`; only the MoE layer, the projector and the merging of image patches are
written here, in the plainest way. Parameter names are the keys of the official checkpoint.
Needs the extra `medmoe_jax[torch]`. Next: `torch_reference.py`, which fills it from a folder.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    PhiConfig,
    PhiForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)
from transformers.models.phi.modeling_phi import PhiMLP
from transformers.models.stablelm.modeling_stablelm import StableLmMLP

IMAGE_TOKEN = -200
NO_LABEL = -100
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
CLIP_FIELDS = (*SIZES, "image_size", "patch_size", "hidden_act", "layer_norm_eps")
LLM_FIELDS = (*SIZES, "vocab_size", "hidden_act", "max_position_embeddings")


class Gate(nn.Module):
    """Router without noise: which experts a token goes to, and with what weight."""

    def __init__(self, width: int, experts: int, top_k: int):
        super().__init__()
        self.top_k = top_k
        self.wg = nn.Linear(width, experts)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """x: f32[N, D] -> router_logits, combine_dense f32[N, E], exp_counts i64[E] and l_aux."""
        logits = self.wg(x)
        share = logits.softmax(-1)
        first = F.one_hot(share.argmax(-1), share.shape[-1])
        weights = share * first
        if self.top_k == 2:
            others = logits.masked_fill(first.bool(), float("-inf"))
            weights = share * (first + F.one_hot(others.argmax(-1), share.shape[-1]))
            total = weights.sum(-1, keepdim=True)
            weights = weights / total.clamp(min=torch.finfo(total.dtype).eps)
        # Only the first choice counts, padding rows included.
        l_aux = share.shape[-1] * (share.mean(0) * first.float().mean(0)).sum()
        return {
            "router_logits": logits,
            "combine_dense": weights,
            "exp_counts": first.sum(0),
            "l_aux": l_aux,
        }


class Experts(nn.Module):
    """The routed experts of one layer."""

    def __init__(self, make_mlp: Callable[[], nn.Module], experts: int):
        super().__init__()
        self.deepspeed_experts = nn.ModuleList([make_mlp() for _ in range(experts)])

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """x: f32[N, D], weights: f32[N, E] -> weighted sum of the experts' outputs, f32[N, D]."""
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.deepspeed_experts):
            rows = weights[:, e].nonzero().flatten()
            out = out.index_add(0, rows, weights[rows, e, None] * expert(x[rows]))
        return out


class Routed(nn.Module):
    """Gate and experts; a level of its own because the checkpoint's keys have it."""

    def __init__(self, make_mlp: Callable[[], nn.Module], width: int, experts: int, top_k: int):
        super().__init__()
        self.gate = Gate(width, experts, top_k)
        self.experts = Experts(make_mlp, experts)


class MoeMlp(nn.Module):
    """What stands in place of the MLP in a MoE layer.

    out = routed + meta(x); with `use_residual`, out = c0 * routed + c1 * meta(x) + meta(x), where
    c = softmax(coefficient(x)).

    Source: paper equation 4; official `moe/layer.py`, `moe/sharded_moe.py`. Differences: no noise
    on the second choice and no capacity (the official top-2 can drop tokens above 8 experts).
    """

    def __init__(
        self,
        make_mlp: Callable[[], nn.Module],
        width: int,
        experts: int,
        top_k: int,
        use_residual: bool,
    ):
        super().__init__()
        self.deepspeed_moe = Routed(make_mlp, width, experts, top_k)
        self.meta_moe = make_mlp()
        self.coefficient = nn.Linear(width, 2) if use_residual else None
        self.seen: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        """x: f32[B, S, D] -> f32[B, S, D]; leaves router logits and the like in `seen`."""
        rows = x.flatten(0, 1)
        gate = self.deepspeed_moe.gate(rows)
        routed = self.deepspeed_moe.experts(rows, gate["combine_dense"]).view_as(x)
        meta = self.meta_moe(x)
        if self.coefficient is not None:
            mix = self.coefficient(x).softmax(-1)
            routed = mix[..., :1] * routed + mix[..., 1:] * meta
        out = routed + meta
        self.seen = {"moe_in": x, "moe_out": out, **gate}
        return out


class Projector(nn.Module):
    """Linear layers with exact GELU between them: `linear` or `mlpNx_gelu`."""

    def __init__(self, kind: str, vision_width: int, width: int):
        super().__init__()
        depth = 1 if kind == "linear" else int(kind.removeprefix("mlp").removesuffix("x_gelu"))
        layers: list[nn.Module] = [nn.Linear(vision_width, width)]
        for _ in range(depth - 1):
            layers += [nn.GELU(), nn.Linear(width, width)]
        self.image_spatial_proj = layers[0] if kind == "linear" else nn.Sequential(*layers)


class MedMoe(nn.Module):
    """CLIP (`clip`) and the language model with projector and experts (`llm`), in float32.

    `llm.state_dict()` has the keys of an official checkpoint, CLIP's apart.
    """

    def __init__(self, config: dict[str, Any], clip_config: dict[str, Any]):
        """Args: config, clip_config: contents of the two config.json files."""
        super().__init__()
        self.config = config
        self.llm, make_mlp = _language_model(config)
        self.layers: list[Any] = list(self.llm.model.layers)
        width, kind = config["hidden_size"], config.get("image_projector_type", "linear")
        self.projector = Projector(kind, config["mm_hidden_size"], width)
        self.llm.model.mm_projector = self.projector
        moe = config.get("moe") or {}
        indices, experts = moe.get("moe_layers_idx", []), moe.get("num_experts", [])
        if len(experts) == 1:
            experts = experts * len(indices)
        for i, n in zip(indices, experts, strict=True):
            self.layers[i].mlp = MoeMlp(
                make_mlp, width, n, moe["top_k_experts"], moe["use_residual"]
            )
        clip_config = clip_config.get("vision_config") or clip_config
        fields = {k: v for k, v in clip_config.items() if k in CLIP_FIELDS}
        fields["attn_implementation"] = "eager"
        self.clip = CLIPVisionModel(CLIPVisionConfig(**fields))
        self.captures: dict[str, Tensor] = {}
        self.layers[0].self_attn.register_forward_hook(self._capture("layer_00.attn_out"))
        for i, layer in enumerate(self.layers):
            layer.register_forward_hook(self._capture(f"layer_{i:02}.hidden"))

    def _capture(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.captures[name] = output[0] if isinstance(output, tuple) else output

        return hook

    def merge(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, features: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Puts image patches in the place of image tokens and pads with zero embeddings.

        Args:
          input_ids: i64[B, T], -200 for an image.
          attention_mask: bool[B, T]; False places are dropped.
          labels: i64[B, T].
          features: f32[M, n, D], in row order; a row without image token owns one and skips it.

        Returns:
          Embeddings f32[B, S, D], mask bool[B, S], labels i64[B, S] (-100 at patches and padding).

        Raises:
          ValueError: the number of images does not fit the rows.

        Source: official `llava_arch.py`, prepare_inputs_labels_for_multimodal.
        """
        counts = ((input_ids == IMAGE_TOKEN) & attention_mask).sum(1)
        if int(counts.clamp(min=1).sum()) != len(features):
            raise ValueError(
                f"pixel_values has {len(features)} images for rows of {counts.tolist()} image"
                " tokens; a row without any needs one image as well, of zeros"
            )
        images = iter(features)
        embed, limit = self.llm.model.embed_tokens, self.config.get("tokenizer_model_max_length")
        rows: list[tuple[Tensor, Tensor]] = []
        for ids, keep, marks in zip(input_ids, attention_mask, labels, strict=True):
            ids, marks = ids[keep], marks[keep]
            spots = (ids == IMAGE_TOKEN).nonzero().flatten().tolist()
            if not spots:
                next(images)
            parts, part_marks, start = [], [], 0
            for spot in spots:
                patches = next(images)
                parts += [embed(ids[start:spot]), patches]
                part_marks += [marks[start:spot], marks.new_full((len(patches),), NO_LABEL)]
                start = spot + 1
            parts.append(embed(ids[start:]))
            part_marks.append(marks[start:])
            rows.append((torch.cat(parts)[:limit], torch.cat(part_marks)[:limit]))
        longest = max(len(marks) for _, marks in rows)
        left = self.config.get("tokenizer_padding_side") == "left"
        merged = []
        for embeds, marks in rows:
            gap = longest - len(marks)
            side = (gap, 0) if left else (0, gap)
            mask = F.pad(torch.ones_like(marks).bool(), side)
            merged.append((F.pad(embeds, (0, 0, *side)), mask, F.pad(marks, side, value=NO_LABEL)))
        embeds, masks, marks = zip(*merged, strict=True)
        return torch.stack(embeds), torch.stack(masks), torch.stack(marks)

    def inputs(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        pixel_values: Tensor | None,
    ) -> dict[str, Tensor]:
        """What the decoder reads: clip_features and projector_out (with images), merged_*."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        marks = torch.full_like(input_ids, NO_LABEL) if labels is None else labels
        out: dict[str, Tensor] = {}
        if pixel_values is None:
            embeds, mask = self.llm.model.embed_tokens(input_ids), mask.bool()
        else:
            with torch.no_grad():
                states = self.clip(pixel_values, output_hidden_states=True).hidden_states
            # [:, 1:]: patches only, no class token.
            features = states[self.config.get("mm_vision_select_layer", -2)][:, 1:]
            projected = self.projector.image_spatial_proj(features)
            out |= {"clip_features": features, "projector_out": projected}
            embeds, mask, marks = self.merge(input_ids, mask.bool(), marks, projected)
        names = ("merged_inputs_embeds", "merged_attention_mask", "merged_labels")
        return out | dict(zip(names, (embeds, mask, marks), strict=True))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_values: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Runs the model and returns all that is worth comparing, named as in activation files.

        Args:
          input_ids: i64[B, T], -200 for an image.
          attention_mask: bool[B, T]; None = all True.
          labels: i64[B, T], not shifted, -100 = no loss; None = no losses.
          pixel_values: f32[M, 3, H, W], in row order, with one (zero) image for each row that has
            no image token; None = text only.

        Returns:
          out.clip_features, out.projector_out (with images); out.merged_inputs_embeds,
          out.merged_attention_mask, out.merged_labels; out.layer_NN.hidden, out.layer_00.attn_out,
          out.final_norm, out.logits; for MoE layers out.layer_NN.moe_in, .moe_out, .router_logits,
          .combine_dense, .exp_counts, .l_aux and out.l_aux_all; with labels out.ce_loss, out.loss
          and (MoE) out.moe_loss. l_aux counts all rows, padding included.
        """
        out = self.inputs(input_ids, attention_mask, labels, pixel_values)
        embeds, mask = out["merged_inputs_embeds"], out["merged_attention_mask"]
        hidden = self.llm.model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
        out |= self.captures | {"final_norm": hidden, "logits": self.llm.lm_head(hidden)}
        moe = {i: m.mlp for i, m in enumerate(self.layers) if isinstance(m.mlp, MoeMlp)}
        for i, mlp in moe.items():
            out |= {f"layer_{i:02}.{name}": value for name, value in mlp.seen.items()}
        if moe:
            out["l_aux_all"] = torch.stack([mlp.seen["l_aux"] for mlp in moe.values()])
        if labels is not None:
            logits, marks = out["logits"][:, :-1], out["merged_labels"][:, 1:]
            loss = F.cross_entropy(logits.mT, marks, ignore_index=NO_LABEL)
            out["loss"] = out["ce_loss"] = loss
            if moe:
                coefficient = self.config["moe"]["router_aux_loss_coef"]
                out["moe_loss"] = coefficient * out["l_aux_all"].sum()
                out["loss"] = loss + out["moe_loss"]
        return {f"out.{name}": value for name, value in out.items()}

    @torch.no_grad()
    def generate_greedy(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        max_new_tokens: int = 12,
        eos_id: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Greedy decoding of one prompt, without a cache.

        Args:
          input_ids: i64[1, T], -200 for an image.
          pixel_values: f32[M, 3, H, W], or None for a prompt without an image.
          max_new_tokens: tokens at most.
          eos_id: the token after which decoding stops (it is part of the result); None = never.

        Returns:
          New ids i64[n] and the logits each was chosen from, f32[n, V].
        """
        embeds = self.inputs(input_ids, None, None, pixel_values)["merged_inputs_embeds"]
        ids: list[Tensor] = []
        steps: list[Tensor] = []
        while len(ids) < max_new_tokens and not (ids and ids[-1].item() == eos_id):
            hidden = self.llm.model(inputs_embeds=embeds).last_hidden_state
            steps.append(self.llm.lm_head(hidden[0, -1]))
            ids.append(steps[-1].argmax())
            embeds = torch.cat([embeds, self.llm.model.embed_tokens(ids[-1])[None, None]], 1)
        return torch.stack(ids), torch.stack(steps)


def _language_model(config: dict[str, Any]) -> tuple[Any, Callable[[], nn.Module]]:
    """Dense Hugging Face model of a Med-MoE config.json (any spelling), and a maker of its MLP."""
    phi = "phi" in config["model_type"]
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    fraction = config.get("partial_rotary_factor", config.get("rope_pct", 0.5 if phi else 0.25))
    theta = config.get("rope_theta", 10000.0)
    rope = {"rope_theta": theta, "partial_rotary_factor": fraction, "rope_type": "default"}
    rope |= config.get("rope_parameters") or {}
    fields = {k: config[k] for k in LLM_FIELDS if k in config}
    fields |= {
        "num_key_value_heads": heads,
        "layer_norm_eps": config.get("layer_norm_eps", config.get("norm_eps", 1e-5)),
        "rope_parameters": rope | {"rope_theta": float(rope["rope_theta"])},
        "pad_token_id": None,  # may lie outside of the vocabulary
        "attn_implementation": "eager",
    }
    if phi:
        phi_config = PhiConfig(**fields)
        model: Any = PhiForCausalLM(phi_config)
        # Med-MoE has no bias here, unlike Hugging Face's Phi.
        model.lm_head = nn.Linear(phi_config.hidden_size, phi_config.vocab_size, bias=False)
        return model, lambda: PhiMLP(phi_config)
    lm_config = StableLmConfig(**fields, use_qkv_bias=bool(config.get("use_qkv_bias", False)))
    return StableLmForCausalLM(lm_config), lambda: StableLmMLP(lm_config)
