"""What a check has found: one thing wrong with one row, or with a file as a whole."""

from __future__ import annotations

from dataclasses import dataclass

ERROR, WARNING = "error", "warning"
WHOLE = -1  # in place of a row: the finding is about the file
CLUES = {  # part of a reason -> kind of the finding; the first that fits
    "points out of": "path leaves the folder",
    "is a link that leaves": "path leaves the folder",
    "is not in": "missing image",
    "empty ": "empty row",
    "no answer": "empty row",
    "has no answer": "empty row",
    "max_length": "over-long sample",
    "pixels; ": "absurd size",
    "too large": "absurd size",
    "too elongated": "absurd size",
    "voxels": "absurd size",
    "unpacks to": "absurd size",
    "image '": "unreadable image",
}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong (ERROR) or worth a look (WARNING)."""

    level: str
    kind: str  # a few words; findings are counted by it
    file: str
    row: int  # 0-based position in the file, WHOLE for all of it
    id: str
    reason: str

    def __str__(self) -> str:
        where = self.file if self.row == WHOLE else f"{self.file} row {self.row} (id {self.id!r})"
        return f"{where}: {self.reason}"


def kind_of(reason: str, otherwise: str) -> str:
    """The kind that belongs to a reason given by another module."""
    return next((kind for clue, kind in CLUES.items() if clue in reason), otherwise)
