"""What a MoE layer costs beside two dense feed-forward networks on the same tokens, on this CPU.

The layer is that of the models: router, top-1 experts, meta expert. Two dense networks are the
least that it can cost. Both are timed in turn, forward, and forward and backward through all
parameters and the input.

    python benchmarks/moe.py --out runs/benchmark
    python benchmarks/moe.py --quick
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from timing import alternate, chosen_clock, conditions, table

from medmoe_jax.config import LlmConfig, MoeConfig
from medmoe_jax.models import layers, moe

GOAL = 1.15
WIDTHS = (("stablelm", 512, 1408), ("phi", 512, 2048))  # family, width, hidden width
TOKENS, EXPERTS = (256, 768, 2048), (2, 4, 8)


class Case(NamedTuple):
    """What is measured."""

    family: str
    width: int
    ffn: int
    tokens: int
    experts: int


class Found(NamedTuple):
    """Seconds of the layer and of two dense networks, run by run."""

    case: Case
    way: str  # forward | forward and backward
    layer: list[float]
    dense: list[float]
    others: float  # most that other processes took of the CPU in a run that counts

    @property
    def ratio(self) -> float:
        """Of the medians."""
        return statistics.median(self.layer) / statistics.median(self.dense)


def programs(
    case: Case, clock: Callable[[], float]
) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """The layer and two dense networks, compiled, by way of running them."""
    llm = LlmConfig(family=case.family, width=case.width, ffn=case.ffn)
    cfg = MoeConfig(experts=case.experts, top_k=1)
    key = jax.random.key(0)
    p = layers.initialise(key, moe.leaves(llm, cfg, ()))
    one = layers.mlp_leaves(case.family, case.width, case.ffn)
    pair = layers.initialise(key, {"first": one, "second": one})
    x = jax.random.normal(key, (1, case.tokens, case.width))
    counted = jnp.ones((1, case.tokens), bool)

    def layer(p: Any, x: Any) -> Any:
        return moe.moe_layer(p, cfg, x, counted)[0]

    def dense(p: Any, x: Any) -> Any:
        return layers.mlp(p["first"], x) + layers.mlp(p["second"], x)

    def both(form: Any) -> Any:
        return jax.jit(jax.grad(lambda p, x: (form(p, x) * x).sum(), (0, 1)))

    def timed(form: Any, p: Any) -> Callable[[], float]:
        def run() -> float:
            start = clock()
            jax.block_until_ready(form(p, x))
            return clock() - start

        return run

    return {
        "forward": (timed(jax.jit(layer), p), timed(jax.jit(dense), pair)),
        "forward and backward": (timed(both(layer), p), timed(both(dense), pair)),
    }


def measure(case: Case, repeats: int, clock: Callable[[], float]) -> list[Found]:
    """The case forward, and forward and backward."""
    found = []
    for way, (layer, dense) in programs(case, clock).items():
        for _ in range(2):  # compilation
            layer(), dense()
        found.append(Found(case, way, *alternate(layer, dense, repeats, 0.0)))
        print("  ".join(cells(found[-1])), flush=True)
    return found


def cells(found: Found) -> list[str]:
    """A row of the table."""
    case = found.case
    layer, dense = (1e3 * statistics.median(s) for s in (found.layer, found.dense))
    sizes = f"{case.family} {case.width} x {case.ffn}"
    figures = [f"{layer:.1f}", f"{dense:.1f}", f"{found.ratio:.2f}", f"{found.others:.0%}"]
    return [sizes, str(case.tokens), str(case.experts), found.way, *figures]


def main() -> None:
    """Measures, prints the table and writes it."""
    parser = argparse.ArgumentParser(description="A MoE layer beside two dense networks.")
    add = parser.add_argument
    add("--quick", action="store_true", help="tiny layers: does it run at all?")
    add("--tokens", type=int, nargs="+", default=list(TOKENS))
    add("--experts", type=int, nargs="+", default=list(EXPERTS))
    add("--repeats", type=int, default=9, help="timed runs of each side")
    add("--one-thread", action="store_true", help="CPU time on one core")
    add("--out", type=Path, help="folder for moe.md and moe.json")
    args = parser.parse_args()
    widths = [("stablelm", 16, 24)] if args.quick else WIDTHS
    clock = chosen_clock(args.one_thread)
    threads = 1 if args.one_thread else os.cpu_count() or 1
    where = conditions(threads, ("medmoe_jax", "jax", "numpy"))
    found = [
        row
        for family, width, ffn in widths
        for tokens in args.tokens
        for n in args.experts
        for row in measure(
            Case(family, width, ffn, tokens, n), 3 if args.quick else args.repeats, clock
        )
    ]
    head = ["layer", "tokens", "experts", "", "MoE ms", "two dense ms", "ratio", "others"]
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    about = (
        f"`{where['command']}`; {where['cpu']}; {threads} threads, load "
        f"{where['load'][0]} at the start; {'CPU' if args.one_thread else 'wall'} time; float32; "
        f"{versions}. Medians; the goal is a ratio of {GOAL} at most. Others: most of the CPU that "
        "other processes took in a run that counts."
    )
    text = f"{table(head, list(map(cells, found)))}\n{about}\n"
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "moe.md").write_text(text)
        rows = [f.case._asdict() | f._asdict() | {"ratio": f.ratio} for f in found]
        (args.out / "moe.json").write_text(json.dumps({"conditions": where, "figures": rows}))


if __name__ == "__main__":
    main()
