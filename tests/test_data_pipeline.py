"""Batches: contents, order, resuming, sharing among processes."""

from __future__ import annotations

import dataclasses
import itertools
import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import seven_rows
import tiny_data
from PIL import Image
from seven_rows import PATCHES, ROWS, SPEC, take

from medmoe_jax.config import DataConfig
from medmoe_jax.data import merge, templates, tokens
from medmoe_jax.data.check import load_samples
from medmoe_jax.data.collate import Collator
from medmoe_jax.data.image_store import ImageStore
from medmoe_jax.data.images import fit, load_image
from medmoe_jax.data.lengths import sample_lengths
from medmoe_jax.data.order import plan
from medmoe_jax.data.pipeline import Batches, build
from medmoe_jax.data.prepare import tfds_builder
from medmoe_jax.data.problems import DataError
from medmoe_jax.data.sources import Sample


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return seven_rows.tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def cfg(tmp_path: Path) -> DataConfig:
    return seven_rows.config(tmp_path)


@pytest.fixture
def samples(cfg: DataConfig, tokenizer: Any) -> list[Sample]:
    return load_samples(cfg.files, cfg, tokenizer, PATCHES).samples


def assert_same(first: list[dict[str, np.ndarray]], second: list[dict[str, np.ndarray]]) -> None:
    assert len(first) == len(second)
    for one, two in zip(first, second, strict=True):
        assert one.keys() == two.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], two[key], err_msg=key)


def test_contents(samples: list[Sample], cfg: DataConfig, tokenizer: Any) -> None:
    (batch,) = take(build(samples, tokenizer, SPEC, PATCHES, cfg, ROWS, 0, train=False), None)
    assert {key: (value.dtype.name, value.shape[1:]) for key, value in batch.items()} == {
        "tokens": ("int32", batch["tokens"].shape[1:]),
        "image_pos": ("int32", batch["tokens"].shape[1:]),
        "labels": ("int32", batch["tokens"].shape[1:]),
        "mask": ("bool", batch["tokens"].shape[1:]),
        "images": ("uint8", (2, 8, 8, 3)),
        "modality": ("int32", ()),
        "row": ("int64", ()),
    }
    assert batch["row"].tolist() == list(range(ROWS))
    assert batch["modality"].tolist() == [0] * 6 + [-1]
    for number, sample in enumerate(samples):
        coded = tokens.encode(templates.render("phi", sample.turns), tokenizer)
        expected = merge.pad_rows([merge.expand(*coded, PATCHES)], batch["tokens"].shape[1])
        for key, value in expected.items():
            np.testing.assert_array_equal(batch[key][number], value[0])
        for k in range(2):
            image = batch["images"][number, k]
            if k < len(sample.images):
                path = Path(cfg.image_folder) / sample.images[k]
                np.testing.assert_array_equal(image, load_image(path, SPEC))
            else:
                assert not image.any()


def test_every_epoch_has_every_row_once(
    samples: list[Sample], cfg: DataConfig, tokenizer: Any
) -> None:
    def order(seed: int) -> list[int]:
        batches = take(build(samples, tokenizer, SPEC, PATCHES, cfg, 3, seed), ROWS)
        return np.concatenate([batch["row"] for batch in batches]).tolist()

    rows = order(0)
    epochs = [rows[i : i + ROWS] for i in range(0, 3 * ROWS, ROWS)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(ROWS))] * 3
    assert len(set(map(tuple, epochs))) == 3
    assert order(0) == rows
    assert order(1) != rows


def test_fewer_rows_than_a_batch(samples: list[Sample], cfg: DataConfig, tokenizer: Any) -> None:
    (batch,) = take(build(samples[:1], tokenizer, SPEC, PATCHES, cfg, 3, 0), 1)
    assert batch["row"].tolist() == [0, 0, 0]


def test_resume_is_exact_anywhere(samples: list[Sample], cfg: DataConfig, tokenizer: Any) -> None:
    def make() -> Batches:
        return build(samples, tokenizer, SPEC, PATCHES, cfg, 3, 5)

    whole = take(make(), 6)
    for stop in range(6):
        first = make()
        before = list(itertools.islice(first, stop))
        state = json.loads(json.dumps(first.get_state()))
        second = make()
        second.set_state(state)
        assert_same(before + take(second, 6 - stop), whole)
        first.set_state(make().get_state())  # an iterator in use goes back as well
        assert_same(take(first, 2), whole[:2])


