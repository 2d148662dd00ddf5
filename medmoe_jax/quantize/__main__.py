"""What a model loses with fewer bits: `python -m medmoe_jax.quantize --model-path DIR
--question-file F --image-folder D`.

The model and its quantized copies answer the same questions, and their scores of the next token
are compared at every text token of the prompts. Printed are the bytes of the weights, the largest
and the mean difference of a score, how often the likeliest next token and the whole greedy answer
are the same, and the closed accuracy of each where the file has answers. Both models are in memory
at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from medmoe_jax import metrics, placement, predict, quantize
from medmoe_jax import model as loaded
from medmoe_jax.config import ModelConfig, natural
from medmoe_jax.data import questions
from medmoe_jax.data.problems import DataError
from medmoe_jax.data.questions import Question
from medmoe_jax.evaluation import rows, text
from medmoe_jax.model import Model, Reply, Request
from medmoe_jax.models import medmoe
from medmoe_jax.models.layers import Array, Params
from medmoe_jax.sampling import Sampling


@partial(jax.jit, static_argnames=("cfg", "dtype"))
def differences(
    p: Params, other: Params, cfg: ModelConfig, batch: dict[str, Array], dtype: Any
) -> dict[str, Array]:
    """Compares two models' scores at the text tokens of prompts.

    Args:
      p: parameters of the model, from `generate.for_generation`.
      other: those of its copy.
      cfg: shapes.
      batch: as for `medmoe.forward`, padded on either side (rotary positions are relative).
      dtype: of the computation.

    Returns:
      For each row, f32[B]: `largest` difference of a score, `sum` of them (over V scores a token),
      `spread` (standard deviation of the model's scores, summed over tokens), `same` (tokens whose
      likeliest next token is the same) and `tokens`.
    """
    words = batch["mask"] & (batch["image_pos"] < 0)
    hidden = [medmoe.forward(each, cfg, batch, dtype=dtype)[0] for each in (p, other)]

    # A row at a time: the scores of all rows take much memory with a large vocabulary.
    def row(args: tuple[Array, Array, Array]) -> dict[str, Array]:
        mine, theirs, here = args
        a, b = medmoe.logits(p, mine), medmoe.logits(other, theirs)
        error = jnp.where(here[:, None], jnp.abs(a - b), 0.0)
        return {
            "largest": error.max(),
            "sum": error.sum(),
            "spread": jnp.where(here, a.std(-1), 0.0).sum(),
            "same": (here & (a.argmax(-1) == b.argmax(-1))).sum().astype(jnp.float32),
            "tokens": here.sum().astype(jnp.float32),
        }

    return jax.lax.map(row, (*hidden, words))


def prompts(
    model: Model, asked: Sequence[Question], folder: Path, batch_size: int
) -> Iterator[dict[str, np.ndarray]]:
    """The questions' prompts with their images, in batches of like length.

    Raises:
      DataError: an image cannot be read, or a prompt does not fit the model.
    """
    order = sorted(asked, key=lambda q: (len(q.images), len(q.text)))
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        yield model.prompts(
            [Request(q.text, predict.pixels(q, folder, model.spec, "shown")) for q in part]
        )


def compare(
    model: Model, other: Model, asked: Sequence[Question], folder: Path, batch_size: int
) -> dict[str, float]:
    """`logit_error_max`, `logit_error_mean`, `logit_spread`, `same_next_token` (a share) and
    `tokens` over all prompts; see `differences`."""
    found = [
        jax.device_get(differences(model.params, other.params, model.config, batch, model.dtype))
        for batch in prompts(model, asked, folder, batch_size)
    ]
    table = {k: np.concatenate([each[k] for each in found]).astype(np.float64) for k in found[0]}
    tokens = table["tokens"].sum()
    return {
        "logit_error_max": float(table["largest"].max()),
        "logit_error_mean": float(table["sum"].sum() / tokens / model.config.llm.vocab),
        "logit_spread": float(table["spread"].sum() / tokens),
        "same_next_token": float(table["same"].sum() / tokens),
        "tokens": int(tokens),
    }


def answers(
    model: Model, asked: Sequence[Question], folder: Path, batch_size: int, max_new: int, name: str
) -> list[Reply]:
    """Greedy answers in the order of the questions.

    Raises:
      DataError: a question cannot be answered.
    """
    how = Sampling(max_new_tokens=max_new)
    stream = predict.replies(model, asked, folder, how, batch_size=batch_size)
    found = {}
    for question, reply in tqdm(stream, total=len(asked), desc=name, unit="question"):
        if isinstance(reply, DataError):
            raise DataError(f"question {question.id}: {reply}")
        found[question.row] = reply
    return [found[question.row] for question in asked]


def closed_accuracy(file: Path, replies: Sequence[Reply]) -> float | None:
    """Strict closed accuracy, percent, of answers to the first questions of a file; None where they
    have no closed question with an answer."""
    known = rows.read(file)[: len(replies)]
    said = [{"text": reply.text} for reply in replies]
    paired = [
        rows.pair([row], [answer], "order")[0]
        for row, answer in zip(known, said, strict=True)
        if len(row.get("conversations") or row.get("conversatons") or ()) > 1
    ]
    return metrics.strict(item.answer for item in paired)["aggregate_percent"]["Closed Accuracy"]


def with_params(model: Model, params: Params) -> Model:
    """The model with other weights."""
    return dataclasses.replace(model, params=params)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that is printed, as a dict for JSON."""
    for bits in args.bits:
        quantize.check_settings(bits, args.group, args.parts)
    asked = questions.read_questions(args.question_file)[: args.limit or None]
    model = loaded.load(args.model_path, template=args.conv_mode, dtype=args.dtype)
    most = args.max_new_tokens
    whole = answers(model, asked, args.image_folder, args.batch_size, most, model.dtype.name)
    found: dict[str, Any] = {
        model.dtype.name: {
            "bytes": quantize.nbytes(model.params),
            "closed_accuracy": closed_accuracy(args.question_file, whole),
        }
    }

    def bfloat16() -> Params:
        return placement.in_dtype(model.params, jnp.bfloat16)

    def smaller(bits: int) -> Params:
        return quantize.quantize(model.params, bits, group=args.group, parts=args.parts)

    copies = {} if model.dtype == jnp.bfloat16 else {"bfloat16": bfloat16}
    copies |= {f"int{bits}": partial(smaller, bits) for bits in args.bits}
    for name, make in copies.items():
        other = with_params(model, make())
        said = answers(other, asked, args.image_folder, args.batch_size, most, name)
        same = [a.ids == b.ids for a, b in zip(whole, said, strict=True)]
        found[name] = {
            "bytes": quantize.nbytes(other.params),
            "closed_accuracy": closed_accuracy(args.question_file, said),
            "same_answers": float(np.mean(same)),
            **compare(model, other, asked, args.image_folder, args.batch_size),
        }
    return {"model": str(args.model_path), "questions": len(asked), "weights": found}


