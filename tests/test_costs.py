"""What compiled programs compute and hold: the MoE layer, logits, frozen experts."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from typing import Any

import compilers
import jax
import jax.numpy as jnp
import layer_costs
import numpy as np
import pytest
import small_models
from flax.traverse_util import flatten_dict

from medmoe_jax import optim, step
from medmoe_jax.config import LlmConfig, MoeConfig, OptimConfig, RunConfig
from medmoe_jax.models import buckets, layers, moe
from medmoe_jax.plan import hlo, hlo_text

WIDTH, FFN = 64, 192


def compiled(form: Any, p: Any, x: Any, backward: bool) -> float:
    """FLOPs of products of the program; of `lax.switch` the largest branch counts."""
    run = jax.grad(lambda p, x: (form(p, x) * x).sum(), (0, 1)) if backward else form
    return hlo.work(jax.jit(run).lower(p, x).compile().as_text()).flops


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("n_experts", [4, 8])
def test_a_layer_costs_little_more_than_two_dense_networks(
    n_experts: int, backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, with tokens that spread evenly: what the loops that have a round compute."""
    tokens = 2048
    rng = np.random.default_rng(0)
    counts = np.bincount(rng.integers(0, n_experts, tokens), minlength=n_experts)
    sizes = buckets.piece_sizes(tokens, n_experts)
    assert max(counts) <= sizes[-1]
    taken = [next(size for size in sizes if size >= count) for count in counts]

    def once(piece: Any, y: Any, rows: int, counts: Any) -> Any:
        for e, size in enumerate(taken):
            y = piece(e, sum(taken[:e]), sum(taken[: e + 1]), size, False, y)
        return y

    # Without the loops of other sizes the program holds what runs.
    monkeypatch.setattr(buckets, "_over_pieces", once)
    llm = LlmConfig(family="stablelm", width=WIDTH, ffn=FFN)
    cfg, counted = MoeConfig(experts=n_experts, top_k=1), jnp.ones((1, tokens), bool)
    p = layers.initialise(jax.random.key(0), moe.leaves(llm, cfg, ()))
    x = jnp.ones((1, tokens, WIDTH))
    layer = compiled(lambda p, x: moe.moe_layer(p, cfg, x, counted)[0], p, x, backward)
    dense = 2 * 2 * 3 * WIDTH * FFN * tokens * (3 if backward else 1)
    assert 1.0 <= layer / dense <= 1.15


@functools.cache
def ahead(target: str) -> list[dict[str, Any]]:
    """What layer_costs.py prints for a chip; skips where its compiler is not installed."""
    compilers.need(target)
    command = [sys.executable, layer_costs.__file__, target]
    env = compilers.environment()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.tpu
@pytest.mark.parametrize("target", ["v5e:1x1", "h200:1"])
def test_a_layer_on_a_tpu_and_a_gpu(target: str) -> None:
    """StableLM and Phi-2, 1 and 8 rows of 2,048 tokens, bfloat16: FLOPs, room for the unevenest
    choice included, and the time that they and the bytes need at least. Of the bytes, those of the
    other three experts, and their gradients, are more than two dense networks have."""
    rows = [row for row in ahead(target) if row["way"] != "generation"]
    assert len(rows) == 8
    for row in rows:
        one, two = row["layer"], row["dense"]
        assert not one["unknown"] and not two["unknown"]
        assert 1.0 <= one["flops"] / two["flops"] <= 1.15, row
        assert one["seconds"] / two["seconds"] <= 1.15, row


@pytest.mark.slow
@pytest.mark.tpu
@pytest.mark.parametrize("prompts", [1, 8])
@pytest.mark.parametrize("target", ["v5e:1x1", "h200:1"])
def test_generation_copies_no_expert(target: str, prompts: int) -> None:
    """Experts that are arrays of their own move less than a copy of them would."""
    for row in in_generation(target, prompts):
        more = row["separate"]["traffic"] - row["stacked"]["traffic"]
        assert more < row["weights"], row  # a copy reads and writes them


@pytest.mark.slow
@pytest.mark.tpu
@pytest.mark.parametrize("prompts", [1, 8])
@pytest.mark.parametrize("target", ["v5e:1x1", "h200:1"])
def test_separate_experts_compute_the_same(target: str, prompts: int) -> None:
    """And what else they move hides behind the products."""
    for row in in_generation(target, prompts):
        for kind in ("flops", "seconds"):
            assert row["separate"][kind] == pytest.approx(row["stacked"][kind], rel=0.01), row


def in_generation(target: str, prompts: int) -> list[dict[str, Any]]:
    """Rows of both models."""
    found = [row for row in ahead(target) if row["way"] == "generation"]
    assert len(found) == 4
    return [row for row in found if row["rows"] == prompts]


MODEL = small_models.config("stablelm", MoeConfig(2, placement="0"), layers=1)
TOKENS = 2 * 80


@functools.cache
def program(train: tuple[str, ...], chunk: int) -> str:
    """The optimised HLO of a step on 2 rows of 80 tokens."""
    run = RunConfig(
        model=MODEL,
        train=train,
        compute_dtype="float32",
        frozen_dtype="float32",
        remat="full",
        loss_chunk=chunk,
        optim=OptimConfig(batch_size=2),
    )
    flat = {k: jnp.asarray(v) for k, v in flatten_dict(small_models.params(MODEL), sep="/").items()}
    label = optim.labels(list(flat), train)
    tx = optim.make(run.optim, 10, label)
    trained, frozen = optim.split(flat, label)
    state = step.State(jnp.zeros((), jnp.int32), trained, tx.init(flat))
    batch = small_models.batch(MODEL, (1, 1), text=70, length=80)
    return step.make_step(run, MODEL, tx).lower(state, frozen, batch).compile().as_text()


PROJECTOR, ALL = ("projector/.*",), ("projector/.*", "llm/.*")


def test_all_logits_never_exist() -> None:
    """With a chunk, no array of the step is as large as the scores of all places."""
    vocab, largest = MODEL.llm.vocab, []
    for text in (program(ALL, 0), program(PROJECTOR, 16)):
        found = re.findall(rf"f32\[((?:\d+,)*{vocab})\]", text)
        largest.append(max(int(np.prod([int(n) for n in dims.split(",")])) for dims in found))
    assert largest[0] >= TOKENS * vocab
    assert largest[1] == max(2 * 16 * vocab, MODEL.llm.width * vocab)


def test_frozen_experts_have_no_gradient() -> None:
    """In phase 1 the gradient flows through the experts, but that of no kernel is computed."""
    d, f = MODEL.llm.width, MODEL.llm.ffn

    def of_kernels(text: str) -> int:
        ops = [op for part in hlo_text.parse(text)[0].values() for op in part.values()]
        return sum(op.kind == "dot" and set(op.shapes[0].dims) == {d, f} for op in ops)

    projector, everything = program(PROJECTOR, 16), program(ALL, 0)
    assert of_kernels(projector) == 0 and of_kernels(everything) > 0
    # Gate, up and down of the meta expert and of two experts, of which each size is counted.
    least = 3 * 3 * 2 * TOKENS * d * f
    assert hlo.work(everything).flops - hlo.work(projector).flops >= least