def test_state_of_other_data_is_refused(
    samples: list[Sample], cfg: DataConfig, tokenizer: Any
) -> None:
    state = build(samples, tokenizer, SPEC, PATCHES, cfg, 3, 5).get_state()
    packed = dataclasses.replace(cfg, batching="pack")
    for other, key in (
        (build(samples, tokenizer, SPEC, PATCHES, cfg, 3, 6), "seed"),
        (build(samples, tokenizer, SPEC, PATCHES, cfg, 4, 5), "batch_size"),
        (build(samples[1:], tokenizer, SPEC, PATCHES, cfg, 3, 5), "digest"),
        (build(samples, tokenizer, SPEC, PATCHES + 1, cfg, 3, 5), "digest"),
        (build(samples, tokenizer, SPEC, PATCHES, packed, 3, 5), "batching"),
    ):
        with pytest.raises(DataError, match=f"the saved data position has {key}"):
            other.set_state(state)


def test_worker_processes_change_nothing(
    samples: list[Sample], cfg: DataConfig, tokenizer: Any
) -> None:
    whole = take(build(samples, tokenizer, SPEC, PATCHES, cfg, 3, 5), 6)
    cfg = dataclasses.replace(cfg, workers=2, on_error="skip")
    broken = "i1.png"
    (Path(cfg.image_folder) / broken).write_bytes(b"broken")
    with_workers = build(samples, tokenizer, SPEC, PATCHES, cfg, 3, 5)
    start = build(samples, tokenizer, SPEC, PATCHES, cfg, 3, 5).get_state()
    with_workers.set_state(start | {"next_batch": 1})
    found = take(with_workers, 5)
    assert with_workers.get_state()["next_batch"] == 6
    assert [problem.id for problem in with_workers.problems] == ["r1"]
    for one, two in zip(found, whole[1:], strict=True):
        keep = two["row"] != 1
        assert_same([{k: v[keep] for k, v in one.items()}], [{k: v[keep] for k, v in two.items()}])


@pytest.mark.parametrize("batching", ["shuffle", "group", "pack"])
def test_processes_share_a_batch(
    samples: list[Sample], cfg: DataConfig, tokenizer: Any, batching: str
) -> None:
    """1, 2 and 4 of them; any number goes on from where another was stopped."""
    cfg = dataclasses.replace(cfg, batching=batching)

    def make(index: int = 0, count: int = 1) -> Batches:
        return build(samples, tokenizer, SPEC, PATCHES, cfg, 4, 5, True, index, count)

    whole = take(make(), 5)
    state: dict[str, Any] = {}
    for count in (1, 2, 4):
        parts = []
        for index in range(count):
            batches = make(index, count)
            if state:
                batches.set_state(state)
            parts.append(take(batches, 3))
            state_after = json.loads(json.dumps(batches.get_state()))
        joined = [
            {key: np.concatenate([part[key] for part in together]) for key in together[0]}
            for together in zip(*parts, strict=True)
        ]
        first = state.get("next_batch", 0)
        assert_same(joined[: 5 - first], whole[first : first + 3])
        state = state_after | {"next_batch": first + 1}


def test_a_process_reads_its_own_rows_alone(
    samples: list[Sample], cfg: DataConfig, tokenizer: Any
) -> None:
    """Images of other processes' rows may be broken, their text is not tokenised."""

    class Counting:
        calls = 0

        def __call__(self, text: str, **settings: Any) -> Any:
            self.calls += 1
            return tokenizer(text, **settings)

    counting: Any = Counting()
    lengths = sample_lengths(samples, "phi", tokenizer, PATCHES)
    settings = dict(mode="pack", batch_size=4, seed=0, room=256, buckets=(), most_buckets=6)
    order = plan(lengths, (), (), train=True, **settings)
    store = ImageStore(cfg.image_folder, SPEC, keep=False)
    collator = Collator(samples, counting, store, 8, PATCHES, cfg, order, 1, 2, drop_empty=False)
    rows, length = order.batch(0)
    own = np.concatenate(rows[2:]).tolist()
    used = {name for i in own for name in samples[i].images}
    others = {f"i{number}.png" for number in range(ROWS)} - used
    assert others
    for name in others:
        (Path(cfg.image_folder) / name).write_bytes(b"broken")
    _, batch, problems = collator(0)
    assert batch["tokens"].shape == (2, length) and not problems
    assert sorted(batch["row"][batch["row"] >= 0].tolist()) == sorted(own)
    # The part behind each image is tokenised by itself, and what stands before the first.
    assert counting.calls == sum(1 + len(samples[i].images) for i in own)


