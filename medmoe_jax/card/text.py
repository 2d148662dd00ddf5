"""The text of a model card: Markdown with YAML front matter, as the Hugging Face Hub reads it.

Everything on it is what the model folder (`ModelMeta`, with what each phase recorded, see
`provenance.py`) and the reports of `evaluate` say; what they do not say is called unknown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from medmoe_jax import provenance
from medmoe_jax.checkpoint import ModelMeta
from medmoe_jax.config import MODALITIES
from medmoe_jax.evaluation.text import table

UNKNOWN = "unknown"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")  # a model's name on the Hugging Face Hub
FAMILIES = {"phi": "Phi-2 family", "stablelm": "StableLM-2 family"}
TAGS = ("medical", "visual-question-answering", "jax", "not-for-clinical-use")
# Figures of a report -> what the Hub calls such a metric.
METRIC_TYPES = {"accuracy": "accuracy", "recall": "recall", "F1": "f1", "match": "exact_match"}
OPTIM = ("lr", "schedule", "warmup", "batch_size", "accumulate", "weight_decay", "clip_norm")
RUN = ("template", "image_aspect", "max_length", "batching")
CITATION = """```bibtex
@misc{jiang2024medmoe,
  title = {Med-MoE: Mixture of Domain-Specific Experts for Lightweight Medical Vision-Language
           Models},
  author = {Jiang, Songtao and Zheng, Tuo and Zhang, Yan and Jin, Yeying and Yuan, Li and
            Liu, Zuozhu},
  year = {2024}
}
```"""

Json = dict[str, Any]


def card(
    meta: ModelMeta,
    reports: Mapping[str, Json],
    *,
    name: str,
    licence: str = "",
) -> str:
    """The model card.

    Args:
      meta: of the model folder.
      reports: file name -> report, see `read_metrics`.
      name: of the model.
      licence: of its weights, SPDX identifier; "" = unknown.
    """
    parts = [
        f"---\n{_front_matter(meta, reports, name, licence)}\n---",
        f"# {name}",
        "**Not for clinical use.** Research software: no answer of this model may decide anything "
        "about a patient.",
        _what(meta),
        f"## How it was made\n\n{_history(meta)}",
        f"## Data and licences\n\n{_data(meta, licence)}",
        f"## Training settings\n\n{_settings(meta)}",
        f"## Figures\n\n{_figures(reports)}",
        f"## Router\n\n{_router(meta)}",
        f"## Limits\n\n{_limits(meta, reports)}",
        f"## Use\n\n{_use(name)}",
        f"## Citation\n\nThe method is that of this paper:\n\n{CITATION}",
    ]
    return "\n\n".join(parts) + "\n"


def base_models(meta: ModelMeta) -> list[str]:
    """Names on the Hub that the PyTorch configurations of language model and tower give
    themselves; paths of somebody's disk are left out."""
    named = [(c or {}).get("_name_or_path") or "" for c in (meta.torch_config, meta.clip_config)]
    return [one for one in named if HUB_ID.fullmatch(one)]


def data_sets(meta: ModelMeta) -> dict[str, Json]:
    """Name or file -> what is known of everything that any phase read."""
    files = [file for phase in meta.phases for file in phase["files"]]
    return {file["name"] or _short(file["file"]): file for file in files}


def _front_matter(meta: ModelMeta, reports: Mapping[str, Json], name: str, licence: str) -> str:
    named = sorted({f["name"] for f in data_sets(meta).values() if f["name"]})
    results = [
        EvalResult(
            task_type="visual-question-answering",
            dataset_type=_asked(file, report),
            dataset_name=_asked(file, report),
            metric_type=next((t for w, t in METRIC_TYPES.items() if w in figure), "other"),
            metric_name=figure,
            metric_value=round(percent, 2),
        )
        for file, report in reports.items()
        for figure, percent in report["summary"].items()
        if percent is not None
    ]
    data = ModelCardData(
        license=licence.lower() or UNKNOWN,
        library_name="medmoe_jax",
        pipeline_tag="image-text-to-text",
        base_model=base_models(meta) or None,
        datasets=named or None,
        tags=[*TAGS, *(["mixture-of-experts"] if meta.model.moe else [])],
        eval_results=results or None,
        model_name=name if results else None,
    )
    return data.to_yaml()


