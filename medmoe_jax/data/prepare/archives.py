"""Zip files, read member by member: a source needs no unpacking, and nothing is written outside."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path, PurePosixPath

from medmoe_jax.data.problems import DataError

MAX_BYTES = 1 << 30  # of one member, unpacked


class Archive:
    """A zip file whose members are found by the last parts of their paths."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._zip = zipfile.ZipFile(path)
        except (OSError, zipfile.BadZipFile) as error:
            raise DataError(f"{path} is no zip file that can be read: {error}") from error
        self._members: dict[str, zipfile.ZipInfo] = {}  # every end of a path -> the outermost
        inside = [info for info in self._zip.infolist() if not info.is_dir()]
        for info in sorted(inside, key=lambda info: len(PurePosixPath(info.filename).parts)):
            parts = PurePosixPath(info.filename).parts
            if "__MACOSX" not in parts:
                for start in range(len(parts)):
                    self._members.setdefault("/".join(parts[start:]), info)

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def read(self, name: str) -> bytes:
        """Content of the member whose path ends with `name`.

        Raises:
          DataError: there is none, or it is damaged, encrypted or too large.
        """
        info = self._members.get(name)
        if info is None:
            raise DataError(f"{name!r} is not in {self.path}")
        if info.file_size > MAX_BYTES:
            raise DataError(f"{name!r} in {self.path} has {info.file_size} bytes: too large")
        try:
            return self._zip.read(info)
        except (OSError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise DataError(f"{name!r} in {self.path} cannot be read: {error}") from error
