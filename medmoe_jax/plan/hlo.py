"""What a compiled program does, read from its optimised HLO: FLOPs of products, bytes moved and
collectives, with the bodies of loops counted as often as they run.

XLA's own `cost_analysis` counts a loop's body once and kernels not at all. Of the branches of a
conditional the most costly is counted, except where it asks whether an expert was chosen. All
figures are those of one device.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

import numpy as np

from medmoe_jax.plan.hlo_memory import COLLECTIVES, ONE_EXPERT, Memory, declared
from medmoe_jax.plan.hlo_text import Computation, Op, group_size, operands, parse

COUNTERS = ("s32", "u32")  # of loops
# Kernels of splash attention, which do not declare their FLOPs -> products of queries and keys: the
# backward pass computes the scores again in both of its kernels.
SPLASH = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}
# Products of rows with the matrix of their expert, which declare FLOPs for all rows that there is
# room for: on a TPU megablox, and our own for one of the experts.
GROUPED = ("jit(gmm)", "jit(tgmm)", ONE_EXPERT)
# Our own on a GPU: Pallas does not hand on to Triton what a kernel declares.
GROUPED_GPU = "grouped_product"
INT4_GPU = "product_of_int4"  # likewise
EXPERT = "rows_of_expert"  # the scope of conditionals of `models.grouped`
# Custom calls that stand for no work of their own.
MARKERS = (
    "Sharding",
    "AsyncCollective",
    "AllocateBuffer",
    "AssumeGatherIndicesInBound",
    "barrier",
    "Bitcast",
    "Bitpacked",
)


@dataclass
class Collective:
    """Exchanges of one kind."""

    count: float = 0.0
    sent: float = 0.0  # bytes that one device sends


@dataclass
class Work:
    """What some part of a program does, on one device."""

    flops: float = 0.0  # of products and of kernels that declare theirs
    traffic: float = 0.0  # bytes read from and written to main memory
    collectives: dict[str, Collective] = field(default_factory=dict)
    kernels: dict[str, float] = field(default_factory=dict)  # without declared FLOPs: name -> calls
    endless: int = 0  # loops whose number of rounds is not known; counted once

    def add(self, other: Work, times: float = 1.0) -> None:
        """Adds `other`, done so many times."""
        self.flops += times * other.flops
        self.traffic += times * other.traffic
        self.endless += other.endless
        for kind, more in other.collectives.items():
            mine = self.collectives.setdefault(kind, Collective())
            mine.count += times * more.count
            mine.sent += times * more.sent
        for name, calls in other.kernels.items():
            self.kernels[name] = self.kernels.get(name, 0.0) + times * calls

    @property
    def sent(self) -> float:
        """Bytes that one device sends."""
        return sum(c.sent for c in self.collectives.values())


def work(text: str, filled: float = 1.0, chosen: float = 1.0) -> Work:
    """What a program does.

    Args:
      text: its optimised HLO (`Compiled.as_text()`).
      filled: share of the rows of `models.products` that experts own; the others are skipped.
      chosen: share of the experts that some token chose; `models.grouped` skips the others.
    """
    return _Reader(text, filled, chosen).total()


def _is_element(op: Op) -> bool:
    return op.kind == "get-tuple-element" and op.shapes[0].dtype in COUNTERS


class _Reader:
    def __init__(self, text: str, filled: float, chosen: float) -> None:
        self._filled, self._chosen = filled, chosen
        self._computations, self._entry = parse(text)
        partitions = re.search(r"num_partitions=(\d+)", text)
        self._partitions = int(partitions.group(1)) if partitions else 1
        self._known: dict[tuple[str, bool], Work] = {}
        self._memory = Memory(self._computations)

    def total(self) -> Work:
        return self._computation(self._entry, False)

    def _computation(self, name: str, fused: bool) -> Work:
        """Work of a computation; inside a fusion nothing passes the main memory."""
        key = name, fused
        if key not in self._known:
            total = self._known[key] = Work()
            for op in self._computations.get(name, {}).values():
                total.add(self._one(self._computations[name], op, fused))
        return self._known[key]

    def _one(self, within: Computation, op: Op, fused: bool) -> Work:
        if op.kind == "while":
            return self._loop(op, fused)
        if op.kind == "conditional":
            return self._branch(op, fused)
        if op.kind == "call" or op.kind.startswith("async-start"):
            total = Work()
            for name in op.called:
                total.add(self._computation(name, fused))
            return total
        kind = op.kind.removesuffix("-start")
        result = Work(traffic=0.0 if fused else self._memory.traffic(within, op))
        if op.kind == "fusion":
            for name in op.called:
                result.add(self._computation(name, True))
        elif kind in COLLECTIVES:
            self._collective(within, op, kind, result)
        elif op.kind == "dot":
            left = operands(within, op)[0].dims
            contracted = prod(left[i] for i in op.numbers("lhs_contracting_dims"))
            result.flops = 2.0 * prod(op.shapes[0].dims) * contracted
        elif op.kind == "convolution":
            result.flops = self._convolution(within, op)
        elif op.kind == "custom-call":
            self._custom(within, op, result)
        return result

    def _branch(self, op: Op, fused: bool) -> Work:
        branches = [self._computation(name, fused) for name in op.called]
        branches.sort(key=lambda w: (w.flops, w.traffic))
        share = self._chosen if EXPERT in op.attributes else 1.0
        total = Work()
        for branch, times in zip(branches[-1:] + branches[:1], (share, 1 - share), strict=False):
            total.add(branch, times)
        return total

    def _loop(self, op: Op, fused: bool) -> Work:
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', op.attributes)
        bodies = re.findall(r"(?:body|condition)=%([\w.\-]+)", op.attributes)
        rounds = int(known.group(1)) if known else self._rounds(op)
        total = Work(endless=int(rounds is None))
        for name in bodies:
            total.add(self._computation(name, fused), 1 if rounds is None else rounds)
        return total

    def _rounds(self, loop: Op) -> int | None:
        """Rounds of a loop that counts from 0 up to a constant."""
        condition, body = (loop.attribute(name)[1:] for name in ("condition", "body"))
        ops = list(self._inside(condition))
        below = [op for op in ops if op.kind == "compare" and "direction=LT" in op.attributes]
        limits = [op for op in ops if op.kind == "constant" and op.shapes[0].dtype in COUNTERS]
        read = [op for op in self._computations[condition].values() if _is_element(op)]
        others = {"parameter", "get-tuple-element", "compare", "constant", "fusion", "copy"}
        if len(below) != 1 or len(limits) != 1 or {op.kind for op in ops} - others:
            return None
        step = self._step(body, int(read[0].attribute("index"))) if len(read) == 1 else 1
        return -(-int(limits[0].literal) // step)

    def _step(self, body: str, index: int) -> int:
        """What a round adds to element `index` of the loop's state: more than 1 where the loop is
        unrolled."""
        within = self._computations[body]
        root = next(op for op in within.values() if op.root)
        op = within.get(root.operands[index]) if index < len(root.operands) else None
        while op is not None and op.kind in ("copy", "bitcast"):
            op = within.get(op.operands[0])
        parts = [] if op is None else [within[name] for name in op.operands if name in within]
        steps = [int(o.literal) for o in parts if o.kind == "constant" and o.literal.isdigit()]
        return steps[0] if op is not None and op.kind == "add" and len(steps) == 1 else 1

    def _inside(self, name: str) -> Iterator[Op]:
        for op in self._computations.get(name, {}).values():
            yield op
            for other in op.called if op.kind == "fusion" else ():
                yield from self._inside(other)

    def _collective(self, within: Computation, op: Op, kind: str, result: Work) -> None:
        given = sum(shape.size for shape in operands(within, op))
        if kind in ("collective-permute", "collective-broadcast"):
            result.collectives[kind] = Collective(1.0, given)
            return
        n = group_size(op.attributes) or self._partitions
        if n == 1 or self._memory.goes_on(within, op):
            return
        if kind == "all-reduce" and self._scatters(within, op):
            kind = "reduce-scatter"
        share = {"all-gather": n - 1.0, "all-reduce": 2.0 * (n - 1) / n}.get(kind, (n - 1) / n)
        result.collectives[kind] = Collective(1.0, share * given)

    def _scatters(self, within: Computation, op: Op) -> bool:
        """Whether each device keeps a slice of the sum only: so TPUs write a reduce-scatter."""
        users = [o.kind for o in within.values() if op.name in o.operands]
        fused = not any(o.kind == "while" for o in within.values()) and len(within) < 40
        return bool(users) and fused and all(kind == "dynamic-slice" for kind in users)

    def _convolution(self, within: Computation, op: Op) -> float:
        """FLOPs of a convolution; TPUs write products as such, with their batch in the window."""
        left, right = operands(within, op)[:2]
        out = op.shapes[0].dims
        lhs, rest = op.attribute("dim_labels").split("_")
        rhs, outs = rest.split("->")
        window = op.attribute("window")
        spatial = sorted(c for c in rhs if c.isdigit())

        def each(name: str, default: int) -> list[int]:
            found = re.search(rf"\b{name}=([\dx]+)", window)
            return [int(v) for v in found.group(1).split("x")] if found else [default] * 9

        stride, holes, wide = each("stride", 1), each("lhs_dilate", 1), each("rhs_dilate", 1)
        pads = re.search(r"\bpad=([\d_x\-]+)", window)
        low = [int(p.split("_")[0]) for p in pads.group(1).split("x")] if pads else [0] * 9
        hits = 1
        for i, dim in enumerate(spatial):
            reach = (left.dims[lhs.index(dim)] - 1) * holes[i]
            at = np.arange(out[outs.index(dim)])[:, None] * stride[i] - low[i]
            at = at + np.arange(right.dims[rhs.index(dim)]) * wide[i]
            hits *= int(((at >= 0) & (at <= reach) & (at % holes[i] == 0)).sum())
        batch, features = out[outs.index("b")], out[outs.index("f")]
        inputs = right.dims[rhs.index("i")]
        parts = (op.numbers("batch_group_count") or [1])[0]
        return 2.0 * batch * features * inputs * hits / parts

    def _custom(self, within: Computation, op: Op, result: Work) -> None:
        target = op.attribute("custom_call_target").strip('"')
        flops = declared(op)
        if flops is not None:
            grouped = any(name in op.attributes for name in GROUPED)
            result.flops = flops * (self._filled if grouped else 1.0)
        elif "$gemm" in target or "matmul" in target:
            numbers = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', op.attributes)
            axes = [int(n) for n in re.findall(r"\d+", numbers.group(1))] if numbers else [-1]
            left = operands(within, op)[0].dims
            result.flops = 2.0 * prod(op.shapes[0].dims) * prod(left[i] for i in axes)
        elif "$fmha" in target:
            result.flops = self._attention(within, op, target)
        elif products := next((n for name, n in SPLASH.items() if name in op.attributes), 0):
            result.flops = self._splash(within, op, products)
        elif INT4_GPU in op.attributes:
            rows = operands(within, op)[0].dims
            result.flops = 2.0 * prod(rows) * op.shapes[0].dims[-1]
        elif GROUPED_GPU in op.attributes:
            rows = next(s.dims for s in operands(within, op) if len(s.dims) == 2)
            result.flops = 2.0 * prod(rows) * op.shapes[0].dims[-1] * self._filled
        elif target and not any(word in target for word in MARKERS):
            name = re.search(r'kernel_name\W+"?([\w\-.]+)', op.attributes)
            result.kernels[name.group(1) if name else target] = 1.0

    def _attention(self, within: Computation, op: Op, target: str) -> float:
        """FLOPs of cuDNN's attention: two products forward, five backward."""
        dims = re.search(
            r'"intermediate_tensor_shape":\{[^{}]*"dimensions":\[([^\]]*)\]', op.attributes
        )
        if not dims:
            return 0.0
        b, n, t, s = (int(v) for v in re.findall(r"\d+", dims.group(1)))
        width = prod(operands(within, op)[0].dims) // (b * n * t)
        half = 0.5 if "CAUSAL" in op.attributes else 1.0
        return 2.0 * b * n * t * s * width * half * (5 if "Backward" in target else 2)

    def _splash(self, within: Computation, op: Op, products: int) -> float:
        """FLOPs of so many products of a splash attention kernel for a TPU.

        Its first operand has a number for each block of queries and keys; blocks above the diagonal
        are skipped, those on it are computed whole.
        """
        given = operands(within, op)
        blocks = given[0].dims[-1]
        *heads, t, h = next(s.dims for s in given if s.dtype in ("bf16", "f32") and len(s.dims) > 2)
        return 2.0 * products * prod(heads) * t * t * h * (blocks + 1) / (2 * blocks)