def _what(meta: ModelMeta) -> str:
    vision, llm, moe = meta.model.vision, meta.model.llm, meta.model.moe
    family = FAMILIES.get(llm.family, llm.family)
    kind = "a Med-MoE model" if moe else "a model on the way to Med-MoE, still without experts"
    lines = [
        f"This is {kind} of stage `{meta.stage}`: it answers questions about medical images. A "
        "CLIP vision tower, a projector and a small language model, in JAX.",
        "",
        f"- language model: {family}, width {llm.width}, {llm.layers} layers, vocabulary "
        f"{llm.vocab:,}, {llm.max_positions:,} positions",
        f"- vision tower: {vision.image_size} pixels, patches of {vision.patch_size}, width "
        f"{vision.width}, {vision.layers} layers; {vision.patches} tokens an image",
    ]
    if moe:
        meta_expert = "with" if moe.meta else "without"
        mixed = ", mixed with the meta expert by learnt weights" if moe.use_residual else ""
        placed = ", ".join(map(str, meta.model.moe_layers))
        lines.append(
            f"- experts: top-{moe.top_k} of {moe.experts}, {meta_expert} meta expert, in layers "
            f"{placed}{mixed}; the router has {moe.router_layers} layer(s)"
        )
    if meta.delta:
        lines.append(
            f"- adapters alone (LoRA, rank {meta.delta.lora.rank}): they belong to the model "
            f"`{_short(meta.delta.base)}`"
        )
    numbers = meta.phases[-1]["parameters"]["all"] if meta.phases else None
    lines.append(f"- parameters: {UNKNOWN if numbers is None else f'{numbers:,}'}")
    lines.append(f"- base models: {', '.join(base_models(meta)) or UNKNOWN}")
    return "\n".join(lines)


def _history(meta: ModelMeta) -> str:
    lines = [f"{i}. {line}" for i, line in enumerate(meta.history, 1)]
    text = "\n".join(lines) or f"The steps that made it are {UNKNOWN}."
    if not meta.phases:
        return f"{text}\n\nNo phase of training is recorded in the folder."
    head = ("phase", "steps", "rows", "left out", "trained", "loss at the end", "devices")
    rows = [
        (
            phase["phase"],
            f"{phase['steps']:,}",
            f"{phase['rows']['used']:,}",
            f"{phase['rows']['left_out']:,}",
            f"{phase['parameters']['trained']:,}",
            f"{phase['outcome']['loss']:.3f}" if "loss" in phase["outcome"] else UNKNOWN,
            phase["devices"],
        )
        for phase in meta.phases
    ]
    return f"{text}\n\n{table(head, rows)}"


def _data(meta: ModelMeta, licence: str) -> str:
    found = data_sets(meta)
    if not found:
        text = f"What the model was trained on is {UNKNOWN}: no phase is recorded in the folder."
    else:
        text = table(
            ("file", "data set", "phase", "rows", "SHA-256"),
            [
                (
                    _short(file["file"]),
                    file["name"] or UNKNOWN,
                    phase["phase"],
                    f"{file['rows']:,}",
                    (file["sha256"] or UNKNOWN)[:16],
                )
                for phase in meta.phases
                for file in phase["files"]
            ],
        )
        text += "\n\n" + "\n".join(_licence_lines(found))
    own = f"`{licence}`, as stated when this card was written" if licence else UNKNOWN
    return (
        f"{text}\n\nLicence of the weights: {own}. The terms of the base models and of the data "
        "sets hold beside it."
    )


def _licence_lines(found: Mapping[str, Json]) -> list[str]:
    lines = []
    for name, file in found.items():
        if file["licences"] is None:
            lines.append(f"- {name}: licence {UNKNOWN} ({file['why']})")
        for one in file["licences"] or ():
            parts = (one["name"], one["link"], one["note"], one["citation"])
            lines.append(f"- {name}: " + ". ".join(_flat(part) for part in parts if part))
        if file["licences"] == []:
            lines.append(f"- {name}: licence {UNKNOWN} (its preparation names none)")
    return lines


def _settings(meta: ModelMeta) -> str:
    if not meta.phases:
        return f"{UNKNOWN.capitalize()}: no phase is recorded in the folder."
    columns = []
    for phase in meta.phases:
        s = phase["settings"]
        columns.append(
            {
                "started from": _short(phase["init"]),
                "objective": s["objective"],
                "trained": " ".join(s["train"]),
                "start of the experts": s["upcycle"] if s["model"]["moe"] else "-",
            }
            | {name: s["optim"][name] for name in OPTIM}
            | {name: s["data"][name] for name in RUN}
            | {"seed": s["seed"], "computed in": s["compute_dtype"]}
            | {name: phase["versions"][name] or UNKNOWN for name in provenance.LIBRARIES}
        )
    names = [phase["phase"] for phase in meta.phases]
    rows = [(key, *(str(column[key]) for column in columns)) for key in columns[0]]
    return table(("setting", *names), rows)


def _figures(reports: Mapping[str, Json]) -> str:
    if not reports:
        return f"{UNKNOWN.capitalize()}: no report of `medmoe_jax.evaluate` was given."
    return "\n\n".join(_report(file, report) for file, report in reports.items())


