"""A model folder of either kind, PyTorch or this project's, as one of this project's."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from medmoe_jax.checkpoint import FORMAT, read_json
from medmoe_jax.convert.report import ConversionError
from medmoe_jax.convert.to_jax import to_jax


@contextmanager
def model_folder(src: str | Path, vision: str | Path | None = None) -> Iterator[Path]:
    """`src` itself if it is a model folder, else its conversion in a temporary place.

    Args:
      src: a model folder, or what `convert.to_jax` takes.
      vision: CLIP folder for a PyTorch folder, see `convert.to_jax`.

    Raises:
      ConversionError: neither of the two.
    """
    src = Path(src)
    file = src / "config.json"
    if not src.exists():
        raise ConversionError(f"{src} does not exist; give a model folder or a PyTorch folder")
    if file.is_file() and read_json(file, ConversionError).get("format") == FORMAT:
        yield src
        return
    with tempfile.TemporaryDirectory() as temporary:
        to_jax(src, Path(temporary) / "model", vision=vision)
        yield Path(temporary) / "model"
