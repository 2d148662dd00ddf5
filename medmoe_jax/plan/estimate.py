"""A compiled program held against the published figures of a chip."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from medmoe_jax import flops, layout
from medmoe_jax.config import RunConfig
from medmoe_jax.plan import hlo
from medmoe_jax.plan.programs import Program
from medmoe_jax.plan.targets import Target


@dataclass
class Plan:
    """What is known of one program on one target; bytes, FLOPs and seconds are of one device."""

    program: str
    phase: str
    model: str
    target: str
    devices: int  # that run the program
    mesh: dict[str, int]
    batch: int  # rows of all devices
    length: int  # tokens of a row
    remat: str
    dtype: str
    fits: bool | None  # None: not known, as the size of the memory is not, or there is no program
    limit: float | None  # bytes that a program may use
    obstacle: str
    memory: dict[str, float]
    model_flops: float  # a device's share
    compiled_flops: float | None
    traffic: float | None
    collectives: dict[str, dict[str, float]]
    kernels: dict[str, float]  # kernels whose FLOPs are not in compiled_flops: calls
    endless: int
    seconds: dict[str, float] = field(default_factory=dict)  # least time, by what bounds it
    mfu: float | None = None  # at the largest of `seconds`: an upper limit
    compile_seconds: float = 0.0

    @property
    def bound(self) -> float | None:
        """The least seconds of the program, everything overlapping perfectly."""
        return max(self.seconds.values(), default=None)

    @property
    def tokens(self) -> int:
        """Tokens of a run of the program, all devices."""
        return self.batch * (1 if self.program == "decode" else self.length)


def plan(program: Program, cfg: RunConfig, target: Target, model: str, length: int) -> Plan:
    """Reads and estimates a program."""
    devices = len(target.devices) if program.mesh else 1
    chip = target.chip
    limit = None if chip is None else chip.memory - chip.reserve
    share = program.model_flops / devices
    result = Plan(
        program=program.name,
        phase=cfg.phase,
        model=model,
        target=target.name,
        devices=devices,
        mesh=program.mesh,
        batch=cfg.optim.batch_size,
        length=length,
        remat=cfg.remat,
        dtype=cfg.compute_dtype,
        fits=False if program.too_large else None,
        limit=limit,
        obstacle=program.obstacle,
        memory=dict(program.arguments),
        model_flops=share,
        compiled_flops=None,
        traffic=None,
        collectives={},
        kernels={},
        endless=0,
        compile_seconds=program.seconds,
    )
    if program.obstacle:
        return result
    # Devices along `expert` have room for all tokens of each other. Chosen equally often, each of
    # their experts gets its share. In decoding most are not chosen at all, and all others wait for
    # the device that owns the one that is.
    moe, owners = layout.model_of(cfg).moe, program.mesh.get("expert", 1)
    if moe is None or moe.experts % owners:
        owners = 1
    chosen = min(1.0, owners * flops.chosen(moe, result.tokens))
    work = hlo.work(program.text, filled=1.0 / owners, chosen=chosen)
    result.memory |= _memory(program)
    result.fits = None if limit is None else result.memory["peak"] <= limit
    result.compiled_flops, result.traffic = work.flops, work.traffic
    result.collectives = {kind: vars(found) for kind, found in sorted(work.collectives.items())}
    result.kernels, result.endless = work.kernels, work.endless
    # With loops of unknown length the work is more than was counted: no bound is better than a
    # wrong one.
    if chip is not None and not work.endless:
        result.seconds = {
            "memory": work.traffic / chip.bandwidth,
            "network": work.sent / chip.network,
        }
        if cfg.compute_dtype in chip.peak:
            peak = chip.peak[cfg.compute_dtype]
            # Kernels that do not declare their FLOPs leave the model's as the least there can be.
            result.seconds["arithmetic"] = max(work.flops, share) / peak
            assert result.bound
            result.mfu = share / peak / result.bound
    return result


def _memory(program: Program) -> dict[str, float]:
    """Bytes of a device: what its arguments take beyond their sizes, and what the program adds."""
    stats = program.memory
    found = {
        "padding": max(0.0, stats["arguments"] - sum(program.arguments.values())),
        "outputs": max(0.0, stats["outputs"] - stats["reused"]),
        "temporaries": float(stats["temporaries"]),
        "code": float(stats["code"]),
    }
    # What a program does not read lies on the device all the same.
    total = sum(program.arguments.values()) + sum(found.values())
    return found | {"peak": total}


def to_json(result: Plan, versions: dict[str, str], command: str) -> dict[str, Any]:
    """A plan as a JSON object."""
    return vars(result) | {
        "tokens": result.tokens,
        "bound_seconds": result.bound,
        "versions": versions,
        "command": command,
    }
