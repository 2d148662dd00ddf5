"""Parquet files as the Hugging Face hub has them: one row a question, the image inside."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from medmoe_jax.data.prepare.texts import split_of
from medmoe_jax.data.problems import DataError

BATCH = 32  # rows read at a time; each has an image


def split_files(files: Sequence[Path]) -> list[tuple[str, Path]]:
    """Split of every parquet file, by its name or else by its folder's; in order of the splits.

    Raises:
      DataError: a file whose split cannot be told.
    """
    found = []
    for file in files:
        split = split_of(file.name) or split_of(file.parent.name)
        if not split:
            raise DataError(
                f"{file}: neither its name nor its folder's tells the split; call it "
                "train-....parquet, validation-....parquet or test-....parquet"
            )
        found.append((split, file))
    return sorted(found, key=lambda pair: (("train", "val", "test").index(pair[0]), pair[1]))


def rows(
    file: Path, needed: Sequence[str | tuple[str, ...]]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and columns of every row.

    Args:
      file: a parquet file.
      needed: names of columns, or groups of names of which there must be one.

    Raises:
      DataError: pyarrow is missing, the file is damaged, or lacks a column.
    """
    table = _open(file)
    have = table.schema_arrow.names
    groups = [(group,) if isinstance(group, str) else group for group in needed]
    lacking = [" or ".join(group) for group in groups if not set(group) & set(have)]
    if lacking:
        raise DataError(f"{file} has no column {', '.join(lacking)}; it has {', '.join(have)}")
    number = 0
    try:
        for batch in table.iter_batches(BATCH):
            for row in batch.to_pylist():
                yield number, row
                number += 1
    except (OSError, ValueError) as error:  # pyarrow's errors are of these kinds
        raise DataError(f"{file} is damaged after row {number}: {error}") from error


def first(row: dict[str, Any], names: Sequence[str]) -> Any:
    """The first of the columns that the row has a value in, None without any."""
    return next((row[name] for name in names if row.get(name) is not None), None)


def count(files: Sequence[Path]) -> int:
    """Rows of all files together."""
    return sum(_open(file).metadata.num_rows for file in files)


def image_bytes(value: Any) -> bytes:
    """Content of an image column: {'bytes', 'path'} or the bytes themselves.

    Raises:
      DataError: there are none.
    """
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes) or not data:
        where = f" (only its path, {value['path']!r})" if _has_path(value) else ""
        raise DataError(f"the row has no image inside{where}")
    return data


def _has_path(value: Any) -> bool:
    return isinstance(value, dict) and bool(value.get("path"))


def _open(file: Path) -> Any:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise DataError("parquet files need pyarrow: pip install pyarrow") from error
    try:
        return parquet.ParquetFile(file)
    except (OSError, ValueError) as error:
        raise DataError(f"{file} is no parquet file that can be read: {error}") from error
