"""A program that plans small runs for eight virtual CPU devices and prints what it found as one
JSON object; `test_plan.py` runs it."""

from __future__ import annotations

import dataclasses
import json

import jax
import small_models
from jax.sharding import PartitionSpec as P

from medmoe_jax.config import MeshConfig, MoeConfig, OptimConfig, RunConfig
from medmoe_jax.plan import estimate, hlo, programs, search, targets

LENGTH = 16
EXPERTS = RunConfig(
    phase="stage3",
    model=small_models.config("phi", MoeConfig(experts=4), layers=2),
    train=("llm/moe/(experts|meta)/.*",),
    compute_dtype="float32",
    remat="full",
    loss_chunk=0,
    optim=OptimConfig(batch_size=8),
)
DENSE = small_models.config("phi", layers=2)
EVERYTHING = dataclasses.replace(
    EXPERTS,
    phase="stage2",
    model=dataclasses.replace(DENSE, llm=dataclasses.replace(DENSE.llm, ffn=64)),
    train=("llm/.*",),
    mesh=MeshConfig(1, 8, 1),
)


def plan(cfg: RunConfig, target: targets.Target) -> dict[str, object]:
    """A plan as `--json` writes it."""
    program = programs.train_step(cfg, target, LENGTH, 1)
    return estimate.to_json(estimate.plan(program, cfg, target, "small", LENGTH), {}, "")


def exchange(target: targets.Target) -> dict[str, object]:
    """A product whose weights are gathered in every round, and a sum over all devices."""
    mesh = jax.make_mesh((8,), ("x",), (jax.sharding.AxisType.Auto,), devices=target.devices)

    def run(x, weights):
        def body(x, w):
            return x @ jax.lax.all_gather(w, "x", tiled=True), None

        x, _ = jax.lax.scan(body, x, weights)
        return jax.lax.psum(x, "x")

    specs = (P("x", None), P(None, "x", None))
    mapped = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
    shapes = jax.ShapeDtypeStruct((64, 32), "f4"), jax.ShapeDtypeStruct((5, 32, 32), "f4")
    found = hlo.work(jax.jit(mapped).lower(*shapes).compile().as_text())
    return {
        "flops": found.flops,
        "collectives": {kind: vars(each) for kind, each in found.collectives.items()},
    }


def main() -> None:
    """Prints the plans."""
    targets.prepare("cpu:8")
    target = targets.load("cpu:8")
    spread = dataclasses.replace(EXPERTS, mesh=MeshConfig(1, 2, 4))
    print(
        json.dumps(
            {
                "data": plan(dataclasses.replace(EXPERTS, mesh=MeshConfig(8, 1, 1)), target),
                "spread": plan(spread, target),
                "everything": plan(EVERYTHING, target),
                "exchange": exchange(target),
                "candidates": [vars(run.mesh) for run in search.candidates(EXPERTS, target)],
            }
        )
    )


if __name__ == "__main__":
    main()
