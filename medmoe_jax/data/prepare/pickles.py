"""Data of a pickle file, without running anything in it.

A pickle is a program for a small stack machine. Here only those of its instructions are carried out
that make lists, tuples, dicts, sets, texts, bytes, numbers and None; one that would name, call or
build anything else is refused before it does anything. The standard library's own reader is not
used at all.
"""

from __future__ import annotations

import pickletools
from pathlib import Path
from typing import Any

from medmoe_jax.data.problems import DataError

_MARK = object()
_CONSTANTS = {
    "NONE": None,
    "NEWTRUE": True,
    "NEWFALSE": False,
}
_VALUES = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
_OLD_TEXTS = {"STRING", "BINSTRING", "SHORT_BINSTRING"}  # of Python 2, which had bytes for both
_PUTS = {"PUT", "BINPUT", "LONG_BINPUT"}
_GETS = {"GET", "BINGET", "LONG_BINGET"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read(path: Path) -> Any:
    """Content of a pickle file of plain data.

    Raises:
      DataError: the file cannot be read, is damaged, or asks for anything but plain data.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    try:
        return _Machine(path).run(data)
    except DataError:
        raise
    except Exception as error:  # a damaged file can make any instruction fail
        raise DataError(f"{path} is no pickle that can be read: {error!r}") from error


class _Machine:
    def __init__(self, path: Path):
        self._path = path
        self._stack: list[Any] = []
        self._memo: dict[Any, Any] = {}  # by number

    def run(self, data: bytes) -> Any:
        for instruction, argument, place in pickletools.genops(data):
            name = instruction.name
            if name == "STOP":
                return self._stack.pop()
            if name in _VALUES:
                self._stack.append(argument)
            elif name in _OLD_TEXTS:
                self._stack.append(_old_text(str(argument)))
            elif name in _CONSTANTS:
                self._stack.append(_CONSTANTS[name])
            elif name in _PUTS:
                self._memo[argument] = self._stack[-1]
            elif name in _GETS:
                self._stack.append(self._memo[argument])
            elif not self._build(name):
                raise DataError(
                    f"{self._path}: byte {place} is the instruction {name}, which makes something "
                    "other than plain data. Nothing of the file was run; get it from a source "
                    "that you trust"
                )
        raise DataError(f"{self._path} ends in the middle")

    def _build(self, name: str) -> bool:
        """Carries out an instruction that puts things together; False if it is not known."""
        stack = self._stack
        if name in ("PROTO", "FRAME"):
            pass
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            self._since_mark()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "EMPTY_SET":
            stack.append(set())
        elif name == "EMPTY_TUPLE":
            stack.append(())
        elif name in _TUPLES:
            size = _TUPLES[name]
            stack[-size:] = [tuple(stack[-size:])]
        elif name in ("LIST", "TUPLE", "DICT", "FROZENSET"):
            made = self._since_mark()
            kinds = {"LIST": list, "TUPLE": tuple, "FROZENSET": frozenset, "DICT": _pairs}
            stack.append(kinds[name](made))
        elif name in ("APPEND", "APPENDS"):
            items = [stack.pop()] if name == "APPEND" else self._since_mark()
            self._top(list).extend(items)
        elif name == "ADDITEMS":
            items = self._since_mark()
            self._top(set).update(items)
        elif name in ("SETITEM", "SETITEMS"):
            if name == "SETITEM":
                items = stack[-2:]
                del stack[-2:]
            else:
                items = self._since_mark()
            self._top(dict).update(_pairs(items))
        else:
            return False
        return True

    def _top(self, kind: type) -> Any:
        if type(self._stack[-1]) is not kind:
            raise DataError(f"{self._path} is no pickle that can be read: no {kind.__name__}")
        return self._stack[-1]

    def _since_mark(self) -> list[Any]:
        at = max(i for i, value in enumerate(self._stack) if value is _MARK)
        items = self._stack[at + 1 :]
        del self._stack[at:]
        return items


def _pairs(items: list[Any]) -> dict[Any, Any]:
    return dict(zip(items[::2], items[1::2], strict=True))


def _old_text(text: str) -> str:
    """A byte string of Python 2 that was read as Latin-1: as UTF-8 where it is that."""
    try:
        return text.encode("latin-1").decode("utf-8")
    except (UnicodeDecodeError, UnicodeEncodeError):
        return text