def test_packed_rows(samples: list[Sample], cfg: DataConfig, tokenizer: Any) -> None:
    """Every sample's tokens, labels, image places and images, wherever it stands."""
    cfg = dataclasses.replace(cfg, batching="pack", on_error="skip")
    (Path(cfg.image_folder) / "i3.png").unlink()
    batches = build(samples, tokenizer, SPEC, PATCHES, cfg, 2, 0)
    seen: list[int] = []
    for batch in take(batches, 4):
        places = batch["row"].shape
        assert batch["modality"].shape == places and places[0] == 2 and places[1] >= 2
        for row in range(2):
            own = [i for i in batch["row"][row].tolist() if i >= 0]
            assert batch["row"][row, len(own) :].tolist() == [-1] * (places[1] - len(own))
            shown = 0
            for number, i in enumerate(own, 1):
                coded = tokens.encode(templates.render("phi", samples[i].turns), tokenizer)
                alone = merge.expand(*coded, PATCHES)
                here = batch["segments"][row] == number
                np.testing.assert_array_equal(batch["tokens"][row, here], alone.tokens)
                np.testing.assert_array_equal(batch["labels"][row, here], alone.labels)
                np.testing.assert_array_equal(
                    batch["image_pos"][row, here],
                    np.where(alone.image_pos < 0, -1, alone.image_pos + shown * PATCHES),
                )
                assert batch["positions"][row, here].tolist() == list(range(here.sum()))
                assert batch["modality"][row, number - 1] == samples[i].modality
                for name in samples[i].images:
                    image = load_image(Path(cfg.image_folder) / name, SPEC)
                    np.testing.assert_array_equal(batch["images"][row, shown], image)
                    shown += 1
            assert not batch["images"][row, shown:].any()
            np.testing.assert_array_equal(batch["mask"][row], batch["segments"][row] > 0)
            assert batch["segments"][row].max() == len(own)
            seen += own
    assert sorted(seen[:6]) == [0, 1, 2, 4, 5, 6]  # the epoch, but for the broken one
    assert [problem.id for problem in batches.problems] == ["r3"]


def test_workers_pack_the_same_rows(samples: list[Sample], cfg: DataConfig, tokenizer: Any) -> None:
    cfg = dataclasses.replace(cfg, batching="pack")
    whole = take(build(samples, tokenizer, SPEC, PATCHES, cfg, 2, 5), 12)
    cfg = dataclasses.replace(cfg, workers=1)
    batches = build(samples, tokenizer, SPEC, PATCHES, cfg, 2, 5)
    assert batches.order.batches(3) >= 3  # the epochs known so far travel along
    found = [next(batches) for _ in range(4)]
    # A cluster ends a run by SIGTERM to all of its processes: workers wait for the main one.
    for worker in multiprocessing.active_children():
        os.kill(worker.pid or 0, signal.SIGTERM)
    assert_same(found + take(batches, 8), whole)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 1])
def test_record_folders(
    samples: list[Sample], cfg: DataConfig, tokenizer: Any, tmp_path: Path, workers: int
) -> None:
    """Rows and images from records give the batches that files give."""
    cfg = dataclasses.replace(cfg, workers=workers)
    rows = json.loads(Path(cfg.files[0]).read_text())
    given = Path(cfg.image_folder)
    folder = tfds_builder.write("tiny", {"train": rows}, given, tmp_path / "records")
    shutil.rmtree(given)
    found = load_samples([folder], cfg, tokenizer, PATCHES).samples
    assert [dataclasses.replace(s, file="") for s in found] == [
        dataclasses.replace(s, file="") for s in samples
    ]
    (batch,) = take(build(found, tokenizer, SPEC, PATCHES, cfg, ROWS, 0, train=False), None)
    for number in range(ROWS - 1):
        pixels = np.random.default_rng(number).integers(0, 256, (16, 20, 3), np.uint8)
        np.testing.assert_array_equal(
            batch["images"][number, 0], fit(Image.fromarray(pixels), SPEC)
        )
    assert batch["row"].tolist() == list(range(ROWS))


