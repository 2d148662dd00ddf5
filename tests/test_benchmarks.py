"""Both sides of the benchmarks compute the same; nothing is timed here."""

from __future__ import annotations

import json
import mmap
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerator
import generation
import jax
import numpy as np
import pytest
import timing
import torch
import torch_peer
import training
from accelerator_side import HostMemory, Result, Task

from medmoe_jax import presets
from medmoe_jax.config import LlmConfig, MoeConfig

pytestmark = pytest.mark.usefixtures("quick_compile")
PHI = replace(
    generation.QUICK,
    llm=LlmConfig(vocab=512, width=64, layers=2, ffn=128, heads=4, kv_heads=4),
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)  # its threads wait for one another where the machine is busy


def test_training_sides_agree() -> None:
    """`trainers` asserts equal losses over several steps, for either form of the experts."""
    kinds = [torch_peer.Moe, torch_peer.OfficialMoe]
    ours, theirs = training.trainers(generation.QUICK, "dots", time.process_time, kinds)
    losses = [side.step()[1] for side in (ours, *theirs)]
    assert losses[1:] == pytest.approx([losses[0]] * 2, abs=training.TOLERANCE)
    assert losses[0] < 9.2  # of 8192 words; it has learnt
    # The step's products by hand: 4 rows of 192 tokens, 2 layers (one with experts), width 64.
    d, f, tokens = 64, 176, 4 * 192
    attention, ffn = 2 * 4 * d * d, 2 * 3 * d * f
    flow = 2 * attention + 2 * ffn + ffn + 2 * d * 8192  # one pass; experts + meta + plain FFN
    assert ours.flops > tokens * flow


@pytest.mark.slow
def test_the_peer_is_phi_too(tmp_path: Path) -> None:
    """Scores, ids and losses; the peer's losses are the same when it computes layers again."""
    generation.check(generation.sides(PHI, tmp_path, time.process_time), 2)
    ours, (theirs,) = training.trainers(PHI, "none", time.process_time, [torch_peer.Moe])
    expected = [ours.step()[1] for _ in range(2)]
    theirs.peer.recompute()
    found = [theirs.step()[1] for _ in range(2)]
    assert found == pytest.approx(expected, abs=training.TOLERANCE)


def test_figures() -> None:
    figure = timing.Figure("a", "ms", 1.0, [1.0, 2.0, 3.0], [2.0, 4.0, 9.0], 0.0, 1.3)
    assert figure.ratio == 2.0
    assert figure.spread == (2.0, 2.5)
    assert figure.cells()[2:5] == ["2000.0", "4000.0", "2.00x"]


# --- full size on a GPU ---


def task(**given: Any) -> Task:
    """A tiny task."""
    usual = {"side": "jax", "part": "check", "device": "cpu", "size": "tiny_stablelm"}
    usual |= dict.fromkeys(("checkpoint", "model", "result"), "")
    return Task(**(usual | accelerator.QUICK | {"remat": ("none",)} | given))


def test_decoding_reads_chosen_experts_and_the_cache() -> None:
    model = presets.model("tiny_stablelm", MoeConfig())
    d, f, words, layers = 128, 344, 1024, 4
    expert = 3 * d * f
    attention = 4 * d * d + 3 * d  # biases of q, k and v
    once = layers * (attention + 2 * 2 * d) + 2 * expert + 2 * d + d * words  # two plain FFNs
    routed = 2 * (expert + 4 * d + 4)  # meta expert and router of two layers
    for rows, chosen in ((1, 1.0), (2, 4 * (1 - 0.75**2))):
        cache = rows * 10 * layers * 2 * d
        expected = 2 * (once + routed + 2 * chosen * expert + rows * d + cache)
        assert accelerator.decode_bytes(model, rows, 10) == pytest.approx(expected)


def test_limits_are_those_of_the_chip() -> None:
    wanted = task(batches=(8,))
    found = accelerator.limits(wanted, 1e15, "NVIDIA H200")
    # 36 image tokens, 64 of text and half of 8 new ones; 7 steps behind the first id.
    nbytes = 7 * accelerator.decode_bytes(wanted.config, 8, 104)
    assert found["decode, batch 8"] == pytest.approx(nbytes / 4.8e12)
    assert found["train step"] == pytest.approx(1 / 0.9895)
    assert accelerator.limits(wanted, 1e15, "cpu") == {}


