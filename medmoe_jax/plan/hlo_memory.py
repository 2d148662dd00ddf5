"""Bytes that single instructions of optimised HLO read from and write to main memory.

Estimated from the shapes of what goes in and out: of a slice what it takes, of an array that is
changed in place what is changed, of a fusion nothing of what stays inside.
"""

from __future__ import annotations

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
# Products of rows with the matrix of their expert on a TPU: megablox, which declares its FLOPs.
GROUPED = ("gmm", "tgmm")


def is_grouped(op: Op) -> bool:
    """Whether it is a product of megablox."""
    return op.kind == "custom-call" and any(f"jit({name})" in op.attributes for name in GROUPED)


def visited(within: Computation, op: Op) -> float:
    """Share of the experts whose rows megablox' product visits: it may be given the matrix of one
    [1, K, N], beside the borders of the rows of all, i32[E + 2] with those of nobody's."""
    given = operands(within, op)
    matrices = next((s.dims[0] for s in given if len(s.dims) == 3), 0)
    borders = next((s.dims[0] for s in given if len(s.dims) == 1), 0)
    return matrices / (borders - 2) if matrices and borders > 2 else 1.0


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
        if is_grouped(op):
            share = visited(within, op)
            moved = [*op.shapes, *(s for shapes in given for s in shapes)]
            return sum(s.traffic * (1 if len(s.dims) == 3 else share) for s in moved)
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
