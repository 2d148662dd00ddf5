"""A program that compares generation on meshes of eight virtual CPU devices with that on one
device, and prints what it found as JSON, one object a line.

`test_mesh_generation.py` runs it: the number of devices is fixed once JAX has started.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import small_models
import tiny_runs
from flax.traverse_util import flatten_dict, unflatten_dict

import medmoe_jax
from medmoe_jax import checkpoint, generate, lora, placement, quantize, sampling, sharding
from medmoe_jax.config import LoraConfig, MoeConfig, RunConfig
from medmoe_jax.model import Model, Reply
from medmoe_jax.models import medmoe

DEVICES = 8
QUESTIONS = ("Is there a lesion?", "Which lung?", "What was used to take this image?")
OPTIONS = ("yes", "no", "left lung")


class Case(NamedTuple):
    """A model and the devices along data, fsdp and expert."""

    family: str
    top_k: int
    experts: int
    mesh: tuple[int, int, int]
    bits: int = 0
    rank: int = 0  # of adapters beside weights of 8 bits

    def __str__(self) -> str:
        bits = f"-int{self.bits}" if self.bits else ""
        bits += f"-rank{self.rank}" if self.rank else ""
        return "-".join(map(str, (*self[:3], "x".join(map(str, self.mesh))))) + bits


MESHES = ((8, 1, 1), (1, 8, 1), (1, 2, 4), (2, 1, 4), (2, 2, 2), (4, 1, 2))
QUICK = (Case("stablelm", 2, 4, (2, 2, 2)),)  # and a batch alone
ALL = [
    Case(family, top_k, 4, mesh)
    for mesh in MESHES
    for family in ("phi", "stablelm")
    for top_k in (1, 2)
]
REST = (
    *(case for case in ALL if case not in QUICK),
    Case("phi", 2, 6, (4, 1, 2)),
    Case("stablelm", 1, 3, (1, 2, 4)),  # experts that four devices do not divide
    *(Case("stablelm", 2, 4, (2, 2, 2), bits) for bits in (8, 4)),
    *(Case("phi", 1, 4, (1, 2, 4), bits) for bits in (8, 4)),
    Case("phi", 2, 3, (1, 1, 8), 4),  # neither experts nor groups can be shared out
    Case("phi", 2, 4, (1, 2, 4), 8, 2),
    Case("stablelm", 1, 4, (2, 2, 2), 8, 2),
)
GROUP = 4  # inputs that share a step size with 4 bits


@functools.cache
def folder(family: str, top_k: int, experts: int) -> Path:
    """A model whose parameters all have an effect."""
    path, moe = Path(tempfile.mkdtemp()), MoeConfig(experts, top_k)
    tiny_runs.save_start(path, family, moe)
    cfg = tiny_runs.model_config(family, moe)
    params = small_models.fill(medmoe.shapes(cfg))
    checkpoint.save_model(path, params, checkpoint.ModelMeta("stage3", cfg))
    return path


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)


def numbers(replies: list[Reply]) -> dict[str, Any]:
    """What replies hold: ids, which must be equal, and numbers."""
    return {
        "ids": [list(reply.ids) for reply in replies],
        "log_probs": [p for reply in replies for p in reply.log_probs],
        "modality": [p for reply in replies for p in (reply.modality or {}).values()],
        "options": [p for reply in replies for p in (reply.options or {}).values()],
    }


def said(model: Model, quick: bool) -> dict[str, dict[str, Any]]:
    """Answers of all kinds: a batch of three; unless `quick`, one alone, beams, a conversation."""
    how = medmoe_jax.Sampling(max_new_tokens=6)
    shown = [picture(n) for n in range(len(QUESTIONS))]
    if quick:
        return {"batch": numbers(model.generate(QUESTIONS, shown, how))}
    chat = model.chat(how)
    turns = [chat.ask(QUESTIONS[0], shown[0]), chat.ask(QUESTIONS[1])]
    beams = medmoe_jax.Sampling(max_new_tokens=4, beams=2)
    streamed = "".join(model.stream(QUESTIONS[1], shown[1], how))
    scores = model.score(QUESTIONS[:2], shown[:2], [OPTIONS, OPTIONS[:1]])
    return {
        "batch": numbers(model.generate(QUESTIONS, shown, how, options=OPTIONS)),
        "one": numbers([model.generate(QUESTIONS[1], shown[1], how)]),
        "beams": numbers([model.generate(QUESTIONS[2], shown[2], beams)]),
        "chat": numbers(turns),
        "stream": {"ids": streamed},
        "score": {"ids": [], "sums": [value for row in scores for value in row]},
    }


def with_adapters(case: Case, ways: int) -> Any:
    """Weights of 8 bits with adapters beside them, as an evaluation during training has them."""
    params, meta = checkpoint.load_model(folder(case.family, case.top_k, case.experts))
    run = RunConfig(model=meta.model, train=("llm/.*",), lora=LoraConfig(case.rank))
    flat = flatten_dict(params, sep="/")
    flat |= small_models.fill(lora.shapes(run, flat), seed=1)
    small = quantize.quantize(unflatten_dict(flat, sep="/"), case.bits)
    return lora.merge(generate.for_generation(small, meta.model, ways), run.lora.scale)


def loaded(case: Case) -> Model:
    """The model of a case. With 4 bits its groups are small, as its matrices are."""
    place = folder(case.family, case.top_k, case.experts)
    if case.rank:
        model = medmoe_jax.load(place, mesh=case.mesh)
        assert model.mesh is not None
        params = with_adapters(case, sharding.generation_ways(model.mesh, model.config))
        there = jax.device_put(params, placement.places(params, model.config, model.mesh))
        return dataclasses.replace(model, params=there)
    if case.bits != 4:
        return medmoe_jax.load(place, mesh=case.mesh, bits=case.bits)
    model = medmoe_jax.load(place, mesh=case.mesh)
    assert model.mesh is not None
    ways = sharding.generation_ways(model.mesh, model.config)
    params = generate.for_generation(checkpoint.open_model(place)[0], model.config, ways)
    how = dict(bits=4, group=GROUP, mesh=model.mesh)
    small = placement.placed(params, model.config, model.dtype, **how)
    return dataclasses.replace(model, params=small)


@functools.cache
def on_one_device(case: Case, quick: bool) -> dict[str, dict[str, Any]]:
    """The answers that all meshes must repeat; the mesh of `case` does not matter."""
    model = medmoe_jax.load(folder(case.family, case.top_k, case.experts))
    if case.rank:
        return said(dataclasses.replace(model, params=with_adapters(case, 1)), quick)
    if case.bits:
        small = quantize.quantize(model.params, case.bits, group=GROUP)
        model = dataclasses.replace(model, params=small)
    return said(model, quick)


def matrices(tree: Any) -> list[jax.Array]:
    """The kernels of a tree, or the integers that stand for them."""
    leaves = jax.tree.leaves(tree)
    small = [leaf for leaf in leaves if leaf.dtype == np.int8]
    return small or [leaf for leaf in leaves if leaf.ndim > 1]


def difference(have: list[float], want: list[float]) -> float:
    """The largest."""
    assert len(have) == len(want)
    return float(np.abs(np.subtract(have, want)).max(initial=0))


def moved_weights(model: Model) -> list[str]:
    """Lines of the compiled loop over tokens that send a whole matrix to other devices."""
    how = medmoe_jax.Sampling(max_new_tokens=4)
    request = model.request(QUESTIONS[0], picture(0))
    state, _ = model.read([request], 4, how)
    with model.on_devices():
        knobs = sampling.knobs(how, [0] * len(state.count))
        end = np.int32(-1)
        state, found = generate.begin(state, end, knobs, most=32, draw=False)
        args = model.params, model.config, state, found, end, knobs, np.int32(4)
        program = generate.advance.lower(*args, dtype=model.dtype, draw=False).compile()
    llm = model.params["llm"]
    kernels = matrices((llm["blocks"], llm["lm_head"]))
    shapes = {",".join(map(str, kernel.shape[-2:])) + "]" for kernel in kernels}
    call = re.compile(r" = (.*?) (all-gather|all-to-all|collective-permute)[\w-]*\(")
    lines = [found for line in program.as_text().splitlines() if (found := call.search(line))]
    return [line[0] for line in lines if any(shape in line[1] for shape in shapes)]


def compare(case: Case) -> dict[str, Any]:
    """A row of the table."""
    quick = case in QUICK
    want = on_one_device(case._replace(mesh=(1, 1, 1)), quick)
    model = loaded(case)
    have = said(model, quick)
    moe = next(b["moe"] for b in model.params["llm"]["blocks"] if "moe" in b)
    weights = matrices(moe["experts"])
    held = sum(leaf.addressable_shards[0].data.size for leaf in weights)
    return {
        "case": str(case),
        "same": {kind: have[kind]["ids"] == want[kind]["ids"] for kind in want},
        "differences": {
            f"{kind} {name}": difference(have[kind][name], values)
            for kind in want
            for name, values in want[kind].items()
            if name != "ids"
        },
        "share": held / sum(leaf.size for leaf in weights),
        "trees": len(moe["experts"]),
        "moved": moved_weights(model),
    }


def main() -> None:
    """Prints the rows of the cases named on the command line."""
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_disable_most_optimizations", True)
    cases = {str(case): case for case in (*QUICK, *REST)}
    for name in sys.argv[1:]:
        print(json.dumps(compare(cases[name])), flush=True)


if __name__ == "__main__":
    main()
