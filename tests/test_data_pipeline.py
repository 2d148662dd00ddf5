"""Batches: contents, order, resuming, sharing among processes, bad rows."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_data
from PIL import Image

from medmoe_jax.config import DataConfig
from medmoe_jax.data import merge, templates, tokens
from medmoe_jax.data.check import load_samples, sample_fault
from medmoe_jax.data.collate import Collator
from medmoe_jax.data.image_store import ImageStore
from medmoe_jax.data.images import ImageSpec, fit, load_image
from medmoe_jax.data.lengths import sample_lengths
from medmoe_jax.data.order import plan
from medmoe_jax.data.pipeline import Batches, build
from medmoe_jax.data.prepare import tfds_builder
from medmoe_jax.data.problems import DataError
from medmoe_jax.data.sources import Loaded, Sample

PATCHES = 4
ROWS = 7
SPEC = ImageSpec(8, 8, "pad")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tiny_data.save_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return tokens.load_tokenizer(folder, "phi")


@pytest.fixture
def cfg(tmp_path: Path) -> DataConfig:
    """Seven rows: row 5 has two images, row 6 none, later rows longer answers."""
    rows = [tiny_data.row(i, "yes " * (4 * i + 1), modality="CT") for i in range(ROWS)]
    for number in range(ROWS):
        tiny_data.save_image(tmp_path / "images" / f"i{number}.png", number)
    rows[5]["image"] = ["i5.png", "i0.png"]
    rows[5]["conversations"][0]["value"] = "<image> <image> Which?"
    del rows[6]["image"], rows[6]["modality"]
    rows[6]["conversations"][0]["value"] = "What is asthma?"
    file = tiny_data.save_rows(tmp_path / "rows.json", rows)
    return DataConfig(
        files=(str(file),),
        image_folder=str(tmp_path / "images"),
        max_length=256,
        buckets=(80, 90, 100, 120, 256),
    )


@pytest.fixture
def samples(cfg: DataConfig, tokenizer: Any) -> list[Sample]:
    return load_samples(cfg.files, cfg, tokenizer, PATCHES).samples


def take(batches: Batches, count: int | None) -> list[dict[str, np.ndarray]]:
    taken = [dict(batch) for batch in itertools.islice(batches, count)]
    batches.close()
    return taken


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
    whole = take(build(samples, tokenizer, SPEC, PATCHES, cfg, 2, 5), 4)
    cfg = dataclasses.replace(cfg, workers=1)
    batches = build(samples, tokenizer, SPEC, PATCHES, cfg, 2, 5)
    assert batches.order.batches(3) >= 3  # the epochs known so far travel along
    assert_same(take(batches, 4), whole)


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


def test_broken_image_is_an_error_that_names_it(
    samples: list[Sample], cfg: DataConfig, tokenizer: Any
) -> None:
    (Path(cfg.image_folder) / "i3.png").write_bytes(b"broken")
    batches = build(samples, tokenizer, SPEC, PATCHES, cfg, 2, 0, train=False)
    assert next(batches)["row"].tolist() == [0, 1]
    with pytest.raises(DataError) as caught:
        next(batches)
    batches.close()
    for part in (cfg.files[0], "row 3", "'r3'", "'i3.png' cannot be read", "on_error=skip"):
        assert part in str(caught.value)
    assert batches.get_state()["next_batch"] == 1


def test_skipped_rows_are_blank_and_counted_once(
    samples: list[Sample], cfg: DataConfig, tokenizer: Any
) -> None:
    whole = take(build(samples, tokenizer, SPEC, PATCHES, cfg, 3, 5), 6)
    (Path(cfg.image_folder) / "i3.png").unlink()
    cfg = dataclasses.replace(cfg, on_error="skip")
    batches = build(samples, tokenizer, SPEC, PATCHES, cfg, 3, 5)
    taken = take(batches, 6)
    for one, two in zip(taken, whole, strict=True):
        bad = two["row"] == 3
        assert one["tokens"].shape == two["tokens"].shape
        assert one["row"].tolist() == np.where(bad, -1, two["row"]).tolist()
        assert not one["mask"][bad].any() and (one["labels"][bad] == -100).all()
        assert not one["images"][bad].any() and (one["modality"][bad] == -1).all()
        np.testing.assert_array_equal(one["images"][~bad], two["images"][~bad])
    assert [(problem.row, problem.id) for problem in batches.problems] == [(3, "r3")]
    assert "'i3.png' is not in" in batches.problems[0].reason


def test_resumed_run_knows_the_rows_skipped_before(
    samples: list[Sample], cfg: DataConfig, tokenizer: Any
) -> None:
    """Wherever it was stopped: those before the saved place once, later ones found anew."""
    (Path(cfg.image_folder) / "i3.png").unlink()
    (Path(cfg.image_folder) / "i4.png").write_bytes(b"broken")
    cfg = dataclasses.replace(cfg, on_error="skip")

    def make() -> Batches:
        return build(samples, tokenizer, SPEC, PATCHES, cfg, 2, 5, train=False)

    whole = make()
    take(whole, None)
    assert [problem.id for problem in whole.problems] == ["r3", "r4"]
    for stop, found in ((0, []), (1, []), (2, ["r3"]), (3, ["r3", "r4"]), (4, ["r3", "r4"])):
        first = make()
        take(first, stop)
        second = make()
        second.set_state(json.loads(json.dumps(first.get_state())))
        assert [problem.id for problem in second.problems] == found
        take(second, None)
        assert second.problems == whole.problems
    second.set_state(make().get_state())
    assert not second.problems


def test_training_leaves_out_batches_without_any_row(
    samples: list[Sample], cfg: DataConfig, tokenizer: Any
) -> None:
    (Path(cfg.image_folder) / "i3.png").unlink()
    cfg = dataclasses.replace(cfg, on_error="skip")
    batches = build(samples, tokenizer, SPEC, PATCHES, cfg, 1, 5)
    rows = []
    for _ in range(6):
        rows += next(batches)["row"].tolist()
        state = batches.get_state()
        batches.set_state(state)
    batches.close()
    assert sorted(rows) == [0, 1, 2, 4, 5, 6]
    evaluated = take(build(samples, tokenizer, SPEC, PATCHES, cfg, 1, 5, train=False), None)
    assert [batch["row"].item() for batch in evaluated] == [0, 1, 2, -1, 4, 5, 6]


def test_over_long_rows_are_told_and_never_cut(cfg: DataConfig, tokenizer: Any) -> None:
    lengths = []
    for sample in load_samples(cfg.files, cfg, tokenizer, PATCHES).samples:
        coded = tokens.encode(templates.render("phi", sample.turns), tokenizer)
        lengths.append(merge.merged_length(coded.ids, PATCHES))
    limit = sorted(lengths)[-2]
    tight = dataclasses.replace(cfg, max_length=limit)
    longest = lengths.index(max(lengths))
    with pytest.raises(DataError, match=rf"1 of 7 [^$]*row {longest} [^$]*{max(lengths)} places"):
        load_samples(cfg.files, tight, tokenizer, PATCHES)
    loaded = load_samples(
        cfg.files, dataclasses.replace(tight, on_error="skip"), tokenizer, PATCHES
    )
    assert [sample.row for sample in loaded.samples] == [
        row for row in range(ROWS) if row != longest
    ]
    batches = build(loaded.samples, tokenizer, SPEC, PATCHES, tight, 6, 0, train=False)
    assert take(batches, None)[0]["tokens"].shape[1] == limit


def test_rows_given_without_a_check_are_caught(cfg: DataConfig, tokenizer: Any) -> None:
    loaded: Loaded = load_samples(cfg.files, cfg, tokenizer, PATCHES)
    cfg = dataclasses.replace(cfg, max_length=64, buckets=(64,))
    with pytest.raises(DataError, match=r"row 0 \(id 'r0'\).*max_length is 64"):
        next(build(loaded.samples, tokenizer, SPEC, PATCHES, cfg, 2, 0, train=False))
    cfg = dataclasses.replace(cfg, template="plain", max_length=256)
    with pytest.raises(DataError, match=r"row 5 \(id 'r5'\).*'plain' takes one image"):
        take(build(loaded.samples, tokenizer, SPEC, PATCHES, cfg, 1, 0, train=False), None)


def test_all_problems_come_in_one_error(cfg: DataConfig, tokenizer: Any, tmp_path: Path) -> None:
    rows = [tiny_data.row(0, "no"), tiny_data.row(1, ""), tiny_data.row(99, "no")]
    rows.append(tiny_data.row(2, "long " * 300))
    file = tiny_data.save_rows(tmp_path / "bad.jsonl", rows)
    with pytest.raises(DataError) as caught:
        load_samples([file], cfg, tokenizer, PATCHES)
    reasons = [problem.reason for problem in caught.value.problems]
    assert [problem.row for problem in caught.value.problems] == [1, 2, 3]
    for reason, part in zip(reasons, ("empty answer", "'i99.png'", "max_length is"), strict=True):
        assert part in reason


def test_fault_of_text_that_has_more_bytes_than_letters(cfg: DataConfig, tokenizer: Any) -> None:
    sample = Sample("x", (), (("human", "?"), ("gpt", "胸" * 40)), "", -1, "", "f", 0)
    length = len(tokens.encode(templates.render("phi", sample.turns), tokenizer).ids)
    for limit, fault in ((length, ""), (length - 1, f"{length} places with its 0 image(s)")):
        cut = dataclasses.replace(cfg, max_length=limit)
        assert sample_fault(sample, cut, tokenizer, PATCHES).startswith(fault)
        assert bool(sample_fault(sample, cut, tokenizer, PATCHES)) == bool(fault)


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
