"""Full-size programs compiled for hardware that is not there: minutes each, so all are slow."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import compilers
import jax
import pytest

from medmoe_jax import generate, presets
from medmoe_jax.config import MoeConfig
from medmoe_jax.models import medmoe

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
pytestmark = [pytest.mark.slow, pytest.mark.tpu]

PHASES = ("stage1", "stage2", "router", "stage3")


def planned(folder: Path, config: str, target: str, *words: str) -> list[dict[str, Any]]:
    """What the command says of a config and a target, as it writes it to a file."""
    compilers.need(target)
    file = folder / "plan.json"
    command = [sys.executable, "-m", "medmoe_jax.plan", f"--config=configs/{config}"]
    command += [f"--target={target}", f"--json={file}", *words]
    env = compilers.environment()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())


@pytest.mark.parametrize("target", ["v5e:4x4", "h200:8"])
@pytest.mark.parametrize("size", ["phi2", "stablelm"])
@pytest.mark.parametrize("phase", PHASES)
def test_full_sizes(phase: str, size: str, target: str, tmp_path: Path) -> None:
    """Every phase of both models compiles for a TPU slice and for a node of GPUs, and fits."""
    (plan,) = planned(tmp_path, f"{phase}.py:{size}", target, "--mesh=1,-1,1")
    assert plan["fits"] and not plan["endless"]
    assert 0 < plan["mfu"] <= 1
    assert plan["compiled_flops"] > 0


def test_stage_2_sends_weights_and_no_activations(tmp_path: Path) -> None:
    """Phi-2 on 16 chips: each matrix is gathered three times (forward, repeated, backward) and its
    gradient summed once, in 16 bits, and arithmetic takes longer than that."""
    (plan,) = planned(tmp_path, "stage2.py:phi2", "v5e:4x4", "--mesh=1,-1,1")
    llm = medmoe.shapes(presets.model("phi2"))["llm"]
    matrices = sum(leaf.size for leaf in jax.tree.leaves(llm) if leaf.ndim > 1)
    assert sum(kind["sent"] for kind in plan["collectives"].values()) < 4 * 2 * matrices
    assert plan["seconds"]["network"] < plan["seconds"]["arithmetic"]
    assert plan["memory"]["peak"] < 3.2 * GIB


def test_two_plans_for_tpus_at_a_time() -> None:
    """libtpu's lock, which is for those who use a TPU, is not in the way."""
    compilers.need("v5e:1x1")
    words = [sys.executable, "-m", "medmoe_jax.plan", "--config=configs/stage2.py:tiny"]
    words += ["--target=v5e:1x1", "--decode", "--length=96", "--config.model.llm.layers=1"]
    pipe = subprocess.PIPE
    both = [
        subprocess.Popen(
            words, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, env=compilers.environment()
        )
        for _ in range(2)
    ]
    for run in both:
        said, wrong = run.communicate()
        assert run.returncode == 0, wrong
        assert "decode: stage2 of tiny on v5e:1x1" in said


@pytest.mark.parametrize("mesh", ["1,2,4", "2,4,1"])
@pytest.mark.parametrize("size", ["phi2", "stablelm"])
def test_generation_at_full_size_on_a_mesh(size: str, mesh: str, tmp_path: Path) -> None:
    """Each device holds its share of weights and cache, and a token moves neither: what attention,
    experts and meta expert of each layer give is summed over the devices, and the embedding."""
    rows, length, new = 8, 704, 64
    words = ["--decode", f"--mesh={mesh}", f"--length={length}", f"--new={new}"]
    words += [f"--config.optim.batch_size={rows}"]
    prefill, decode = planned(tmp_path, f"stage3.py:{size}", "v5e:2x4", *words)
    assert prefill["fits"] and decode["fits"] and not prefill["endless"] | decode["endless"]
    model = presets.model(size, MoeConfig())
    data, fsdp, expert = map(int, mesh.split(","))
    whole = 2 * sum(leaf.size for leaf in jax.tree.leaves(medmoe.shapes(model)))
    assert decode["memory"]["frozen"] < 1.05 * whole / (fsdp * expert)
    llm = model.llm
    places = generate.bucket(length + new)
    cache = 2 * 2 * llm.layers * rows * places * llm.kv_heads * llm.head_dim
    assert decode["memory"]["cache"] < 1.05 * cache / 8
    # All reads of weights and cache, and no second copy of them.
    assert decode["traffic"] < 1.5 * (decode["memory"]["frozen"] + decode["memory"]["cache"])
    assert decode["memory"]["temporaries"] < 0.1 * GIB
    found = decode["collectives"]
    assert set(found) <= {"all-reduce", "all-gather"}
    states = 2 * 2 * rows // data * llm.width  # a sum sends twice what it sums, at 2 bytes
    assert sum(kind["sent"] for kind in found.values()) < (3 * llm.layers + 4) * states
