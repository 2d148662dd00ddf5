"""What models cost (Table 8) and how large they are (Table 14)."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import jax

from medmoe_jax import info, layout, presets, sharding, step
from medmoe_jax import model as loaded
from medmoe_jax.config import ModelConfig, MoeConfig, RunConfig
from medmoe_jax.data import images, questions, sources
from medmoe_jax.experiments import paper
from medmoe_jax.experiments.cells import Cell, Json, Store
from medmoe_jax.experiments.config import LLMS, override
from medmoe_jax.experiments.result import Claim, Experiment, Result, Table, paper_table
from medmoe_jax.experiments.study import Study
from medmoe_jax.experiments.variants import variant
from medmoe_jax.plan import programs
from medmoe_jax.sampling import Sampling

COSTS = "costs.json"
ASKED = 10  # questions whose answers are timed, one by one, after one that is not
LANGUAGE = ("vision tower", "projector")  # not part of the language model
NAMES = {"phi": "Phi2", "stablelm": "StableLM"}  # as the paper's tables have them


def training_memory(run: RunConfig) -> dict[str, float]:
    """Bytes of a device that one training step takes, as the compiler says.

    Args:
      run: phase 3; the first of its buckets is the length of a row.

    Returns:
      weights and optimiser (held between steps), working (beside them, at its highest), total.
    """
    mesh = sharding.make_mesh(run.mesh)
    length = run.data.buckets[0] if run.data.buckets else run.data.max_length
    given = programs.abstract(run, mesh, length, 1)
    with jax.set_mesh(mesh):
        made = step.make_step(run, layout.model_of(run), given.tx, given.state)
        memory: Any = made.lower(given.state, given.frozen, given.batch).compile().memory_analysis()
    groups = given.groups
    held = groups["trainable"] + groups["frozen"] + groups["optimiser"]
    # Outputs that reuse the buffers of arguments take no memory of their own.
    working = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "weights": groups["trainable"] + groups["frozen"],
        "optimiser": groups["optimiser"],
        "working": float(working),
        "total": held + groups["batch"] + float(working),
    }


def answering(folder: Path, file: Path, image_folder: str, new_tokens: int) -> dict[str, float]:
    """Bytes of the loaded weights and the median seconds of an answer, one question at a time."""
    model = loaded.load(folder)
    asked = questions.read_questions(file)[: ASKED + 1]
    place = sources.image_folder_of(str(file), image_folder)
    seconds = []
    for question in asked:
        shown = [images.find_image(place, name) for name in question.images]
        started = time.perf_counter()
        model.generate(question.text, shown, Sampling(max_new_tokens=new_tokens))
        seconds.append(time.perf_counter() - started)
    timed = sorted(seconds[1:] or seconds)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    return {"load": float(held), "answer": timed[len(timed) // 2]}


def cost(study: Study, llm: str, name: str) -> Cell:
    """The cell that measures one variant of phase 3 of the first seed."""
    seed, how = study.first, study.cfg.answers
    model = study.stage3(llm, seed, name)
    run = override(study.cfg.phases(llm).stage3, variant(study.cfg, name).changes)
    spec: Json = {"kind": "costs", "new tokens": how.max_new_tokens, "batch": run.optim.batch_size}

    def make(folder: Path, parents: list[Path]) -> None:
        data = parents[1] if study.phantoms else None
        file = Path(study.paths("tests", data)[0])
        found = {
            "parameters": info.components(layout.model_of(run)),
            "training": training_memory(run),
            "answering": answering(
                parents[0] / "model", file, study.images(data), how.max_new_tokens
            ),
            "batch": run.optim.batch_size,
        }
        (folder / COSTS).write_text(json.dumps(found) + "\n")

    return Cell(f"costs-{model.name}", spec, (model, *study.data(seed)), make)


def _rows8(study: Study) -> dict[str, Cell]:
    rank = max(study.cfg.lora_ranks)
    plain = {name: cost(study, llm, "moe") for llm, name in LLMS.items()}
    lora = {
        f"{name}, LoRA rank {rank}": cost(study, llm, f"lora{rank}") for llm, name in LLMS.items()
    }
    return plain | lora


def table8(name: str, study: Study, store: Store, _: Path) -> Result:
    """Parameters, memory and time."""
    found = {
        title: json.loads((store.place(cell) / COSTS).read_text())
        for title, cell in _rows8(study).items()
    }
    rows = []
    for title, costs in found.items():
        total, active = language_model(costs["parameters"])
        training, answer = costs["training"], costs["answering"]
        rows.append(
            (
                *(title, f"{active / 1e6:.2f}M", f"{total / 1e6:.2f}M"),
                *(_mb(training[part]) for part in ("total", "optimiser", "working")),
                *(_mb(answer["load"]), f"{answer['answer']:.2f} s"),
            )
        )
    columns = (
        *("", "activated", "total", "training memory", "of it optimiser", "of it working"),
        *("load memory", "an answer"),
    )
    names = list(found)
    claims = []
    for full, lora in zip(names[:2], names[2:], strict=True):
        a, b = (found[title]["training"]["total"] for title in (full, lora))
        text = f"{full}: LoRA takes less memory in training"
        claims.append(Claim(text, (b < a) - (b > a), f"{_mb(b)} against {_mb(a)}"))
    notes = (
        "Training memory is that of the compiled step: weights, optimiser, batch and what is "
        "needed beside them. Activated and total parameters are the language model's. Load memory "
        "is the weights' as generation holds them; an answer is the median of "
        f"{ASKED} questions, one at a time. One seed: nothing here depends on it but the times.",
    )
    tables = (Table("Here", columns, tuple(rows)), paper_table(*_printed(name)))
    return Result(name, TITLES[name], tables, tuple(claims), notes, data=found)


def table14(name: str, study: Study, _: Store, __: Path) -> Result:
    """Sizes of the full models and of this study's."""
    rows, claims, data = [], [], {}
    for llm, preset in (("stablelm", "stablelm"), ("phi", "phi2")):
        for moe in (None, MoeConfig()):
            model = presets.model(preset, moe)
            title = f"Med-MoE ({NAMES[llm]})" if moe else LLMS[llm]
            rows.append(_row14(title, model))
            data[title] = info.components(model)
            if moe:
                claims += _claims14(title, model, llm)
    for llm, title in LLMS.items():
        model = study.cfg.phases(llm).stage3.model
        rows.append(_row14(f"this study, {title}", model))
    columns = (
        *("", "experts", "activated experts", "MoE layers", "width", "layers"),
        *("activated", "total", "total without meta expert"),
    )
    notes = (
        "Language model only. Activated: top-1 and the meta expert in each MoE layer. The paper's "
        "totals leave the meta expert out.",
    )
    tables = (Table("Here", columns, tuple(rows)), paper_table(*_printed(name)))
    return Result(name, TITLES[name], tables, tuple(claims), notes, data=data)