def test_mixture_of_files(cfg: DataConfig, tokenizer: Any, tmp_path: Path) -> None:
    """Shares by file; images lie beside each file where no folder is given."""
    other = tmp_path / "other"
    for number in range(2):
        tiny_data.save_image(other / "images" / f"i{number}.png", 50 + number)
    file = tiny_data.save_rows(other / "train.jsonl", [tiny_data.row(i) for i in range(2)])
    files = (*cfg.files, str(file))
    cfg = dataclasses.replace(cfg, files=files, image_folder="", weights=(1.0, 2.0))
    samples = load_samples(files, cfg, tokenizer, PATCHES).samples
    batches = take(build(samples, tokenizer, SPEC, PATCHES, cfg, 3, 0), 9)
    rows = np.concatenate([batch["row"] for batch in batches]).reshape(3, 9)
    assert [(row >= ROWS).sum() for row in rows] == [6, 6, 6]
    drawn = np.bincount(rows.ravel(), minlength=9)
    assert drawn[ROWS:].tolist() == [9, 9] and sorted(drawn[:ROWS]) == [1] * 5 + [2] * 2
    pixels = np.concatenate([batch["images"] for batch in batches])[rows.ravel() == ROWS][0, 0]
    np.testing.assert_array_equal(pixels, load_image(other / "images" / "i0.png", SPEC))


def test_length_is_the_smallest_that_fits(
    samples: list[Sample], cfg: DataConfig, tokenizer: Any
) -> None:
    widths = []
    for batch in take(build(samples, tokenizer, SPEC, PATCHES, cfg, 1, 0, train=False), None):
        longest, width = int(batch["mask"].sum()), batch["tokens"].shape[1]
        assert width == min(bucket for bucket in cfg.buckets if bucket >= longest)
        widths.append(width)
    assert len(set(widths)) > 1, widths
    cfg = dataclasses.replace(cfg, buckets=(8, 4096), max_length=200)
    (batch,) = take(build(samples, tokenizer, SPEC, PATCHES, cfg, ROWS, 0, train=False), None)
    assert batch["tokens"].shape[1] == 200  # max_length is a bucket of its own


def test_evaluation_keeps_the_last_short_batch(
    samples: list[Sample], cfg: DataConfig, tokenizer: Any
) -> None:
    batches = build(samples, tokenizer, SPEC, PATCHES, cfg, 4, 0, train=False)
    taken = take(batches, None)
    assert [batch["row"].tolist() for batch in taken] == [[0, 1, 2, 3], [4, 5, 6, -1]]
    last = taken[1]
    assert not last["mask"][3].any() and not last["images"][3].any()
    assert (last["labels"][3] == -100).all() and last["modality"][3] == -1
    batches.set_state(batches.get_state())
    assert next(batches, None) is None
    parts = [
        take(build(samples, tokenizer, SPEC, PATCHES, cfg, 4, 0, False, i, 2), None) for i in (0, 1)
    ]
    assert [part[1]["row"].tolist() for part in parts] == [[4, 5], [6, -1]]


def test_images_stay_in_memory_if_all_fit(
    samples: list[Sample], cfg: DataConfig, tokenizer: Any
) -> None:
    cached = build(samples, tokenizer, SPEC, PATCHES, cfg, ROWS, 0)
    read = build(samples, tokenizer, SPEC, PATCHES, cfg, ROWS, 0, cache_bytes=6 * 8 * 8 * 3 - 1)
    first = next(cached)
    assert_same([first], [next(read)])
    for number in range(ROWS):
        (Path(cfg.image_folder) / f"i{number}.png").unlink()
    later = take(cached, 4)
    by_row = dict(zip(first["row"].tolist(), first["images"], strict=True))
    for row, images in zip(later[3]["row"].tolist(), later[3]["images"], strict=True):
        np.testing.assert_array_equal(images, by_row[row])
    with pytest.raises(DataError, match=r"\.png' is not in"):
        take(read, 4)
    read.close()


def test_text_only_rows(samples: list[Sample], cfg: DataConfig, tokenizer: Any) -> None:
    (batch,) = take(build(samples[6:], tokenizer, SPEC, PATCHES, cfg, 1, 0, train=False), None)
    assert batch["images"].shape == (1, 1, 8, 8, 3) and not batch["images"].any()
    assert (batch["image_pos"] == -1).all() and batch["mask"].any()


def test_wrong_settings_are_told(samples: list[Sample], cfg: DataConfig, tokenizer: Any) -> None:
    with pytest.raises(DataError, match="no samples"):
        build([], tokenizer, SPEC, PATCHES, cfg, 2, 0)
    with pytest.raises(DataError, match="batch_size 3 cannot be divided among 2"):
        build(samples, tokenizer, SPEC, PATCHES, cfg, 3, 0, True, 0, 2)
    with pytest.raises(DataError, match="seed -1"):
        build(samples, tokenizer, SPEC, PATCHES, cfg, 3, -1)
    with pytest.raises(DataError, match="'phi2' is unknown"):
        load_samples(cfg.files, dataclasses.replace(cfg, template="phi2"), tokenizer, PATCHES)
