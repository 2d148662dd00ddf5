"""Plans: shapes and places against arithmetic, the command and its errors."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import plan_table
import pytest
from jax.sharding import AbstractMesh, AxisType
from plan_table import EVERYTHING, EXPERTS, LENGTH

from medmoe_jax import generate, hardware, layout, optim, sharding
from medmoe_jax.config import ConfigError, MeshConfig
from medmoe_jax.plan import estimate, programs, report, search, targets

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30


@functools.cache
def table() -> dict[str, Any]:
    """What plan_table.py prints."""
    command = [sys.executable, plan_table.__file__]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def sizes(kind: str) -> dict[str, int]:
    """Numbers in the parameters that train or do not."""
    shapes = layout.shapes(EXPERTS)
    label = optim.labels(list(shapes), EXPERTS.train)
    return {path: leaf.size for path, leaf in shapes.items() if label[path] == kind}


def test_memory_is_that_of_the_parameters() -> None:
    """Without sharding: float32 and two moments for what trains, two bytes for the rest."""
    memory = table()["data"]["memory"]
    trained, frozen = sizes(optim.TRAIN), sizes(optim.FROZEN)
    assert memory["trainable"] == 4 * sum(trained.values())
    counters = 2 * 4  # of Adam and of the schedule
    assert memory["optimiser"] == 2 * memory["trainable"] + counters
    routers = sum(n for path, n in frozen.items() if "/router/" in path)
    assert memory["frozen"] == 2 * (sum(frozen.values()) - routers) + 4 * routers
    row = LENGTH * (3 * 4 + 1) + 8 * 8 * 3 + 4  # one a device
    assert memory["batch"] == row
    parts = ("trainable", "frozen", "optimiser", "batch", "padding", "temporaries", "code")
    assert memory["peak"] == sum(memory[name] for name in parts) + memory["outputs"]
    # The state's buffers are used again: what comes out beside them are the metrics.
    assert memory["outputs"] < memory["trainable"] / 20 and memory["padding"] < 200


def test_what_is_spread_takes_its_share() -> None:
    """Kernels of experts lie on 4 x 2 devices, their biases on 4, the meta expert's on one."""
    memory = table()["spread"]["memory"]
    whole, part = 0, 0.0
    for path, n in sizes(optim.TRAIN).items():
        if "/experts/" in path:
            part += n / (8 if path.endswith("kernel") else 4)
        else:
            # Width 16 is divided by 8, FFN 20 by the expert axis alone.
            part += n / ({"fc1": 8, "fc2": 4}[path.split("/")[3]] if path.endswith("kernel") else 1)
        whole += n
    assert memory["trainable"] == 4 * part < 4 * whole / 4
    assert memory["optimiser"] == 2 * memory["trainable"] + 8
    found = table()["spread"]["collectives"]
    assert found["all-gather"]["sent"] > 0 and found["reduce-scatter"]["sent"] > 0
    assert not {"all-gather", "reduce-scatter"} & set(table()["data"]["collectives"])


def test_weights_are_sent_and_no_activations() -> None:
    """Where all of the language model trains: its matrices are gathered in the forward pass, when
    that is repeated, and in the backward pass, and their gradients summed. It is not the rows of
    all devices that come together."""
    found = table()["everything"]["collectives"]
    shapes = layout.shapes(EVERYTHING)
    llm = {path: leaf.size for path, leaf in shapes.items() if path.startswith("llm/")}
    matrices = sum(n for path, n in llm.items() if path.endswith(("kernel", "embedding")))
    assert "all-to-all" not in found
    assert found["all-gather"]["sent"] <= 3 * 7 / 8 * 4 * matrices
    assert sum(kind["sent"] for kind in found.values()) <= 5 * 7 / 8 * 4 * sum(llm.values())


def test_the_share_of_a_device() -> None:
    """All rows' model FLOPs, split evenly; the compiled step does more, not less."""
    rows = [table()["data"], table()["spread"]]
    assert rows[0]["model_flops"] == rows[1]["model_flops"]
    assert all(row["compiled_flops"] > row["model_flops"] > 0 for row in rows)
    assert all(row["fits"] is None and row["mfu"] is None for row in rows)