def language_model(parts: dict[str, Any]) -> tuple[int, int]:
    """(total, activated) parameters of the language model."""
    kept = [v for k, v in parts.items() if k not in LANGUAGE]
    return sum(v[0] for v in kept), sum(v[1] for v in kept)


def _row14(title: str, model: ModelConfig) -> tuple[str, ...]:
    parts = info.components(model)
    total, active = language_model(parts)
    without = total - parts.get("meta expert", (0, 0))[0]
    moe = model.moe
    unit, word = (1e9, "B") if total >= 1e8 else (1e6, "M")
    shape = (
        *((moe.experts, moe.active + moe.meta) if moe else ("-", "-")),
        *(len(model.moe_layers), model.llm.width, model.llm.layers),
    )
    sizes = (f"{n / unit:.2f}{word}" for n in (active, total, without))
    return (title, *map(str, shape), *sizes)


def _claims14(title: str, model: ModelConfig, llm: str) -> list[Claim]:
    """Whether the paper's two numbers are those of the shapes, to its one decimal."""
    parts = info.components(model)
    total, active = language_model(parts)
    without = total - parts["meta expert"][0]
    found = []
    for what, number, printed in zip(
        ("activated parameters", "total parameters, meta expert left out"),
        (active, without),
        info.PAPER[llm],
        strict=True,
    ):
        same = round(number / 1e9, 1) == printed
        evidence = f"{number / 1e9:.2f}B counted"
        found.append(Claim(f"{title}: {printed}B {what}", 1 if same else -1, evidence))
    return found


def _printed(name: str) -> tuple[str, paper.PaperTable]:
    return f"The paper's {name.replace('table', 'Table ')}", paper.TABLES[name]


def _mb(number: float) -> str:
    """Bytes in words."""
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


TITLES = {
    "table8": "Table 8: what the models cost",
    "table14": "Table 14: sizes",
}
TABLE8 = Experiment(TITLES["table8"], lambda study: list(_rows8(study).values()), table8)
TABLE14 = Experiment(TITLES["table14"], lambda study: [], table14)
