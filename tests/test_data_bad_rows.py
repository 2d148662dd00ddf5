"""Rows that cannot be used: told before training and in batches, or skipped, and never cut."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import seven_rows
import tiny_data
from seven_rows import PATCHES, ROWS, SPEC, take

from medmoe_jax.config import DataConfig
from medmoe_jax.data import merge, templates, tokens
from medmoe_jax.data.check import load_samples, sample_fault
from medmoe_jax.data.pipeline import Batches, build
from medmoe_jax.data.problems import DataError
from medmoe_jax.data.sources import Loaded, Sample

Data = tuple[list[Sample], DataConfig, Any]


@pytest.fixture
def data(tmp_path: Path) -> Data:
    """Samples, the settings that they were read with, and the tokenizer."""
    cfg, tokenizer = seven_rows.config(tmp_path), seven_rows.tokenizer(tmp_path / "tokenizer")
    return load_samples(cfg.files, cfg, tokenizer, PATCHES).samples, cfg, tokenizer


def test_broken_image_is_an_error_that_names_it(data: Data) -> None:
    samples, cfg, tokenizer = data
    (Path(cfg.image_folder) / "i3.png").write_bytes(b"broken")
    batches = build(samples, tokenizer, SPEC, PATCHES, cfg, 2, 0, train=False)
    assert next(batches)["row"].tolist() == [0, 1]
    with pytest.raises(DataError) as caught:
        next(batches)
    batches.close()
    for part in (cfg.files[0], "row 3", "'r3'", "'i3.png' cannot be read", "on_error=skip"):
        assert part in str(caught.value)
    assert batches.get_state()["next_batch"] == 1


def test_skipped_rows_are_blank_and_counted_once(data: Data) -> None:
    samples, cfg, tokenizer = data
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


def test_no_usable_row_ends_the_run(data: Data) -> None:
    """Where all images are broken there is no batch to wait for."""
    samples, cfg, tokenizer = data
    for file in Path(cfg.image_folder).iterdir():
        file.write_bytes(b"broken")
    shown = [sample for sample in samples if sample.images]
    cfg = dataclasses.replace(cfg, on_error="skip")
    batches = build(shown, tokenizer, SPEC, PATCHES, cfg, 2, 5)
    with pytest.raises(DataError, match=r"(?s)6 of 6 row.*No row is left"):
        next(batches)
    batches.close()


def test_resumed_run_knows_the_rows_skipped_before(data: Data) -> None:
    """Wherever it was stopped: those before the saved place once, later ones found anew."""
    samples, cfg, tokenizer = data
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


def test_training_leaves_out_batches_without_any_row(data: Data) -> None:
    samples, cfg, tokenizer = data
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


def test_over_long_rows_are_told_and_never_cut(data: Data) -> None:
    _, cfg, tokenizer = data
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


def test_rows_given_without_a_check_are_caught(data: Data) -> None:
    _, cfg, tokenizer = data
    loaded: Loaded = load_samples(cfg.files, cfg, tokenizer, PATCHES)
    cfg = dataclasses.replace(cfg, max_length=64, buckets=(64,))
    with pytest.raises(DataError, match=r"row 0 \(id 'r0'\).*max_length is 64"):
        next(build(loaded.samples, tokenizer, SPEC, PATCHES, cfg, 2, 0, train=False))
    cfg = dataclasses.replace(cfg, template="plain", max_length=256)
    with pytest.raises(DataError, match=r"row 5 \(id 'r5'\).*'plain' takes one image"):
        take(build(loaded.samples, tokenizer, SPEC, PATCHES, cfg, 1, 0, train=False), None)


def test_all_problems_come_in_one_error(data: Data, tmp_path: Path) -> None:
    _, cfg, tokenizer = data
    rows = [tiny_data.row(0, "no"), tiny_data.row(1, ""), tiny_data.row(99, "no")]
    rows.append(tiny_data.row(2, "long " * 300))
    file = tiny_data.save_rows(tmp_path / "bad.jsonl", rows)
    with pytest.raises(DataError) as caught:
        load_samples([file], cfg, tokenizer, PATCHES)
    reasons = [problem.reason for problem in caught.value.problems]
    assert [problem.row for problem in caught.value.problems] == [1, 2, 3]
    for reason, part in zip(reasons, ("empty answer", "'i99.png'", "max_length is"), strict=True):
        assert part in reason


def test_fault_of_text_that_has_more_bytes_than_letters(data: Data) -> None:
    _, cfg, tokenizer = data
    sample = Sample("x", (), (("human", "?"), ("gpt", "胸" * 40)), "", -1, "", "f", 0)
    length = len(tokens.encode(templates.render("phi", sample.turns), tokenizer).ids)
    for limit, fault in ((length, ""), (length - 1, f"{length} places with its 0 image(s)")):
        cut = dataclasses.replace(cfg, max_length=limit)
        assert sample_fault(sample, cut, tokenizer, PATCHES).startswith(fault)
        assert bool(sample_fault(sample, cut, tokenizer, PATCHES)) == bool(fault)