def _report(file: str, report: Json) -> str:
    models = ", ".join(f"`{_short(model)}`" for model in report.get("models", ())) or UNKNOWN
    lines = [
        f"### {_asked(file, report)}",
        "",
        f"{report['n']:,} questions about {report['n_images']:,} images ({_short(file)}). The "
        f"answers name as their model: {models}.",
        "",
    ]
    rows = [
        (name, _number(percent), _interval(report["summary_ci95"][name]), f"{n:,}")
        for (name, percent), n in zip(
            report["summary"].items(), report["summary_n"].values(), strict=True
        )
    ]
    lines.append(table(("figure", "percent", "95 % interval", "n"), rows))
    for name, control in report["controls"].items():
        lines += ["", f"Against images that are {name}, difference in points:", ""]
        lines.append(
            table(
                ("figure", "shown", name, "difference", "95 % interval"),
                [
                    (
                        figure,
                        _number(cell["shown_percent"]),
                        _number(cell["control_percent"]),
                        _number(cell["difference"]),
                        _interval(cell["ci95"]),
                    )
                    for figure, cell in control["figures"].items()
                ],
            )
        )
    if report["confidence"]:
        every = report["confidence"]["all"]
        lines += [
            "",
            f"Confidence (probability of the whole answer): expected calibration error "
            f"{every['ece']:.3f}, Brier score {every['brier']:.3f}, n = {every['n']:,}.",
        ]
    return "\n".join(lines)


def _router(meta: ModelMeta) -> str:
    found = [p["outcome"]["router"] for p in meta.phases if "router" in p["outcome"]]
    if not found:
        return f"Its accuracy is {UNKNOWN}: no router phase is recorded in the folder."
    report = found[-1]
    if not report["n"]:
        return f"Its accuracy is {UNKNOWN}: there were no held-out rows with a modality."
    classes = report["classes"]
    rows = [
        (name, *map(str, counts)) for name, counts in zip(classes, report["confusion"], strict=True)
    ]
    return (
        f"Right in {report['accuracy']:.1%} of {report['n']:,} held-out samples, and in "
        f"{report['token_accuracy']:.1%} of single tokens. Rows are the truth, columns what the "
        f"router said:\n\n{table(('', *classes), rows)}"
    )


def _limits(meta: ModelMeta, reports: Mapping[str, Json]) -> str:
    vision, llm = meta.model.vision, meta.model.llm
    lines = [
        "Answers are generated text. They can be wrong, and sure of it.",
        f"An image is seen as {vision.patches} patches at {vision.image_size} pixels; finer detail "
        "is lost.",
        f"A conversation has at most {llm.max_positions:,} tokens, images included.",
    ]
    if meta.model.moe and meta.model.moe.experts == len(MODALITIES):
        lines.append(
            f"The router knows {', '.join(MODALITIES)} and calls everything one of them; it has no "
            "'none of these'."
        )
    lines.append(
        "The figures above hold for the questions they were measured on, and for no others."
        if reports
        else "How well it answers questions it has not seen is unknown."
    )
    lacking = sorted({name for name, file in data_sets(meta).items() if file["licences"] is None})
    if lacking:
        lines.append(f"The licence of {', '.join(lacking)} is not recorded: find it before use.")
    dropped = sum(phase["rows"]["left_out"] for phase in meta.phases)
    if dropped:
        lines.append(f"{dropped:,} rows of the training data could not be used.")
    if not meta.phases:
        lines.append("How it was trained is not recorded.")
    return "\n".join(f"- {line}" for line in lines)


def _use(name: str) -> str:
    return f"""```python
import medmoe_jax

model = medmoe_jax.load("{name}")  # this folder
reply = model.generate("Is there a lesion?", "image.png", options=("yes", "no"))
print(reply.text, reply.confidence, reply.options, reply.modality)
```

As PyTorch files, in the layout that Med-MoE's own classes load:

```
python -m medmoe_jax.convert to-torch {name} exported
```"""


def _asked(file: str, report: Json) -> str:
    """What the questions of a report are called: data set and file, or the report's file."""
    gt = report.get("gt")
    if gt is None:
        return Path(file).stem
    name = provenance.data_set(gt)["name"]
    return f"{name} {Path(gt).stem}" if name else Path(gt).stem


def _short(path: str) -> str:
    """The last two parts of a path: the rest says where somebody's disk has it."""
    return "/".join(Path(path).parts[-2:])


def _flat(text: str) -> str:
    return " ".join(text.split()).rstrip(".")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _interval(pair: Sequence[float] | None) -> str:
    return "-" if pair is None else f"{pair[0]:.1f} to {pair[1]:.1f}"
