"""Plans as text, and many of them as a table."""

from __future__ import annotations

from typing import Any

from medmoe_jax.plan.estimate import Plan

GIB = 2**30
NAMES = {
    "trainable": "trainable parameters",
    "frozen": "frozen parameters",
    "optimiser": "optimiser state",
    "cache": "cache of keys and values",
    "batch": "batch",
    "padding": "padding of arguments",
    "outputs": "outputs",
    "temporaries": "activations, gradients, temporaries",
    "code": "program",
    "peak": "peak",
}


def verdict(fits: bool | None) -> str:
    """fits | does not fit | unknown."""
    return {True: "fits", False: "does not fit", None: "unknown"}[fits]


def mesh(plan: dict[str, Any]) -> str:
    """data x fsdp x expert, or "-" for one device."""
    return "x".join(str(n) for n in plan["mesh"].values()) or "-"


def text(plan: Plan) -> str:
    """One plan for a reader."""
    axes = ", ".join(f"{k} {v}" for k, v in plan.mesh.items())
    rows = f"{plan.batch} rows x {plan.length} tokens"
    lines = [
        f"{plan.program}: {plan.phase} of {plan.model} on {plan.target}, {rows}, {plan.dtype}, "
        f"rematerialisation {plan.remat}" + (f", mesh {axes}" if axes else ", one device"),
        "",
        f"{'memory of a device':<40}{'GiB':>10}",
    ]
    for name, label in NAMES.items():
        if name in plan.memory:
            lines.append(f"  {label:<38}{plan.memory[name] / GIB:>10.3f}")
    limit = "" if plan.limit is None else f" of {plan.limit / GIB:.2f} GiB that a program may use"
    lines.append(f"  {verdict(plan.fits)}{limit}")
    if plan.obstacle:
        return "\n".join([*lines, f"  the compiler says: {plan.obstacle}"])
    assert plan.compiled_flops is not None and plan.traffic is not None
    lines += [
        "",
        f"{'work of a device':<40}{'TFLOP':>10}",
        f"  {'model':<38}{plan.model_flops / 1e12:>10.3f}",
        f"  {'compiled (products)':<38}{plan.compiled_flops / 1e12:>10.3f}",
    ]
    for name, calls in plan.kernels.items():
        lines.append(f"  not counted: {calls:,.0f} calls of {name}")
    if plan.endless:
        lines.append(f"  {plan.endless} loop(s) of unknown length, counted once")
    lines += ["", f"{'traffic of a device':<40}{'GB':>10}{'count':>10}"]
    lines.append(f"  {'main memory':<38}{plan.traffic / 1e9:>10.3f}")
    for kind, found in plan.collectives.items():
        lines.append(f"  {f'{kind}, sent':<38}{found['sent'] / 1e9:>10.3f}{found['count']:>10,.0f}")
    if plan.bound:
        lines += ["", f"{'least time by published figures':<40}{'ms':>10}"]
        for kind, seconds in plan.seconds.items():
            lines.append(f"  {kind:<38}{seconds * 1e3:>10.2f}")
        speed = plan.tokens / plan.bound
        lines.append(f"  at the largest of them: at most {speed:,.0f} tokens/s on all devices")
        if plan.mfu is not None:
            lines.append(f"  and {plan.mfu:.1%} model FLOPs utilisation")
        total = sum(plan.seconds.values())
        if plan.mfu is not None:
            worst = plan.mfu * plan.bound / total
            lines.append(f"  nothing overlapping: {plan.tokens / total:,.0f} tokens/s, {worst:.1%}")
    return "\n".join(lines)


def line(plan: Plan) -> str:
    """What came of one of many plans, in one line."""
    if plan.obstacle:
        what = verdict(False) if plan.fits is False else "does not compile"
        return f"{what}: {plan.obstacle}"
    parts = [f"{verdict(plan.fits)}, {plan.memory['peak'] / GIB:.2f} GiB"]
    if plan.bound:
        parts.append(f"at most {plan.tokens / plan.bound:,.0f} tokens/s")
        parts.append(f"{plan.tokens / sum(plan.seconds.values()):,.0f} if nothing overlaps")
    return f"{', '.join(parts)} ({plan.compile_seconds:.0f} s)"


COLUMNS = (
    "model", "phase", "target", "mesh", "rows a device", "tokens", "remat", "GiB a device", "fits",
    "TFLOP", "sent GB", "least ms", "MFU at most",
)  # fmt: skip


def table(plans: list[dict[str, Any]]) -> str:
    """Markdown table of plans as `--json` wrote them, in their order."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    for plan in plans:
        peak, sent = plan["memory"].get("peak"), 0.0
        sent = sum(found["sent"] for found in plan["collectives"].values())
        done = plan["compiled_flops"] is not None
        bound, mfu = plan["bound_seconds"], plan["mfu"]
        name = plan["phase"] if plan["program"] == "train" else f"{plan['program']}"
        cells = (
            plan["model"],
            name,
            plan["target"],
            mesh(plan),
            f"{plan['batch'] / plan['devices']:g}",
            str(plan["length"]),
            plan["remat"] if plan["program"] == "train" else "-",
            "-" if peak is None else f"{peak / GIB:.2f}",
            {True: "yes", False: "no", None: "-"}[plan["fits"]],
            f"{plan['compiled_flops'] / 1e12:.2f}" if done else "-",
            f"{sent / 1e9:.1f}" if done else "-",
            f"{bound * 1e3:.1f}" if bound else "-",
            f"{mfu:.0%}" if mfu is not None else "-",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