def test_collectives_in_a_loop() -> None:
    """5 rounds that gather [32, 32] of float32, then one sum of [8, 32]."""
    found = table()["exchange"]
    assert found["flops"] == 5 * 2 * 8 * 32 * 32
    gather, total = found["collectives"]["all-gather"], found["collectives"]["all-reduce"]
    assert gather == {"count": 5, "sent": 5 * 7 / 8 * 32 * 32 * 4}
    assert total == {"count": 1, "sent": 2 * 7 / 8 * 8 * 32 * 4}


def test_meshes() -> None:
    found = [tuple(vars(m).values()) for m in search.meshes(8, 4)]
    assert len(found) == len(set(found)) and all(a * b * c == 8 for a, b, c in found)
    assert {c for _, _, c in found} == {1, 2, 4} and (1, 2, 4) in found and (8, 1, 1) in found
    assert {c for _, _, c in (tuple(vars(m).values()) for m in search.meshes(8, 0))} == {1}
    assert [vars(m) for m in search.meshes(8, 4)] == table()["candidates"]


def test_the_least_memory_of_a_step() -> None:
    """Float32 weights, two moments and 16-bit gradients of what trains; 16 bits of the rest."""
    cfg = dataclasses.replace(
        EXPERTS, mesh=MeshConfig(1, 1, 1), compute_dtype="bfloat16", frozen_dtype="bfloat16"
    )
    found = search.least_memory(cfg, targets.load("cpu:1"), LENGTH, 1)
    trained, frozen = sum(sizes(optim.TRAIN).values()), sum(sizes(optim.FROZEN).values())
    assert 14 * trained + 2 * frozen < found < 14 * trained + 2 * frozen + 100_000
    cfg = dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, accumulate=2))
    more = search.least_memory(cfg, targets.load("cpu:1"), LENGTH, 1) - found
    assert more == 2 * trained


def test_generation_on_a_mesh() -> None:
    """Each expert lies on one of four pairs of devices, which share its hidden layer; the cache is
    split between as many devices as divide the heads."""
    mesh = AbstractMesh((1, 2, 4), sharding.AXES, axis_types=(AxisType.Auto,) * 3)
    cfg = dataclasses.replace(EXPERTS, frozen_dtype="bfloat16")
    model = layout.model_of(cfg)
    block = programs.generation_weights(cfg, model, mesh)["llm"]["blocks"][0]
    (experts,) = block["moe"]["experts"]  # the only tree: a device owns one of four
    d, f = model.llm.width, model.llm.ffn
    assert programs.held(experts) == 2 * (2 * d * f / 2 + f / 2 + d)
    state = jax.eval_shape(lambda: generate.empty(model, 8, 32, jnp.bfloat16))
    cache = generate.laid_out(state, functools.partial(sharding.outline, mesh=mesh)).cache
    llm = model.llm  # two heads of keys and values
    assert programs.held(cache) == 2 * (2 * llm.layers * 8 * 32 * llm.kv_heads * llm.head_dim) / 2


