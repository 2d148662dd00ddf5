"""TensorFlow Datasets folders: written and read without TensorFlow, equal to the rows and files."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np
import pytest
import tensorflow_datasets as tfds

from medmoe_jax.data.prepare import tfds_builder
from medmoe_jax.data.problems import DataError
from medmoe_jax.data.records import FEATURES, Record, Records, is_records


@pytest.fixture(scope="module", autouse=True)
def no_tensorflow() -> Iterator[None]:
    """Nothing here imports TensorFlow, even where it is installed."""
    yield
    assert "tensorflow" not in sys.modules


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Record]]]:
    """A folder of two splits and what must come out of it."""
    root = tmp_path_factory.mktemp("records")
    rng = np.random.default_rng(0)
    (root / "images" / "a").mkdir(parents=True)
    expected: dict[str, list[Record]] = {"train": [], "test": []}
    for number in range(9):
        split = "test" if number % 4 == 3 else "train"
        names = [f"a/{number}_{k}.png" for k in range(number % 3)]
        files = [rng.bytes(10**6 if number == 1 else 50 + number) for _ in names]
        for name, content in zip(names, files, strict=True):
            (root / "images" / name).write_bytes(content)
        image: Any = names[0] if len(names) == 1 else names or None
        row = {"id": f"r{number}", "image": image, "text": "naïve 肺\n", "n": number}
        expected[split].append(Record(row, tuple(files)))
    rows = {split: [record.row for record in found] for split, found in expected.items()}
    rows["val"] = []
    folder = tfds_builder.write("My Set", rows, root / "images", root / "out", "CC0")
    assert folder == root / "out" / "my_set" / "1.0.0"
    return folder, expected


def test_every_record_is_as_it_was(written: tuple[Path, dict[str, list[Record]]]) -> None:
    folder, expected = written
    for split, found in expected.items():
        read = Records(folder / split)
        assert len(read) == len(found)
        assert list(read) == found
        assert read[-1] == found[-1] and read[1:] == found[1:]
        assert [read[np.int64(i)] for i in (1, 0)] == [found[1], found[0]]
    assert list(Records(folder)) == expected["train"]
    assert (folder / "LICENSE").read_text() == "CC0"
    assert not (folder.parent.parent / "downloads").exists()


def test_grain_and_tfds_read_it(written: tuple[Path, dict[str, list[Record]]]) -> None:
    folder, expected = written
    source = tfds.data_source("my_set", data_dir=folder.parent.parent, split="train")
    raw = source[1]
    assert json.loads(raw["row"]) == expected["train"][1].row
    assert tuple(raw["images"]) == expected["train"][1].images
    shuffled = grain.MapDataset.source(Records(folder)).seed(3).shuffle()
    ids = [shuffled[i].row["id"] for i in range(len(shuffled))]
    assert sorted(ids) == [record.row["id"] for record in expected["train"]]
    assert pickle.loads(pickle.dumps(Records(folder)))[2] == expected["train"][2]


def test_large_sets_are_split_into_files(tmp_path: Path) -> None:
    content = [np.random.default_rng(i).bytes(100 * i + 1) for i in range(11)]
    for number, image in enumerate(content):
        (tmp_path / f"{number}.png").write_bytes(image)
    rows = [{"id": str(i), "image": f"{i}.png"} for i in range(11)]
    for shards in (0, 4, 11):
        folder = tfds_builder.write(
            f"s{shards}", {"train": rows}, tmp_path, tmp_path / "out", shards=shards
        )
        assert len(list(folder.glob("*.array_record-*"))) == max(shards, 1)
        assert [record.images for record in Records(folder)] == [(image,) for image in content]
    with pytest.raises(DataError, match="--shards 3, but 'test' has 2 rows"):
        splits = {"train": rows, "test": rows[:2]}
        tfds_builder.write("t", splits, tmp_path, tmp_path / "out", shards=3)


def test_which_paths_are_records(written: tuple[Path, dict[str, list[Record]]]) -> None:
    folder, _ = written
    assert is_records(folder) and is_records(folder / "test") and not is_records(folder.parent)
    with pytest.raises(DataError, match="no split 'dev'; it has: train, test"):
        Records(folder / "dev")
    with pytest.raises(DataError, match="no TensorFlow Datasets folder"):
        Records(folder.parent)
    with pytest.raises(IndexError, match="record 7 of 7"):
        Records(folder)[7]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"pythonClassName": "os.path"}, "os.path"),
        ({"featuresDict": {"features": {"label": {}}}}, r"\['label'\]"),
        ({"featuresDict": None}, "cannot be read"),
    ],
)
def test_foreign_features_are_refused(
    written: tuple[Path, dict[str, list[Record]]],
    tmp_path: Path,
    change: dict[str, Any],
    message: str,
) -> None:
    """Nothing is imported because a data file says so."""
    described = json.loads((written[0] / FEATURES).read_text())
    for file in written[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / FEATURES).write_text(json.dumps(described | change))
    with pytest.raises(DataError, match=message):
        Records(tmp_path)


def test_a_file_cut_short_is_named(
    written: tuple[Path, dict[str, list[Record]]], tmp_path: Path
) -> None:
    for file in written[0].iterdir():
        content = file.read_bytes()
        cut = "train" in file.name
        (tmp_path / file.name).write_bytes(content[: len(content) // 2] if cut else content)
    with pytest.raises(DataError, match="cannot be read"):
        list(Records(tmp_path))


def test_what_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"image")
    rows = [{"id": "1", "image": "a.png"}]
    tfds_builder.write("s", {"train": rows}, tmp_path, tmp_path / "out")
    with pytest.raises(DataError, match="is there already"):
        tfds_builder.write("s", {"train": rows}, tmp_path, tmp_path / "out")
    with pytest.raises(DataError, match=r"'b\.png' is not in"):
        tfds_builder.write("t", {"train": [{"image": "b.png"}]}, tmp_path, tmp_path / "out")
    with pytest.raises(DataError, match="points out of"):
        tfds_builder.write("t", {"train": [{"image": "../a.png"}]}, tmp_path, tmp_path / "out")
    with pytest.raises(DataError, match="no rows"):
        tfds_builder.write("t", {"train": []}, tmp_path, tmp_path / "out")
    with pytest.raises(DataError, match="start with a letter"):
        tfds_builder.write("3", {"train": rows}, tmp_path, tmp_path / "out")
    assert not (tmp_path / "out" / "t").exists()
