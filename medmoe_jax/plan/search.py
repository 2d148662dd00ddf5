"""Which mesh, batch and rematerialisation: a few programs, compiled one after the other.

All of them would be hundreds of compilations of a minute each. So: first every mesh that has a
chance, with one row a device and full rematerialisation; the one with the highest `rate` wins. Then
its batch is doubled while it fits and the rate rises by 5 % at least. At last rematerialisation
of less is tried, with half the batch, and half again, where it does not fit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from math import inf, log2
from typing import NamedTuple

import jax.numpy as jnp

from medmoe_jax import sharding
from medmoe_jax.config import MeshConfig, RunConfig
from medmoe_jax.models.layers import REMAT
from medmoe_jax.plan import programs
from medmoe_jax.plan.estimate import Plan
from medmoe_jax.plan.targets import Target

WORTH = 1.05  # what doubling a batch must gain
MOST = 64  # rows a device
FULL, *POLICIES = reversed(REMAT)  # in the order of what they keep


class Trial(NamedTuple):
    """A run to be planned. Only its mesh, batch size and remat are not those asked for."""

    run: RunConfig
    left: int  # most trials that follow
    obstacle: str = ""  # why compiling it would be in vain


Measure = Callable[[Trial], Plan]
Found = tuple[RunConfig, Plan]


def meshes(devices: int, experts: int) -> Iterator[MeshConfig]:
    """All meshes of so many devices whose expert axis divides the experts (0: there are none), for
    each expert axis those that spread weights most first."""
    for expert in (n for n in range(1, devices + 1) if devices % n == 0):
        if expert > 1 and (not experts or experts % expert):
            continue
        rest = devices // expert
        for fsdp in (n for n in range(rest, 0, -1) if rest % n == 0):
            yield MeshConfig(rest // fsdp, fsdp, expert)


def candidates(cfg: RunConfig, target: Target) -> list[RunConfig]:
    """Runs with one row a device and full rematerialisation, for each mesh."""
    moe = cfg.model.moe
    experts = moe.experts if moe and cfg.objective != "router" else 0
    each = programs.with_batch(cfg, len(target.devices) * cfg.optim.accumulate)
    return [
        dataclasses.replace(each, mesh=mesh, remat=FULL)
        for mesh in meshes(len(target.devices), experts)
    ]


def least_memory(cfg: RunConfig, target: Target, length: int, images: int) -> float:
    """Bytes that a device needs whatever the compiler does: what enters a step, and the gradients,
    which all exist before their norm is known."""
    mesh = sharding.make_mesh(cfg.mesh, target.devices)
    groups = programs.abstract(cfg, mesh, length, images).groups
    kind = "float32" if cfg.optim.accumulate > 1 else cfg.compute_dtype
    share = jnp.dtype(kind).itemsize / jnp.dtype("float32").itemsize
    return sum(groups.values()) + share * groups["trainable"]


def rate(plan: Plan) -> float:
    """Tokens/s by which plans are compared: half way between the bound, where arithmetic, memory
    and network overlap wholly, and their sum, where they do not at all. Without published figures,
    the fewest bytes sent and moved."""
    if plan.bound:
        return 2 * plan.tokens / (plan.bound + sum(plan.seconds.values()))
    moved = sum(c["sent"] for c in plan.collectives.values()) + (plan.traffic or 0.0)
    return plan.tokens / max(moved, 1.0)


def usable(plan: Plan) -> bool:
    """Whether it compiled and fits, as far as that is known."""
    return not plan.obstacle and plan.fits is not False


def best(found: list[Found]) -> Found | None:
    """The fastest that fits, None if nothing does."""
    return max((f for f in found if usable(f[1])), key=lambda f: rate(f[1]), default=None)


def search(
    cfg: RunConfig, target: Target, length: int, images: int, measure: Measure
) -> Iterator[Found]:
    """Runs and their plans as they are found, for `best`. Whoever reads them can stop at any time.

    Args:
      cfg: the run to start from.
      target: the devices.
      length: tokens of a row.
      images: images of a row.
      measure: makes the plan of a trial, without compiling it where there is an obstacle.
    """
    one = len(target.devices) * cfg.optim.accumulate  # rows of a step, at least
    later = int(log2(MOST)) + len(POLICIES)
    firsts, found = candidates(cfg, target), []
    for i, run in enumerate(firsts):
        trial = Trial(run, len(firsts) - i - 1 + later)
        obstacle = _obstacle(run, target, length, images, found)
        found.append((run, measure(trial._replace(obstacle=obstacle))))
        yield found[-1]
    chosen = best(found)
    if chosen is None:
        return
    run, plan = chosen
    while run.optim.batch_size < MOST * one:
        later -= 1
        larger = programs.with_batch(run, 2 * run.optim.batch_size)
        other = measure(Trial(larger, later))
        yield larger, other
        if not usable(other) or rate(other) < WORTH * rate(plan):
            break
        run, plan = larger, other
    later = len(POLICIES) + int(log2(run.optim.batch_size // one))
    for policy in POLICIES:
        while True:
            later -= 1
            run = dataclasses.replace(run, remat=policy)
            other = measure(Trial(run, later))
            yield run, other
            if usable(other) or run.optim.batch_size == one:
                break
            run = programs.with_batch(run, run.optim.batch_size // 2)
        if not usable(other):
            break


def _obstacle(run: RunConfig, target: Target, length: int, images: int, found: list[Found]) -> str:
    """Why a run cannot fit; "" if it might."""
    limit = inf if target.chip is None else target.chip.memory - target.chip.reserve
    least = least_memory(run, target, length, images)
    if least > limit:
        return f"weights, optimiser state and gradients alone take {least / 2**30:.2f} GiB"
    for other, plan in found:
        if plan.fits is False and other.mesh.expert == run.mesh.expert:
            # Of meshes with this expert axis the first are those that spread most.
            return "a mesh that spreads weights further does not fit"
    return ""
