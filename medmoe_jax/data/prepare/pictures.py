"""Images of a source -> the folder `images/`, in parallel; what is complete there is kept.

An image that Pillow reads is stored byte for byte, so nothing is lost by compressing it anew; its
suffix is added where the name has another one. DICOM and NIfTI files become PNG. Every image is
decoded once before it is stored, and a file appears under its name only when it is complete. One
that is there is kept if it is what would be written, so pictures that were mended are taken anew.
"""

from __future__ import annotations

import io
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from types import TracebackType

from PIL import Image

from medmoe_jax.config import ViewConfig
from medmoe_jax.data import images, medical
from medmoe_jax.data.prepare.types import Picture
from medmoe_jax.data.problems import DataError


class Store:
    """The folder of images while it is written; a context manager."""

    def __init__(self, folder: Path, workers: int, view: ViewConfig | None = None):
        self.folder = folder
        self.view = view or ViewConfig()  # of DICOM and NIfTI files
        self.written = 0
        self.kept = 0  # complete already
        self._pool = ThreadPoolExecutor(max(1, workers), thread_name_prefix="picture")
        self._running: dict[str, Future[str]] = {}
        self._settled: dict[str, str | DataError] = {}
        self._owners: dict[str, str] = {}  # stored under -> name of the picture
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._pool.shutdown(cancel_futures=error is not None)

    def start(self, picture: Picture) -> None:
        """Begins to store an image, unless one of that name was begun before."""
        if picture.name not in self._settled and picture.name not in self._running:
            self._running[picture.name] = self._pool.submit(self._store, picture)

    def name(self, picture: Picture) -> str:
        """Path of a started image below the folder; waits for it.

        Raises:
          DataError: it cannot be read.
        """
        future = self._running.pop(picture.name, None)
        if future is not None:
            try:
                self._settled[picture.name] = future.result()
            except DataError as error:
                self._settled[picture.name] = error
        found = self._settled[picture.name]
        if isinstance(found, DataError):
            raise found
        return found

    def _store(self, picture: Picture) -> str:
        if not _inside(picture.name):
            raise DataError(f"image {picture.name!r} points out of the image folder")
        try:
            if picture.file and medical.kind(picture.file):
                name, data = f"{picture.name}.png", self._render(picture.file)
            else:
                data = picture.read() if picture.read else _content(picture.file)
                name = picture.name + _missing_suffix(picture.name, data)
        except OSError as error:
            raise DataError(f"image {picture.name!r} cannot be read: {error}") from error
        with self._lock:
            owner = self._owners.setdefault(name, picture.name)
        if owner != picture.name:
            raise DataError(
                f"images {picture.name!r} and {owner!r} would both be stored as {name!r}, as "
                "suffixes follow the content; rename one of them"
            )
        path = self.folder / name
        if path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data:
            with self._lock:
                self.kept += 1
            return name
        images.decode(data, picture.name)  # broken, truncated or absurdly large: told now
        self._put(path, data)
        return name

    def _render(self, file: Path) -> bytes:
        """A DICOM or NIfTI file as PNG, in the view of this store."""
        content = io.BytesIO()
        images.open_image(file, self.view).save(content, "PNG")
        return content.getvalue()

    def _put(self, path: Path, data: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_bytes(data)
        partial.replace(path)
        with self._lock:
            self.written += 1


def _inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.name) and not path.is_absolute() and ".." not in path.parts


def _content(file: Path | None) -> bytes:
    assert file is not None, "a picture has `read` or `file`"
    return file.read_bytes()


def _missing_suffix(name: str, data: bytes) -> str:
    """'' if the name's suffix is one of the image's format, else the usual one.

    Raises:
      DataError: no image.
    """
    try:
        with Image.open(io.BytesIO(data), formats=images.FORMATS) as image:
            known = images.SUFFIXES.get(str(image.format), (".jpg",))
    except Exception as error:  # Pillow's plugins raise errors of many kinds on broken files
        raise DataError(f"image {name!r} is no image that can be read: {error}") from error
    return "" if PurePosixPath(name).suffix.lower() in known else known[0]
