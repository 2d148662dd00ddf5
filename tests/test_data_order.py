"""Which samples stand where: packing, grouping, mixtures, and the padding they leave."""

from __future__ import annotations

import itertools
import pickle
from collections import Counter
from typing import Any

import numpy as np
import pytest

from medmoe_jax.data import packing
from medmoe_jax.data.order import Order, plan
from medmoe_jax.data.problems import DataError


def make(lengths: Any, mode: str, **changes: Any) -> Order:
    """An order of samples of these lengths."""
    settings: dict[str, Any] = dict(batch_size=4, seed=0, room=2048, buckets=(), most_buckets=6)
    settings |= {"train": True, "sets": (), "weights": ()} | changes
    return plan(np.asarray(lengths, np.int64), mode=mode, **settings)


def vqa_like(n: int, seed: int, share: float = 0.1) -> np.ndarray:
    """Questions about one image of 576 places, with a share of captions and conversations."""
    rng = np.random.default_rng(seed)
    long = rng.random(n) < share
    return 576 + np.where(long, rng.integers(60, 2048 - 576, n), rng.integers(20, 61, n))


def waste(order: Order, batches: int) -> float:
    """Share of the places of the first batches that hold nothing."""
    used = places = 0
    for number in range(batches):
        rows, length = order.batch(number)
        used += sum(int(order.lengths[row].sum()) for row in rows)
        places += length * order.batch_size
    return 1 - used / places


@pytest.mark.parametrize("batch", [4, 16, 64])
@pytest.mark.parametrize(
    ("mode", "long", "most"), [("pack", 0.1, 0.05), ("pack", 0.0, 0.05), ("group", 0.0, 0.05)]
)
def test_little_padding_on_questions_about_images(
    mode: str, long: float, most: float, batch: int
) -> None:
    lengths = vqa_like(4000, batch, long)
    order = make(lengths, mode, batch_size=batch)
    assert waste(order, order.batches(2)) < most
    assert len(order.buckets) <= 7


def test_order_decides_how_much_is_padding() -> None:
    """Long samples among the questions: what each mode is for."""
    lengths = vqa_like(4000, 0, 0.1)
    shuffle, group, pack = (make(lengths, mode) for mode in ("shuffle", "group", "pack"))
    wastes = [waste(order, order.batches(1)) for order in (shuffle, group, pack)]
    assert wastes[0] > 0.25 and 0.05 < wastes[1] < 0.08 and wastes[2] < 0.025
    assert pack.batches(1) < 0.4 * group.batches(1)


