"""Which mesh, batch and rematerialisation: a few programs, compiled one after the other.

All of them would be hundreds of compilations of a minute each. So: first every mesh that the
weights and the optimiser state alone do not rule out, with one row a device and full
rematerialisation; the one with the highest bound on tokens/s wins. Then its batch is doubled while
it fits and the bound rises by more than 2 %, and at the largest batch that is worth it,
rematerialisation of less is tried.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from medmoe_jax import sharding
from medmoe_jax.config import ConfigError, MeshConfig, RunConfig
from medmoe_jax.plan import programs
from medmoe_jax.plan.estimate import Plan
from medmoe_jax.plan.targets import Target

WORTH = 1.02  # what doubling a batch must gain
MOST = 64  # rows a device
POLICIES = ("attention", "dots", "none")  # in the order of what they keep, after full


def meshes(devices: int, experts: int) -> Iterator[MeshConfig]:
    """All meshes of so many devices whose expert axis divides the experts (0: there are none)."""
    for expert in (n for n in range(1, devices + 1) if devices % n == 0):
        if expert > 1 and (not experts or experts % expert):
            continue
        rest = devices // expert
        for fsdp in (n for n in range(rest, 0, -1) if rest % n == 0):
            yield MeshConfig(rest // fsdp, fsdp, expert)


def candidates(cfg: RunConfig, target: Target, length: int, images: int) -> list[RunConfig]:
    """Runs with one row a device, for each mesh whose arguments fit, most spread first."""
    moe, found = cfg.model.moe, []
    experts = moe.experts if moe and cfg.objective != "router" else 0
    limit = float("inf") if target.chip is None else target.chip.memory - target.chip.reserve
    for mesh in meshes(len(target.devices), experts):
        run = dataclasses.replace(cfg, mesh=mesh, remat="full")
        run = programs.with_batch(run, len(target.devices) * cfg.optim.accumulate)
        places = sharding.make_mesh(mesh, target.devices)
        if sum(programs.abstract(run, places, length, images).groups.values()) < limit:
            found.append(run)
    return found


def rate(plan: Plan) -> float:
    """Bound on tokens/s; without published figures, the fewest bytes sent and moved."""
    if plan.bound:
        return plan.tokens / plan.bound
    moved = sum(c["sent"] for c in plan.collectives.values()) + (plan.traffic or 0.0)
    return plan.tokens / max(moved, 1.0)


def search(
    cfg: RunConfig,
    target: Target,
    length: int,
    images: int,
    compiled: Callable[[RunConfig], Plan],
) -> tuple[RunConfig, Plan]:
    """The best run that was found, and its plan. Only mesh, batch size and remat are changed.

    Args:
      cfg: the run to start from.
      target: the devices.
      length: tokens of a row.
      images: images of a row.
      compiled: makes the plan of a run, and tells the user about it.

    Raises:
      ConfigError: nothing fits.
    """
    tried = [(run, compiled(run)) for run in candidates(cfg, target, length, images)]
    good = [(run, plan) for run, plan in tried if plan.fits is not False]
    if not good:
        raise ConfigError(
            f"nothing fits on {target.name}, not even one row of {length} tokens a device; use "
            "more devices, shorter rows (--length) or a chip with more memory"
        )
    run, plan = max(good, key=lambda pair: rate(pair[1]))
    most = MOST * len(target.devices)
    while run.optim.batch_size < most:
        larger = programs.with_batch(run, 2 * run.optim.batch_size)
        other = compiled(larger)
        gain = rate(other) / rate(plan)
        if other.fits is False or gain < 1.0:
            break
        run, plan = larger, other
        if gain < WORTH:
            break
    for policy in POLICIES:
        lighter = dataclasses.replace(run, remat=policy)
        other = compiled(lighter)
        if other.fits is False:
            break
        if rate(other) > rate(plan):
            run, plan = lighter, other
    return run, plan