def test_sides_that_compute_something_else_are_found() -> None:
    scores = np.random.default_rng(0).normal(size=(8, 500)).astype(np.float32)
    near, steps = scores * 1.01, [6.2, 6.1]
    assert accelerator.compare([steps, steps], (near, scores)) == {
        "scores": pytest.approx(0.01, rel=1e-3),
        "losses": 0.0,
    }
    near[3] = 0.0  # a token that went to another expert
    assert accelerator.compare([steps, [6.21, 6.1]], (near, scores))["losses"] < 0.011
    with pytest.raises(AssertionError, match="scores differ by"):
        accelerator.compare([steps, steps], (scores[:, ::-1], scores))
    with pytest.raises(AssertionError, match=r"losses differ by 5.0e-02"):
        accelerator.compare([steps, [6.2, 6.05]], (scores, scores))


def test_what_a_gpu_run_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert accelerator.fault("cpu") == ""
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "install a CUDA build" in accelerator.fault("gpu")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--compile-only" in accelerator.fault("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(accelerator.importlib.util, "find_spec", lambda name: None)
    assert "medmoe_jax[cuda]" in accelerator.fault("gpu")


def test_memory_of_the_host_is_what_no_file_backs() -> None:
    """Pages of its own: an array may be given some that were freed and are still the process'."""
    size = 64 * 2**20
    host = HostMemory()
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:
        held.write(bytes(size))
        assert 0.9 * size < host.end() < 3 * size  # what is written is there twice


def test_memory_of_the_host_is_what_was_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, looked = iter([100, 350]), threading.Event()

    def held() -> int:
        found = next(seen, 0)
        if not found:  # 350 was read before, and is kept by now
            looked.set()
        return found or 200

    monkeypatch.setattr(HostMemory, "_held", staticmethod(held))
    host = HostMemory()
    assert looked.wait(60)
    assert host.end() == 250


def test_the_tables_have_medians_and_shares() -> None:
    ours = Result({"load": [2.0], "decode, batch 1": [0.5, 1.0, 2.0]}, memory={"load, host": 2**30})
    theirs = Result({"load": [3.0], "decode, batch 1": [2.0, 2.0, 2.0]})
    whole = accelerator.joined([ours, Result({"load": [4.0]}, memory={"load, host": 2**31})])
    found = accelerator.figures(task(new=9), whole, theirs)
    speed, memory = accelerator.markdown(found, {"decode, batch 1": 0.5}, (whole, theirs)).split(
        "\n\n"
    )
    assert speed.splitlines()[2] == (
        "| decode, batch 1 | tokens/s | 8.0 | 4.0 | 2.00x | 1.50-3.00 | 50% | 25% | 60% |"
    )
    rows = ["| load, s | 3.0 | 3.0 |", "| load, host, GiB | 2.00 | - |"]
    assert memory.splitlines()[2:] == rows


@pytest.mark.slow
@pytest.mark.parametrize("size", ["tiny", "tiny_stablelm"])
def test_a_tiny_model_goes_the_way_of_the_full_ones(size: str, tmp_path: Path) -> None:
    """Folders, both sides in processes of their own, agreement in bfloat16, tables."""
    command = [sys.executable, str(accelerator.FOLDER / "accelerator.py"), "--rounds", "1"]
    command += ["--size", size, "--folder", str(tmp_path), "--out", str(tmp_path / "out")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # the weights are gone
    data = json.loads((tmp_path / "out/accelerator.json").read_text())
    names = [figure["name"] for figure in data["figures"]]
    assert names == [
        *(f"{what}, batch {rows}" for rows in (1, 8) for what in ("prefill", "decode")),
        "train step",
    ]
    assert data["jax"]["notes"]["remat"] == data["torch"]["notes"]["remat"] == "none"
    assert all(len(figure["jax"]) == len(figure["torch"]) == 3 for figure in data["figures"])
    text = (tmp_path / "out/accelerator.md").read_text()
    assert "| load, host, GiB |" in text and jax.__version__ in text