@pytest.mark.parametrize("mode", ["shuffle", "group", "pack"])
@pytest.mark.parametrize(("n", "batch"), [(1, 3), (7, 3), (50, 4), (64, 16), (5000, 16)])
def test_every_sample_once_an_epoch(mode: str, n: int, batch: int) -> None:
    order = make(np.random.default_rng(n).integers(1, 300, n), mode, batch_size=batch, room=400)
    rows = list(
        itertools.chain.from_iterable(order.batch(i)[0] for i in range(order.batches(3) + 1))
    )
    seen = np.concatenate(rows)[: 3 * n].reshape(3, n)
    assert (np.sort(seen, axis=1) == np.arange(n)).all()
    if n > 5:
        assert len({tuple(epoch) for epoch in seen}) == 3
    sizes = [int(order.lengths[row].sum()) for row in rows]
    assert max(sizes) <= 400
    if mode != "pack":
        assert {len(row) for row in rows} == {1}
        assert order.batches(2.5) == int(np.ceil(2.5 * n / batch))
    elif n > 5:
        ends = np.cumsum([len(row) for row in rows])
        assert {n, 2 * n} <= set(ends.tolist())  # a row holds samples of one epoch
        epochs = [int(np.searchsorted(ends, k * n)) + 1 for k in (1, 2, 3)]
        assert [order.batches(k) for k in (1, 2, 3)] == [-(-count // batch) for count in epochs]


@pytest.mark.parametrize("mode", ["shuffle", "group", "pack"])
def test_any_batch_at_once(mode: str) -> None:
    """Whatever was asked for before, also from a copy in another process."""
    lengths = vqa_like(300, 1)
    whole = make(lengths, mode, seed=3)
    batches = [whole.batch(number) for number in range(250)]
    other = make(lengths, mode, seed=3)
    copy = pickle.loads(pickle.dumps(whole))
    for number in (249, 0, 100, 99, 101, 249):
        for order in (other, copy):
            rows, length = order.batch(number)
            assert length == batches[number][1]
            assert [row.tolist() for row in rows] == [row.tolist() for row in batches[number][0]]
    different = make(lengths, mode, seed=4)
    assert [r.tolist() for r in different.batch(0)[0]] != [r.tolist() for r in batches[0][0]]


@pytest.mark.parametrize("mode", ["shuffle", "group", "pack"])
def test_mixture(mode: str) -> None:
    """Each set gives its share of every epoch, and none of its samples twice before all others."""
    sizes = (70, 7, 200)
    starts = np.cumsum([0, *sizes])
    sets = [np.arange(a, b) for a, b in itertools.pairwise(starts)]
    lengths = np.random.default_rng(0).integers(1, 300, sum(sizes))
    order = make(lengths, mode, sets=sets, weights=(0.5, 0.2, 0.3), room=400)
    assert order.shares == (139, 55, 83)  # 138.5, 55.4 and 83.1 of 277
    number = order.batches(4)
    seen = np.concatenate([row for i in range(number) for row in order.batch(i)[0]])[: 4 * 277]
    owner = np.searchsorted(starts, seen, side="right") - 1
    for epoch in range(4):
        shares = Counter(owner[epoch * 277 : (epoch + 1) * 277].tolist())
        assert [shares[k] for k in range(3)] == [139, 55, 83]
    for k, members in enumerate(sets):
        drawn = Counter(seen[owner == k].tolist())
        times = [drawn[m] for m in members.tolist()]
        assert max(times) - min(times) <= 1 and sum(times) == 4 * order.shares[k]
    assert (
        order.batch(5)[0][0].tolist()
        == make(lengths, mode, sets=sets, weights=(5, 2, 3), room=400).batch(5)[0][0].tolist()
    )


def test_evaluation_comes_once_and_in_order() -> None:
    order = make([5, 9, 70, 3, 200], "pack", train=False, batch_size=2)
    assert order.batches(1) == 3
    assert [[r.tolist() for r in order.batch(i)[0]] for i in range(3)] == [
        [[0], [1]],
        [[2], [3]],
        [[4]],
    ]
    assert [order.batch(i)[1] for i in range(3)] == [64, 128, 256]
    assert order.samples_a_row() == 1


def test_lengths_are_those_that_waste_least() -> None:
    longest = [60] * 50 + [200] + [250] * 30 + [500] * 3 + [600] * 3
    assert packing.choose_lengths(longest, 9) == [64, 256, 512, 640]
    assert packing.choose_lengths(longest, 3) == [64, 256, 640]
    assert packing.choose_lengths(longest, 1) == [640]


def test_bounds_of_a_row() -> None:
    """No row of many epochs holds more samples or images than was said."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 4, 400)
    lengths = 20 + 30 * images + rng.integers(0, 50, 400)
    order = make(lengths, "pack", room=256)
    rows = [row for i in range(order.batches(6)) for row in order.batch(i)[0]]
    assert max(len(row) for row in rows) <= order.samples_a_row() <= 256 // 20
    assert max(images[row].sum() for row in rows) <= order.images_a_row(images) < 8
    assert make(lengths, "group").images_a_row(images) == 3
    assert make(lengths, "pack").images_a_row(0 * images) == 1


def test_rows_of_a_batch_are_alike() -> None:
    """Also where an epoch ends within a batch."""
    order = make(vqa_like(999, 0), "group", batch_size=8)
    spread = [np.ptp(order.lengths[np.concatenate(order.batch(i)[0])]) for i in range(300)]
    borders = [k * 999 // 8 for k in (1, 2)]
    assert np.mean(np.asarray(spread) > 64) < 0.2
    assert max(spread[i] for i in borders) <= 64


def test_settings_that_cannot_work() -> None:
    sets = [np.arange(3), np.arange(3, 4)]
    for changes, message in (
        (dict(mode="sorted"), "data.batching 'sorted' is unknown"),
        (dict(seed=-1), "seed -1 is not in"),
        (dict(sets=sets, weights=(1,)), "one positive number for each of the 2"),
        (dict(sets=sets, weights=(1, 0)), "one positive number for each of the 2"),
        (dict(sets=sets, weights=(1, 1e-3)), r"data.files\[1\] has 1 usable rows and gives 0"),
        (dict(sets=[*sets, np.arange(0)], weights=(1, 1, 1)), r"data.files\[2\] has 0 usable"),
    ):
        with pytest.raises(DataError, match=message):
            make([9] * 4, **{"mode": "group"} | changes)
