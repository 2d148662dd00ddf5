"""Compares a model with an activation file, tensor by tensor: `python -m medmoe_jax.convert check`.

An activation file is a `.safetensors` with the inputs of the PyTorch model (`input_ids`,
`attention_mask`, `labels`, `pixel_values`, `gen.KIND.input_ids`, ...) and what it computed from
them (`out.*`, `gen.KIND.new_ids`, ...). The JAX model runs on the same inputs in float32. Numbers
must agree within a tolerance; masks, labels, router choices and generated ids must be equal.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from medmoe_jax import generate, losses, sampling
from medmoe_jax.checkpoint import load_model
from medmoe_jax.config import ModelConfig
from medmoe_jax.convert.comparison import GENERATED, RESULTS, Result, compare
from medmoe_jax.convert.folder import model_folder
from medmoe_jax.convert.report import ConversionError
from medmoe_jax.data import merge
from medmoe_jax.data.problems import DataError
from medmoe_jax.data.tokens import IMAGE_ID
from medmoe_jax.models import clip, medmoe, projector

Arrays = dict[str, np.ndarray]

_NEED_LABELS = {"out.merged_labels", "out.ce_loss", "out.loss"}


def check(
    src: str | Path, io: str | Path, atol: float = 1e-4, vision: str | Path | None = None
) -> Result:
    """Runs the model of a folder on the inputs of an activation file and compares the outputs.

    Args:
      src: a PyTorch folder of the official layout (stage 2 or 3), or a model folder.
      io: the activation file.
      atol: largest absolute error of a number.
      vision: CLIP folder, where `src` is a PyTorch folder that does not have it.

    Raises:
      ConversionError: the folder or the file cannot be read, or an input is missing.
      CheckpointError: a model folder that is not complete.
    """
    params, model = read(src, vision)
    want = _read_io(Path(io))
    # Accelerators would round the factors of products otherwise.
    with jax.default_matmul_precision("highest"):
        got: Arrays = {}
        if any(RESULTS.fullmatch(key) for key in want):
            got |= activations(params, model, want, str(io))
        if any(GENERATED.fullmatch(key) for key in want):
            got |= generations(params, model, want, str(io))
    return compare(got, want, atol)


def main(args: argparse.Namespace) -> int:
    """Prints the comparison of `args.src` with `args.io`; returns the exit status, 0 = all pass."""
    result = check(args.src, args.io, args.atol, args.vision)
    print(result.text())
    return 0 if result.ok else 1


def read(src: str | Path, vision: str | Path | None = None) -> tuple[dict[str, Any], ModelConfig]:
    """Parameters (float32, on the device) and shapes of the model in a folder of either kind.

    Raises:
      ConversionError: not a whole Med-MoE model.
      CheckpointError: a model folder that is not complete.
    """
    with model_folder(src, vision) as folder:
        params, meta = load_model(folder)
    absent = [part for part in ("vision", "projector", "llm") if part not in params]
    if absent:
        raise ConversionError(
            f"{src}: holds no {' and no '.join(absent)}; the check needs a whole Med-MoE model "
            "(`convert to-jax` joins the parts)"
        )
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params), meta.model


def _read_io(path: Path) -> Arrays:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConversionError(
            f"{path}: cannot be read ({error}); give a .safetensors file of activations"
        ) from error


def activations(params: dict[str, Any], cfg: ModelConfig, io: Arrays, where: str) -> Arrays:
    """Everything named `out.*` that the model computes from a batch.

    Args:
      params: f32 parameters, see `models.medmoe.leaves`.
      cfg: shapes.
      io: input_ids i64[B, S], pixel_values f32[N, 3, H, W] and, where given, attention_mask
        bool[B, S] and labels i64[B, S], as the official model's forward takes them.
      where: what messages call the file.

    Returns:
      Arrays by name, in the order of the computation, in float32 or integers. Padding counts in
      `l_aux` and in `exp_counts`, as in the official code.

    Raises:
      ConversionError: an input is missing or does not fit the model.
    """
    ids = _need(io, "input_ids", where, "it is what the model reads")
    hint = "it needs one image for every image token, and one of zeros for every row without any"
    pixels = _need(io, "pixel_values", where, hint)
    labels = io.get("labels")
    if labels is None and any(key in io for key in _NEED_LABELS):
        _need(io, "labels", where, "the losses in the file were computed with it")
    batch = _batch(cfg, ids, io.get("attention_mask"), labels, pixels, where)
    run = {key: batch[key] for key in ("tokens", "image_pos", "mask", "images", "labels")}
    out = jax.device_get(_run(params, cfg, run, pixels.transpose(0, 2, 3, 1)))
    got = {
        "clip_features": out["features"],
        "projector_out": out["projected"],
        "merged_inputs_embeds": out["merged"],
        "merged_attention_mask": batch["mask"],
        "merged_labels": batch["labels"],
    }
    for i in range(cfg.llm.layers):
        name = f"layer_{i:02}"
        got[f"{name}.attn_out"] = out["attn_out"][i]
        if i in cfg.moe_layers:
            got |= {f"{name}.{k}": v for k, v in _routing(out, cfg.moe_layers.index(i)).items()}
        got[f"{name}.hidden"] = out["hidden"][i]
    got |= {"final_norm": out["final_norm"], "logits": out["logits"]}
    aux = np.zeros((), np.float32)
    if cfg.moe:
        got["l_aux_all"] = out["aux"]
        got["moe_loss"] = aux = np.float32(cfg.moe.aux_coef) * out["aux"].sum()
    if labels is not None:
        got |= {"ce_loss": out["ce_loss"], "loss": out["ce_loss"] + aux}
    else:
        del got["merged_labels"]
    return {f"out.{name}": np.asarray(value) for name, value in got.items()}


def _routing(out: dict[str, Any], place: int) -> Arrays:
    """What the `place`-th MoE layer did, tokens of all rows in one axis."""
    logits = out["router_logits"][place]
    experts = logits.shape[-1]
    return {
        "moe_in": out["moe_in"][place],
        "router_logits": logits.reshape(-1, experts),
        "combine_dense": out["combine"][place].reshape(-1, experts),
        "exp_counts": np.bincount(logits.argmax(-1).reshape(-1), minlength=experts),
        "l_aux": out["aux"][place],
        "moe_out": out["moe_out"][place],
    }


@partial(jax.jit, static_argnames="cfg")
def _run(
    p: dict[str, Any], cfg: ModelConfig, batch: dict[str, jax.Array], pixels: jax.Array
) -> dict[str, jax.Array]:
    features = clip.features(p["vision"], cfg.vision, pixels)
    hidden, reports = medmoe.forward(p, cfg, batch, official_aux=True, capture=True)
    total, count = losses.answer_loss(hidden, lambda h: medmoe.logits(p, h), batch["labels"])
    return reports | {
        "features": features,
        "projected": projector.project(p["projector"], features),
        "final_norm": hidden,
        "logits": medmoe.logits(p, hidden),
        "ce_loss": total.sum() / count.sum(),
    }


def generations(params: dict[str, Any], cfg: ModelConfig, io: Arrays, where: str) -> Arrays:
    """Greedy continuations of the prompts `gen.KIND.*`, all of them as one batch.

    Args:
      params: f32 parameters, see `models.medmoe.leaves`.
      cfg: shapes.
      io: for every KIND with results in it, input_ids i64[1, S] and, where it has image tokens,
        pixel_values f32[M, 3, H, W]; eos_stop_id i64[1] where there is `new_ids_eos_stop`. The
        results' sizes say how many ids are wanted.
      where: what messages call the file.

    Returns:
      `gen.KIND.new_ids` i32[n], `.step_logits` f32[n, V] (the scores each id was chosen by) and,
      where there is an `eos_stop_id`, `.new_ids_eos_stop`, which ends with that id.

    Raises:
      ConversionError: an input is missing or does not fit the model.
    """
    results = [match for key in io if (match := GENERATED.fullmatch(key))]
    kinds = sorted({match[1] for match in results})
    longest = max(len(io[match[0]]) for match in results)
    batch = generate.left_padded(_prompts(cfg, io, kinds, where))
    arrays = {key: batch[key] for key in ("tokens", "image_pos", "mask", "images")}

    ready = generate.for_generation(params, cfg)
    settings = sampling.knobs(sampling.Sampling(), [0] * len(kinds))

    def greedy(eos: int) -> dict[str, Any]:
        stop, dtype = jnp.int32(eos), jnp.float32
        state, _ = generate.read(ready, cfg, arrays, dtype=dtype, room=longest)
        found = generate.answers(
            ready,
            cfg,
            state,
            stop,
            settings,
            max_new=longest,
            every=longest,
            dtype=dtype,
            keep_logits=True,
        )
        *_, (_, done) = found
        return jax.device_get(done)._asdict()

    got: Arrays = {}
    free = greedy(-1)
    for row, kind in enumerate(kinds):
        for name, field in (("new_ids", "ids"), ("step_logits", "step_logits")):
            wanted = io.get(f"gen.{kind}.{name}")
            if wanted is not None:
                got[f"gen.{kind}.{name}"] = free[field][row, : len(wanted)]
        if f"gen.{kind}.new_ids_eos_stop" in io:
            why = "new_ids_eos_stop was generated with it"
            stopped = greedy(int(_need(io, f"gen.{kind}.eos_stop_id", where, why)[0]))
            got[f"gen.{kind}.new_ids_eos_stop"] = stopped["ids"][row, : stopped["lengths"][row]]
    return got


def _prompts(cfg: ModelConfig, io: Arrays, kinds: list[str], where: str) -> Arrays:
    """The prompts of all kinds as one Batch, padded on the right."""
    prompts, images = [], []
    side = cfg.vision.image_size
    for kind in kinds:
        ids = _need(io, f"gen.{kind}.input_ids", where, "it is the prompt of the generated ids")
        if ids.ndim != 2 or len(ids) != 1:
            raise ConversionError(
                f"{where}: gen.{kind}.input_ids has shape {ids.shape}; write one prompt [1, S]"
            )
        prompts.append(ids[0])
        if IMAGE_ID in ids:
            images.append(_need(io, f"gen.{kind}.pixel_values", where, "its prompt has an image"))
        else:
            images.append(np.zeros((1, 3, side, side), np.float32))
    length = max(map(len, prompts))
    ids = np.stack([np.pad(prompt, (0, length - len(prompt))) for prompt in prompts])
    used = np.arange(length)[None] < np.array([len(prompt) for prompt in prompts])[:, None]
    shapes = {image.shape[1:] for image in images}
    if shapes != {(3, side, side)}:
        raise ConversionError(
            f"{where}: gen.*.pixel_values has images of {sorted(shapes)}; the model reads "
            f"{(3, side, side)}"
        )
    return _batch(cfg, ids, used, None, np.concatenate(images), where)


def _batch(
    cfg: ModelConfig,
    ids: np.ndarray,
    used: np.ndarray | None,
    labels: np.ndarray | None,
    pixels: np.ndarray,
    where: str,
) -> Arrays:
    vision = cfg.vision
    words = ids[(ids != IMAGE_ID) & (True if used is None else used.astype(bool))]
    if words.size and words.max() >= cfg.llm.vocab:
        raise ConversionError(
            f"{where}: token id {words.max()} does not exist in a vocabulary of {cfg.llm.vocab}; "
            "the file belongs to another model"
        )
    try:
        return merge.from_official(ids, used, labels, pixels, vision.patches, vision.image_size)
    except DataError as error:
        raise ConversionError(f"{where}: {error}; the file belongs to another model") from error


def _need(io: Arrays, key: str, where: str, why: str) -> np.ndarray:
    """The tensor `key`. Raises ConversionError where the file does not have it."""
    if key not in io:
        raise ConversionError(
            f"{where}: key {key!r} is missing: {why}; write it into the file beside the results"
        )
    return io[key]
