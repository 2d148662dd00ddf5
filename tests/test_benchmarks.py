"""Both sides of the training benchmark compute the same; nothing is timed here."""

from __future__ import annotations

import time

import generation
import pytest
import timing
import torch
import torch_peer
import training

pytestmark = pytest.mark.usefixtures("quick_compile")


def test_training_sides_agree() -> None:
    """`trainers` asserts equal losses over several steps, for either form of the experts."""
    torch.set_num_threads(1)  # its threads wait for one another where the machine is busy
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


def test_figures() -> None:
    figure = timing.Figure("a", "ms", 1.0, [1.0, 2.0, 3.0], [2.0, 4.0, 9.0], 0.0, 1.3)
    assert figure.ratio == 2.0
    assert figure.spread == (2.0, 2.5)
    assert figure.cells()[2:5] == ["2000.0", "4000.0", "2.00x"]
