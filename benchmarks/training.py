"""The stage-3 train step on the CPU beside PyTorch, and how step and prefill grow.

Both sides have the same random weights and train experts and meta experts only. Before anything is
timed, the losses of STEPS steps must agree to 1e-4. The peers are `torch_peer.Moe`, each expert on
its own tokens, and `torch_peer.OfficialMoe`, one-hot products over padded buffers.

    python benchmarks/training.py --out runs/benchmark
    python benchmarks/training.py --sweep --out runs/benchmark
    python benchmarks/training.py --quick --sweep
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import generation
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax.traverse_util import flatten_dict
from timing import Figure, alternate, chosen_clock, conditions, markdown
from torch_peer import Moe, OfficialMoe, Peer

from medmoe_jax import flops, optim, step
from medmoe_jax.config import ModelConfig, MoeConfig, OptimConfig, RunConfig

ROWS = 4  # samples of a step and prompts of a prefill
LABELLED = 64  # last tokens of a row, those with a label
STEPS = 4  # whose losses must agree
TOLERANCE = 1e-4  # of losses
PEERS = {"train step": (Moe, 1.0), "train step, official way": (OfficialMoe, 1.3)}
# What grows in the sweep, beside the size that is measured anyway.
SWEEP = {"text": (64, 320), "experts": (2, 8), "layers": (4, 16)}
QUICK_SWEEP = {"text": (64,), "experts": (2,), "layers": (4,)}
PRODUCTS = ((768, 512, 1408), (768, 1408, 512), (1024, 1024, 1024), (2048, 2048, 2048))
Clock = Callable[[], float]


def model_config(size: generation.Size) -> ModelConfig:
    """Top-1 experts and a meta expert in every second layer."""
    moe = MoeConfig(experts=size.experts, top_k=1, placement="sparse")
    return ModelConfig(vision=size.vision, llm=size.llm, moe=moe).validate()


def run_config(model: ModelConfig, remat: str, dtype: str = "float32") -> RunConfig:
    """What the paper trains in phase 3: frozen weights and computation in `dtype`."""
    return RunConfig(
        model=model,
        train=("llm/moe/(experts|meta)/.*",),
        compute_dtype=dtype,
        frozen_dtype=dtype,
        remat=remat,
        loss_chunk=0,
        optim=OptimConfig(lr=1e-4, warmup=0.0, schedule="constant", batch_size=ROWS),
    )


def make_batch(model: ModelConfig, text: int, rows: int = ROWS) -> dict[str, np.ndarray]:
    """Rows of an image and `text` random ids, the last LABELLED with labels."""
    batch = generation.prompts(model, text, rows)
    ids = batch["tokens"]
    learnt = np.arange(ids.shape[1]) >= ids.shape[1] - LABELLED
    labels = np.where(learnt, ids, -100).astype(np.int32)
    return batch | {"labels": labels, "modality": np.zeros(rows, np.int32)}


class Ours:
    """The step of `medmoe_jax.train`."""

    def __init__(self, run: RunConfig, flat: dict[str, Any], batch: Any, clock: Clock):
        """`flat`: path -> device array; those that train are used up."""
        label = optim.labels(list(flat), run.train)
        train, self._frozen = optim.split(flat, label)
        self._run, self._tx = run, optim.make(run.optim, STEPS, label)
        self._state = step.State(jnp.zeros((), jnp.int32), train, self._tx.init(flat))
        self._batch, self._clock = jax.tree.map(jnp.asarray, batch), clock
        rows, length = batch["tokens"].shape
        self.flops = flops.costs(run, run.model, label).total([length] * rows, rows)

    def compile(self, remat: str) -> int:
        """Makes the step; returns the bytes that it takes on its device."""
        run_step = step.make_step(replace(self._run, remat=remat), self._run.model, self._tx)
        self._step = run_step.lower(self._state, self._frozen, self._batch).compile()
        held: Any = self._step.memory_analysis()
        new = held.output_size_in_bytes - held.alias_size_in_bytes
        return held.argument_size_in_bytes + held.temp_size_in_bytes + new

    def step(self) -> tuple[float, float]:
        """Seconds and loss of a step."""
        start = self._clock()
        self._state, metrics = self._step(self._state, self._frozen, self._batch)
        jax.block_until_ready(self._state)
        return self._clock() - start, float(metrics["loss"])


class Theirs:
    """Forward, backward and fused AdamW of PyTorch; what trains is kept in float32."""

    def __init__(self, run: RunConfig, peer: Peer, batch: Any, clock: Clock):
        self.peer, self._clock = peer, clock
        trained = peer.train_experts()
        betas = (run.optim.b1, run.optim.b2)
        self._adamw = torch.optim.AdamW(
            trained, run.optim.lr, betas, run.optim.eps, weight_decay=0.0, fused=True
        )
        text = batch["tokens"][:, run.model.vision.patches :]
        longs = (torch.from_numpy(a.astype(np.int64)) for a in (text, batch["labels"]))
        parts = (torch.from_numpy(batch["images"][:, 0]), *longs)
        self._batch = tuple(part.to(peer.device) for part in parts)

    def step(self) -> tuple[float, float]:
        """Seconds and loss of a step."""
        start = self._clock()
        self._adamw.zero_grad(set_to_none=True)
        loss = self.peer.loss(*self._batch)
        loss.backward()
        self._adamw.step()
        return self._clock() - start, loss.item()


def trainers(
    size: generation.Size, remat: str, clock: Clock, kinds: list[type[Moe]]
) -> tuple[Ours, list[Theirs]]:
    """Both sides, ready to be timed.

    Raises:
      AssertionError: their losses differ.
    """
    model = model_config(size)
    run, params = run_config(model, remat), generation.weights(model, 0)
    batch = make_batch(model, size.text)
    # Copies: the step writes into the buffers of its state.
    flat = {k: jnp.array(v) for k, v in flatten_dict(params, sep="/").items()}
    ours = Ours(run, flat, batch, clock)
    ours.compile(remat)
    theirs = [Theirs(run, Peer.filled(model, params, kind), batch, clock) for kind in kinds]
    losses = [[side.step()[1] for _ in range(STEPS)] for side in (ours, *theirs)]
    for kind, found in zip(kinds, losses[1:], strict=True):
        error = float(np.abs(np.subtract(losses[0], found)).max())
        assert error < TOLERANCE, f"{kind.__name__}: losses differ by {error:.1e}"
    return ours, theirs


def peak_flops(clock: Clock) -> dict[str, float]:
    """FLOP/s of the fastest plain float32 product of each side."""
    best = {"jax": 0.0, "torch": 0.0}
    for m, k, n in PRODUCTS:
        rng = np.random.default_rng(0)
        a, b = (rng.normal(size=s).astype(np.float32) for s in ((m, k), (k, n)))
        x, y, s, t = jnp.asarray(a), jnp.asarray(b), torch.from_numpy(a), torch.from_numpy(b)
        product = jax.jit(jnp.matmul)
        sides: dict[str, Callable[[], Any]] = {
            "jax": lambda f=product, x=x, y=y: f(x, y).block_until_ready(),
            "torch": lambda s=s, t=t: s @ t,
        }
        for name, run in sides.items():
            run()
            seconds = []
            for _ in range(10):
                start = clock()
                run()
                seconds.append(clock() - start)
            best[name] = max(best[name], 2 * m * k * n / statistics.median(seconds))
    return best


def grown(size: generation.Size, field: str, value: int) -> generation.Size:
    """`size` with another number of text tokens, experts or layers."""
    if field == "layers":
        return replace(size, llm=replace(size.llm, layers=value))
    return replace(size, **{field: value})


def measure(args: argparse.Namespace, clock: Clock) -> tuple[list[Figure], dict[str, Any]]:
    """The figures, printed one by one, and the FLOPs behind them."""
    size, repeats = (generation.QUICK, 3) if args.quick else (generation.FULL, args.repeats)
    figures: list[Figure] = []

    def add(name: str, ours: Any, theirs: Any, goal: float | None = None) -> None:
        ours(), theirs()
        found = alternate(lambda: ours()[0], lambda: theirs()[0], repeats, args.patience)
        figures.append(Figure(name, "ms", ROWS, *found, goal))
        print("  ".join(figures[-1].cells()), file=sys.stderr, flush=True)

    def add_prefill(name: str, size: generation.Size) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            sides = generation.sides(size, Path(scratch), clock)
            generation.check(sides, ROWS)
            add(name, *(partial(side.prefill, ROWS) for side in sides))

    ours, theirs = trainers(size, args.remat, clock, [kind for kind, _ in PEERS.values()])
    for (name, (_, goal)), side in zip(PEERS.items(), theirs, strict=True):
        add(name, ours.step, side.step, goal)
    peak, speed = peak_flops(clock), {}
    for name in ("jax", "torch"):
        speed[name] = ours.flops / statistics.median(getattr(figures[0], name))
    work = {"step_flops": ours.flops, "flops_a_second": speed, "peak_flops_a_second": peak}
    del ours, theirs
    if args.sweep:
        add_prefill("prefill", size)
        for field, values in (QUICK_SWEEP if args.quick else SWEEP).items():
            for value in values:
                larger, what = grown(size, field, value), f"{value} {field}"
                ours, theirs = trainers(larger, args.remat, clock, [Moe])
                add(f"train step, {what}", ours.step, theirs[0].step)
                del ours, theirs
                add_prefill(f"prefill, {what}", larger)
    return figures, work


def limit(work: dict[str, Any]) -> str:
    """What the step reaches of the fastest matrix product that either side has."""
    top = max(work["peak_flops_a_second"].values())
    shares = (f"{n} {v / top:.0%}" for n, v in work["flops_a_second"].items())
    return (
        f"A step takes {work['step_flops'] / 1e9:.0f} GFLOP of model products; the fastest product "
        f"here runs at {top / 1e9:.0f} GFLOP/s, of which the steps reach: {', '.join(shares)}.\n"
    )


def main() -> None:
    """Measures, prints the table and writes it."""
    about = "Training on the CPU beside PyTorch. On a GPU: accelerator.py."
    parser = argparse.ArgumentParser(description=about)
    add = parser.add_argument
    add("--quick", action="store_true", help="a tiny model: does it run at all?")
    add("--sweep", action="store_true", help="also with more and fewer tokens, experts, layers")
    kinds = "what our step recomputes: none, dots, experts, attention, full"
    add("--remat", default="dots", help=kinds)
    add("--repeats", type=int, default=7, help="timed runs of each side")
    add("--one-thread", action="store_true", help="CPU time on one core")
    wait = "seconds for each figure to wait for quiet moments of the machine"
    add("--patience", type=float, default=0.0, help=wait)
    add("--out", type=Path, help="folder for training.md and training.json")
    args = parser.parse_args()
    clock = chosen_clock(args.one_thread)
    threads = 1 if args.one_thread else 2
    torch.set_num_threads(threads)
    where = conditions(threads) | {
        "seconds": "CPU" if args.one_thread else "wall",
        "rows": ROWS,
        "size": asdict(generation.QUICK if args.quick else generation.FULL),
    }
    figures, work = measure(args, clock)
    text = f"{markdown(figures, where)}\n{limit(work)}"
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "training.md").write_text(text)
        table = [asdict(f) | {"ratio": f.ratio, "quartiles": f.spread} for f in figures]
        data = {"conditions": where, "figures": table, "work": work}
        (args.out / "training.json").write_text(json.dumps(data, indent=2))


if __name__ == "__main__":
    main()