def report(found: dict[str, Any]) -> str:
    """The tables as text."""
    head = ["weights", "MB", "of all", "largest logit error", "mean logit error"]
    head += ["same next token", "same answers", "closed accuracy"]
    weights = found["weights"]
    full = sum(next(iter(weights.values()))["bytes"].values())

    def cell(row: dict[str, Any], key: str, form: str) -> str:
        return "-" if row.get(key) is None else form.format(row[key])

    table = []
    for name, row in weights.items():
        size = sum(row["bytes"].values())
        table.append(
            [
                name,
                f"{size / 1e6:,.2f}",
                f"{size / full:.1%}",
                cell(row, "logit_error_max", "{:.3f}"),
                cell(row, "logit_error_mean", "{:.4f}"),
                cell(row, "same_next_token", "{:.2%}"),
                cell(row, "same_answers", "{:.1%}"),
                cell(row, "closed_accuracy", "{:.1f}%"),
            ]
        )
    last = list(weights.values())[-1]
    by_component, *parts = quantize.size_table({k: row["bytes"] for k, row in weights.items()})
    return "\n".join(
        [
            f"{found['questions']} questions, {last['tokens']} text tokens of their prompts; the "
            f"scores of a token have a standard deviation of {last['logit_spread']:.2f}",
            "",
            text.table(head, table),
            "",
            text.table(by_component, parts),
        ]
    )


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m medmoe_jax.quantize",
        description="Measures what a model loses and saves with weights of 8 and 4 bits.",
    )
    add = parser.add_argument
    add("--model-path", type=Path, required=True, help="a model folder or a PyTorch folder")
    add("--question-file", type=Path, required=True, help="JSON or JSONL")
    add("--image-folder", type=Path, required=True)
    add("--bits", type=int, nargs="+", choices=quantize.BITS, default=list(quantize.BITS))
    add(
        "--parts",
        nargs="+",
        choices=list(quantize.PARTS),
        default=list(quantize.ALL),
        help="of the model",
    )
    add("--group", type=int, default=quantize.GROUP, help="inputs that share a step with 4 bits")
    add("--limit", type=natural, default=0, help="take the first questions only; 0 = all")
    add("--batch-size", type=int, default=16)
    add("--max-new-tokens", type=int, default=64)
    add("--conv-mode", default="", help="phi or stablelm; default: the model's")
    add("--dtype", default="", help="default: float32 on a CPU, bfloat16 elsewhere")
    add("--json", type=Path, help="write the figures to this file as well")
    return parser


def main() -> None:
    """Command line."""
    args = arguments().parse_args()
    try:
        found = measure(args)
    except loaded.FAULTS as error:
        sys.exit(f"error: {error}")
    print(report(found))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
