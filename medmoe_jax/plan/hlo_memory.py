"""Bytes that single instructions of optimised HLO read from and write to main memory.

Estimated from the shapes of what goes in and out: of a slice what it takes, of an array that is
changed in place what is changed, of a fusion nothing of what stays inside.
"""

from __future__ import annotations

import re
from math import prod

from medmoe_jax.plan.hlo_text import Computation, Op, operands

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast",
)  # fmt: skip
# They move nothing themselves.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
    "replica-id", "opt-barrier", "while", "conditional", "call", "iota", "domain",
}  # fmt: skip
SLICES = ("dynamic-slice", "slice", "gather")
# The kernel of `models.one_expert`: of the rows and the result it visits what belongs to one
# expert, and declares FLOPs for that. It does not read the array that it writes into.
ONE_EXPERT = "product_of_one_expert"


def declared(op: Op) -> float | None:
    """The FLOPs that a kernel declares."""
    found = re.search(r'"cost_estimate":\{[^{}]*?"flops":"?(\d+)', op.attributes)
    return float(found.group(1)) if found else None


def _starts(within: Computation) -> bool:
    return any("AsyncCollectiveStart" in op.attributes for op in within.values())


class Memory:
    """What instructions of the given computations move."""

    def __init__(self, computations: dict[str, Computation]) -> None:
        self._computations = computations
        self._started = {
            op.attribute("channel_id")
            for within in computations.values()
            if _starts(within)
            for op in within.values()
            if op.kind in COLLECTIVES and op.attribute("channel_id")
        }

    def goes_on(self, within: Computation, op: Op) -> bool:
        """Whether it is part of a collective that another fusion starts.

        A TPU hides a collective behind products: it stands in the fusion that starts it, in those
        beside it, which hand its arrays on, and in the one that ends it.
        """
        if op.kind == "custom-call":
            return "AsyncCollectiveDone" in op.attributes
        known = op.kind in COLLECTIVES and op.attribute("channel_id") in self._started
        return known and not _starts(within)

    def traffic(self, within: Computation, op: Op) -> float:
        """Bytes of one instruction of the computation `within`."""
        if op.kind in FREE or op.kind.endswith("-done") or op.kind.startswith("async"):
            return 0.0
        result = sum(shape.traffic for shape in op.shapes)
        given = [within[name].shapes for name in op.operands if name in within]
        if op.kind in SLICES:
            return 2 * result
        if op.kind in ("dynamic-update-slice", "scatter"):
            update = given[1 if op.kind == "dynamic-update-slice" else -1]
            return 2 * sum(shape.traffic for shape in update)
        if op.kind == "fusion" and op.called:
            body = self._computations.get(op.called[0], {})
            reads = sum(
                self._read(op.called[0], i, sum(s.traffic for s in shapes))
                for i, shapes in enumerate(given)
            )
            return reads + self._written(body, op)
        if op.kind == "copy-start":  # to, from and a mark
            return op.shapes[0].traffic + sum(s.traffic for shapes in given for s in shapes)
        if op.kind == "slice-start":  # from, to and a mark
            return op.shapes[1].size + op.shapes[1].traffic
        if op.kind.endswith("-start"):  # the result repeats the operands
            return 2 * sum(s.traffic for shapes in given for s in shapes)
        if op.kind == "custom-call" and ONE_EXPERT in op.attributes:
            rows, kernel = [s for s in operands(within, op) if len(s.dims) == 2][:2]
            share = (declared(op) or 0.0) / (2 * prod(rows.dims) * kernel.dims[-1])
            return kernel.traffic + share * (rows.traffic + result)
        return result + sum(s.traffic for shapes in given for s in shapes)

    def _read(self, name: str, index: int, size: float) -> float:
        """Bytes that a fused computation reads of its parameter `index` of `size` bytes."""
        body = self._computations.get(name, {})
        own = [o for o in body.values() if o.kind == "parameter" and o.literal == str(index)]
        if not own or not size:
            return size
        total, names = 0.0, [own[0].name]
        while names:
            name = names.pop()
            for user in (op for op in body.values() if name in op.operands):
                places = [i for i, operand in enumerate(user.operands) if operand == name]
                if user.kind == "bitcast":
                    names.append(user.name)
                elif user.kind in SLICES and places == [0]:
                    total += sum(s.size for s in user.shapes)
                elif user.kind == "dynamic-update-slice" and places == [0]:
                    continue
                elif (user.kind == "tuple" and user.root) or self.goes_on(body, user):
                    continue  # handed on
                elif user.kind == "fusion" and user.called:
                    total += sum(self._read(user.called[0], i, size) for i in places)
                else:
                    return size
        return min(total, size)

    def _written(self, body: Computation, op: Op) -> float:
        """Bytes that a fusion writes; an array that is changed in place, what is changed; one that
        is handed on, nothing."""
        roots = [o for o in body.values() if o.root]
        if not roots or (roots[0].kind != "tuple" and len(op.shapes) > 1):
            return sum(s.traffic for s in op.shapes)
        ends = roots[0].operands if roots[0].kind == "tuple" else [roots[0].name]
        total = 0.0
        for end, shape in zip(ends, op.shapes, strict=False):
            last = body.get(end)
            while last is not None and last.kind == "bitcast":
                last = body.get(last.operands[0])
            if last is not None and (last.kind == "parameter" or self.goes_on(body, last)):
                continue
            if last is not None and last.kind == "dynamic-update-slice" and not shape.on_chip:
                update = body.get(last.operands[1])
                total += sum(s.size for s in update.shapes) if update else shape.traffic
            else:
                total += shape.traffic
        return total
