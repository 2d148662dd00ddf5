"""Merged coordinates against the official merge, and the shapes of batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from medmoe_jax.data import merge
from medmoe_jax.data.problems import DataError

MODELS = (
    "phi_top1",
    "phi_top2",
    "stablelm_top1",
    "stablelm_top2",
    "phi_dense_stage2",
    "stablelm_dense_stage2",
)


def official_batch(io: dict[str, np.ndarray], patches: int) -> dict[str, np.ndarray]:
    names = ("input_ids", "attention_mask", "labels", "pixel_values")
    return merge.from_official(*(io[name] for name in names), patches, io["pixel_values"].shape[-1])


@pytest.mark.parametrize("model", MODELS)
def test_merge_of_the_official_batch(model: str, fixtures: Path) -> None:
    io = load_file(fixtures / model / "io.safetensors")
    patches = io["out.clip_features"].shape[1]
    batch = official_batch(io, patches)
    np.testing.assert_array_equal(batch["labels"], io["out.merged_labels"])
    np.testing.assert_array_equal(batch["mask"], io["out.merged_attention_mask"])
    assert batch["tokens"].dtype == batch["image_pos"].dtype == batch["labels"].dtype == np.int32
    assert batch["images"].dtype == np.float32
    # The projector's outputs are consumed in order, one unused for each row without an image.
    used = 0
    for number in range(len(batch["tokens"])):
        places = np.flatnonzero(batch["image_pos"][number] >= 0)
        assert (batch["tokens"][number, places] == 0).all()
        np.testing.assert_array_equal(batch["image_pos"][number, places], np.arange(len(places)))
        count = len(places) // patches
        flat = io["out.projector_out"][used : used + count].reshape(-1, 64)
        merged = io["out.merged_inputs_embeds"][number, places]
        np.testing.assert_array_equal(flat[batch["image_pos"][number, places]], merged)
        for k in range(count):
            np.testing.assert_array_equal(
                batch["images"][number, k], io["pixel_values"][used + k].transpose(1, 2, 0)
            )
        assert not batch["images"][number, count:].any()
        used += max(1, count)
    assert used == len(io["pixel_values"])


@pytest.mark.parametrize("model", MODELS)
def test_prompts_without_mask_labels_or_images(model: str, fixtures: Path) -> None:
    io = load_file(fixtures / model / "io.safetensors")
    ids, pixels = io["gen.image.input_ids"], io["gen.image.pixel_values"]
    batch = merge.from_official(ids, None, None, pixels, 9, 21)
    assert batch["tokens"].shape == (1, ids.shape[1] + 8)
    assert batch["mask"].all() and (batch["labels"] == -100).all()
    batch = merge.from_official(io["gen.text.input_ids"], None, None, None, 9, 21)
    np.testing.assert_array_equal(batch["tokens"], io["gen.text.input_ids"])
    assert batch["images"].shape == (1, 1, 21, 21, 3) and not batch["images"].any()


def test_expand() -> None:
    row = merge.expand([7, -200, 8, -200, 9], [-100, 5, 8, 5, 9], 3)
    assert row.tokens.tolist() == [7, 0, 0, 0, 8, 0, 0, 0, 9]
    assert row.image_pos.tolist() == [-1, 0, 1, 2, -1, 3, 4, 5, -1]
    assert row.labels.tolist() == [-100, -100, -100, -100, 8, -100, -100, -100, 9]
    assert merge.merged_length([7, -200, 8, -200, 9], 3) == 9
    assert merge.expand([4, 5], None, 3).labels.tolist() == [-100, -100]


def test_pad_rows() -> None:
    rows = [merge.expand([1, -200], [1, -100], 2), merge.expand([], None, 2)]
    batch = merge.pad_rows(rows, 5)
    assert batch["mask"].tolist() == [[True] * 3 + [False] * 2, [False] * 5]
    assert batch["tokens"].tolist() == [[1, 0, 0, 0, 0], [0] * 5]
    assert batch["image_pos"].tolist() == [[-1, 0, 1, -1, -1], [-1] * 5]
    assert batch["labels"].tolist() == [[1, -100, -100, -100, -100], [-100] * 5]
    with pytest.raises(DataError, match="row 0 has 3 places, the batch only 2"):
        merge.pad_rows(rows, 2)


def test_wrong_arrays_are_told() -> None:
    with pytest.raises(DataError, match="negative token id -3"):
        merge.expand([1, -3], None, 2)
    with pytest.raises(DataError, match="two equal lists"):
        merge.expand([1, 2], [1], 2)
    ids = np.array([[1, -200, 2]])
    with pytest.raises(DataError, match="1 image tokens, but pixel_values is missing"):
        merge.from_official(ids, None, None, None, 4, 8)
    with pytest.raises(DataError, match=r"need \(1, 3, 8, 8\)"):
        merge.from_official(ids, None, None, np.zeros((2, 3, 8, 8)), 4, 8)
    with pytest.raises(DataError, match="one shape"):
        merge.from_official(ids, np.ones((1, 2)), None, None, 4, 8)
