"""The text of optimised HLO as objects: computations, instructions, and arrays of one device."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod

BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4,
    "s64": 8, "u64": 8, "f16": 2, "bf16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """An array of one device."""

    dtype: str
    dims: tuple[int, ...]
    on_chip: bool  # in a TPU's vector or scalar memory: its bytes do not pass the main memory

    @property
    def size(self) -> float:
        """Bytes."""
        return prod(self.dims) * BYTES.get(self.dtype, 1 if self.dtype.startswith("f8") else 0)

    @property
    def traffic(self) -> float:
        """Bytes of main memory."""
        return 0.0 if self.on_chip else self.size


@dataclass
class Op:
    """One instruction."""

    name: str
    kind: str
    shapes: list[Shape]  # of its results
    operands: list[str]
    literal: str  # what stands in the brackets: of a constant its value, of a parameter its number
    attributes: str
    root: bool

    @property
    def called(self) -> list[str]:
        """Names of the computations that it runs."""
        names = re.findall(r"(?:calls|to_apply|body|condition)=%([\w.\-]+)", self.attributes)
        for group in re.findall(r"branch_computations=\{([^}]*)\}", self.attributes):
            names += re.findall(r"%([\w.\-]+)", group)
        names += re.findall(r"(?:true|false)_computation=%([\w.\-]+)", self.attributes)
        return names

    def attribute(self, name: str) -> str:
        """The word behind `name=`; "" if there is none."""
        found = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^\s,]+)", self.attributes)
        return found.group(1) if found else ""

    def numbers(self, name: str) -> list[int]:
        """The list of numbers behind `name=`."""
        return [int(n) for n in re.findall(r"\d+", self.attribute(name))]


Computation = dict[str, Op]


def operands(within: Computation, op: Op) -> list[Shape]:
    """Shapes of all operands, those of tuples one after the other."""
    return [shape for name in op.operands if name in within for shape in within[name].shapes]


def _balanced(text: str, start: int) -> int:
    """Index behind the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i + 1
    return len(text)


_SHAPE = re.compile(r"\b(\w+)\[([\d,<=]*)\](\{[^}]*\})?")
_LINE = re.compile(r"^\s*(ROOT\s+)?%?([\w.\-]+) = ")


def _shapes(text: str) -> list[Shape]:
    return [
        Shape(
            dtype,
            tuple(int(d.lstrip("<=")) for d in dims.split(",") if d),
            bool(re.search(r"S\([1-9]", layout)),
        )
        for dtype, dims, layout in _SHAPE.findall(re.sub(r"/\*.*?\*/", "", text))
    ]


def _op(line: str) -> Op | None:
    head = _LINE.match(line)
    if not head:
        return None
    start = head.end()
    end = _balanced(line, start) if line[start] == "(" else line.find(" ", start)
    word = re.compile(r"\s*([\w\-]+)\(").match(line, end)
    if not word:
        return None
    close = _balanced(line, word.end() - 1)
    literal = line[word.end() : close - 1]
    operands = re.findall(r"%([\w.\-]+)", literal)
    shapes, root = _shapes(line[start:end]), bool(head.group(1))
    return Op(head.group(2), word.group(1), shapes, operands, literal, line[close:], root)


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of a module by name, and the name of the first to run."""
    found: dict[str, Computation] = {}
    entry, current, last = "", None, None
    for line in text.splitlines():
        header = re.match(r"^(ENTRY\s+)?%?([\w.\-]+) \(.*\{\s*$", line)
        if header and not _LINE.match(line):
            current = found.setdefault(header.group(2), {})
            entry = header.group(2) if header.group(1) else entry
        elif line.rstrip() == "}":
            current = None
        elif current is not None and (op := _op(line)):
            current[op.name] = last = op
        elif current is not None and last is not None:
            last.attributes += line  # what a kernel says of itself may go over several lines
    return found, entry


def group_size(attributes: str) -> int | None:
    """How many devices of a collective exchange with each other; None where it names no groups: all
    do.

    Args:
      attributes: of the operation, or its whole line. Groups are listed, numbered, or (jax 0.11)
        named by axes of the mesh.
    """
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(listed.group(1).split(","))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes):
        return int(iota.group(2))
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](?:<=\S*)?\s*\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh.group(1)))
        used = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh.group(2))
        return prod(int(part or sizes[axis]) for axis, part in used)
    return None