def test_the_bound() -> None:
    """Times are figures over published figures, the largest counts."""
    chip = hardware.by_name("v5e")
    assert chip is not None
    target = targets.Target("v5e:1x2", "tpu", chip, [None] * 2)
    text = """HloModule m, num_partitions=2

ENTRY %main (a: bf16[512,4096]) -> f32[1] {
  %a = bf16[512,4096] parameter(0)
  %b = bf16[4096,4096] parameter(1)
  %y = bf16[512,4096] dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %z = bf16[512,4096] all-reduce(%y), replica_groups={}, to_apply=%add
}
"""
    stats = {"arguments": 120.0, "outputs": 50.0, "reused": 40.0, "temporaries": 7.0, "code": 3.0}
    groups = {"trainable": 60.0, "frozen": 40.0}
    program = programs.Program("train", {"data": 2}, groups, 4e9, text, stats, "", False, 1.0)
    cfg = dataclasses.replace(EXPERTS, compute_dtype="bfloat16")
    plan = estimate.plan(program, cfg, target, "small", LENGTH)
    assert plan.memory["padding"] == 20 and plan.memory["outputs"] == 10
    assert plan.memory["peak"] == 140 and plan.fits
    product, activation = 2 * 512 * 4096 * 4096, 2 * 512 * 4096
    assert plan.seconds["arithmetic"] == pytest.approx(product / 197e12)
    assert plan.seconds["network"] == pytest.approx(activation / 200e9)
    traffic = 2 * activation + 2 * 4096 * 4096 + 2 * activation
    assert plan.seconds["memory"] == pytest.approx(traffic / 819e9)
    assert plan.bound == plan.seconds["arithmetic"]
    assert plan.mfu == pytest.approx(2e9 / product)
    assert "of 15.75 GiB that a program may use" in report.text(plan)
    stats["temporaries"] = 15.75 * GIB
    full = programs.Program("train", {"data": 2}, groups, 4e9, text, stats, "", False, 1.0)
    assert estimate.plan(full, cfg, target, "small", LENGTH).fits is False
    none = programs.Program(
        "train", {"data": 2}, groups, 4e9, "", {}, "Used 20G of 15.75G", True, 1.0
    )
    plan = estimate.plan(none, cfg, target, "small", LENGTH)
    assert plan.fits is False and "the compiler says: Used 20G of 15.75G" in report.text(plan)
    line = report.table([estimate.to_json(plan, {}, "")]).splitlines()[-1]
    assert line.startswith("| small | stage3 | v5e:1x2 | 2 | 4 | 16 | full | - | no |")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v7:2x2", "unknown chip; use one of v4, v5e, .*h100.*, as in v5e:2x4"),
        ("v5e:8", "v5e takes X x Y chips"),
        ("v5p:2x2", "v5p takes X x Y x Z chips"),
        ("h100:16", "give 1 to 8 GPUs, those of one node"),
        ("h100", "h100 takes a number of devices"),
        ("cpu:0", "give at least one device"),
        ("cpu:99", r"JAX has started with \d+ CPU device"),
    ],
)
def test_targets_that_do_not_exist(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        targets.load(name)


@pytest.mark.parametrize(("name", "extra"), [("v5e:2x4", "plan"), ("h200:1", "plan-cuda")])
def test_a_compiler_that_is_absent(name: str, extra: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"pip install 'medmoe_jax\[{extra}\]'"):
        targets.load(name)


def test_requests_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="give data,fsdp,expert, as in 1,2,4"):
        programs.mesh_config("2x4")
    assert programs.mesh_config("-1,2,4") == MeshConfig(-1, 2, 4)
    target = targets.load("cpu:1")
    with pytest.raises(ConfigError, match=r"2 image\(s\) of 8 places do not fit into 6 tokens"):
        programs.train_step(EXPERTS, target, 6, 2)


def test_the_command(tmp_path: Path) -> None:
    """Decoding on one device, the JSON file, the table of a folder, and an error."""
    command = [sys.executable, "-m", "medmoe_jax.plan"]
    file = tmp_path / "plan.json"
    flags = ["--config", "configs/stage2.py:tiny", "--target", "cpu:2", "--decode", "--length=96"]
    flags += [f"--json={file}", "--config.optim.batch_size=2", "--config.model.llm.layers=1"]
    done = subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "prefill: stage2 of tiny on cpu:2, 2 rows x 96 tokens" in done.stdout
    prefill, decode = json.loads(file.read_text())
    width, ffn, words = 128, 512, 1024
    weights = 4 * width * width + 2 * width * ffn
    work = 2 * 2 * (weights + width * words) + 2 * 4 * width * 96
    assert decode["model_flops"] == work
    assert decode["memory"]["cache"] > 2 * 2 * 160 * width * 4  # keys and values, float32
    assert prefill["tokens"] == 192 and decode["tokens"] == 2
    listed = subprocess.run(
        [*command, f"--table={tmp_path}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert [line.split(" | ")[1] for line in listed.stdout.splitlines()[2:]] == [
        "prefill",
        "decode",
    ]
    wrong = subprocess.run([*command, "--config", "configs/stage2.py:tiny", "--target=v9:1"],
                           cwd=ROOT, capture_output=True, text=True, check=False)  # fmt: skip
    assert wrong.returncode == 1 and wrong.stderr.startswith("error: target 'v9:1': unknown chip")
