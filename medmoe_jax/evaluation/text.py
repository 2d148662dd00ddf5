"""The report in Markdown that also reads well on a screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from medmoe_jax.evaluation.figures import SUMMARY

Json = Mapping[str, Any]


def markdown(report: Json) -> str:
    """The report as text.

    Args:
      report: made by `report.report`.
    """
    parts = [_head(report), _summary(report)]
    parts += [_variant(name, report[name]) for name in ("official", "strict") if name in report]
    parts += [_groups(name, groups) for name, groups in report["tables"].items()]
    parts += [_task(name, task) for name, task in report["classification"].items()]
    parts += [_control(name, found) for name, found in report["controls"].items()]
    if report["confidence"]:
        parts.append(_confidence(report["confidence"]))
    return "\n\n".join(part for part in parts if part) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns, the first one to the left, the others to the right."""
    rows = [head, *([_one_line(cell) for cell in row] for row in rows)]
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(head))]
    lines = [
        "| "
        + " | ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        + " |"
        for row in rows
    ]
    marks = ["-" * width if not i else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join([lines[0], "| " + " | ".join(marks) + " |", *lines[1:]])


def _one_line(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")


def _head(report: Json) -> str:
    shown = (
        "" if report["images"] in ([], ["shown"]) else f" Images: {', '.join(report['images'])}."
    )
    lines = [
        "# Evaluation",
        "",
        f"{report['n']} questions about {report['n_images']} images, paired by "
        f"{report['pairing']}.{shown}",
    ]
    boot = report["bootstrap"]
    if boot["samples"]:
        lines.append(
            f"Intervals: 95 %, bootstrap of {boot['drawn']} ({boot['samples']} draws, seed "
            f"{boot['seed']})."
        )
    if report["errors"]:
        first = list(report["errors"])[:5]
        lines.append(
            f"**{len(report['errors'])} questions have no answer because of an error** and count "
            f"as wrong: {', '.join(first)}" + " ..." * (len(report["errors"]) > len(first))
        )
    return "\n".join(lines)


def _summary(report: Json) -> str:
    rows = [
        [
            name,
            _percent(value),
            _range(report["summary_ci95"][name]),
            str(report["summary_n"][name]),
        ]
        for name, value in report["summary"].items()
    ]
    return "## Summary\n\n" + table(["figure", "%", "95 %", "n"], rows)


def _variant(name: str, found: Json) -> str:
    rows = [
        [figure, _percent(value, 2), _range(found["ci95_percent"][figure]), str(found["n"][figure])]
        for figure, value in found["aggregate_percent"].items()
    ]
    ignored = found["n_ignored"]
    note = f"\n\n{ignored} rows of other answer types are left out." if ignored else ""
    return f"## {name.capitalize()} figures\n\n" + table(["figure", "%", "95 %", "n"], rows) + note


def _groups(name: str, groups: Json) -> str:
    figures = [f for f in SUMMARY if any(f in group["figures"] for group in groups.values())]
    rows = []
    for group, found in groups.items():
        cells = [found["figures"].get(figure) for figure in figures]
        shown = [
            "-" if cell is None else _with_range(cell["percent"], cell["ci95"]) for cell in cells
        ]
        rows.append([group, str(found["n"]), *shown])
    title = name.replace("_", " ")
    return f"## By {title}\n\n" + table([title, "n", *figures], rows)


def _task(name: str, task: Json) -> str:
    rows = []
    for way in ("likelihood", "text"):
        found = task[way]
        if found:
            rows.append(
                [
                    "options scored by likelihood" if way == "likelihood" else "free text",
                    str(found["n"]),
                    _with_range(found["accuracy_percent"], found["accuracy_ci95"]),
                    _number(found.get("auc"), found.get("auc_ci95")),
                    _percent(found.get("unparsable_percent")),
                ]
            )
    head = ["way", "n", "accuracy %", "AUC", "unparsable %"]
    absent = (task["likelihood"] or {}).get("auc_absent")
    note = f"\n\nNo AUC: {absent}." if absent else ""
    best = task["likelihood"] or task["text"]
    classes = [
        [label, str(found["n"]), _percent(found["accuracy_percent"])]
        for label, found in best["per_class"].items()
    ]
    return (
        f"## Classification: {name}\n\n{table(head, rows)}{note}\n\n"
        f"{table(['class', 'n', 'accuracy %'], classes)}"
    )


def _control(name: str, found: Json) -> str:
    rows = []
    lines = []
    for figure, cell in found["figures"].items():
        shown, without = _percent(cell["shown_percent"]), _percent(cell["control_percent"])
        points = f"{cell['difference']:+.1f}"
        rows.append(
            [figure, shown, without, points, _range(cell["ci95"], sign=True), str(cell["n"])]
        )
        if "accuracy" in figure:
            lines.append(
                f"* {figure}: {shown} % with the image, {without} % without. {_owes(cell)}"
            )
    head = ["figure", "image %", f"{name} %", "difference", "95 %", "n"]
    same = f"{found['same_answer_percent']:.1f} % of the answers stay the same."
    return "\n\n".join(
        part
        for part in (
            f"## What the answers owe to the image: {name} images",
            table(head, rows),
            "\n".join(lines),
            same,
        )
        if part
    )


def _owes(cell: Json) -> str:
    if cell["ci95"] is None:
        return "Too few images to tell what the image adds."
    low, high = cell["ci95"]
    if low > 0:
        return f"The image is worth {cell['difference']:.1f} points ({low:.1f} to {high:.1f})."
    if high < 0:
        return f"The image costs {-cell['difference']:.1f} points ({-high:.1f} to {-low:.1f})."
    return f"No effect of the image can be told from chance ({low:+.1f} to {high:+.1f} points)."


def _confidence(report: Json) -> str:
    kinds = [kind for kind in ("all", "closed", "open") if kind in report]
    rows = []
    for kind in kinds:
        found = report[kind]
        ends = found["ci95"]
        rows.append(
            [
                kind,
                str(found["n"]),
                _percent(found["accuracy_percent"]),
                _percent(found["mean_confidence_percent"]),
                *(_number(found[name], ends[name]) for name in ("ece", "brier", "aurc")),
                _number(found["aurc_best"]),
            ]
        )
    head = ["questions", "n", "right %", "confidence %", "ECE", "Brier", "AURC", "best AURC"]
    parts = [
        "## Confidence",
        "Right: closed questions by the strict rule, open ones by strict exact match.",
        table(head, rows),
    ]
    if report["n_without"]:
        parts.append(f"{report['n_without']} rows without a confidence are left out.")
    parts += [_temperature(report, kinds), _abstain(report, kinds)]
    return "\n\n".join(part for part in parts if part)


def _temperature(report: Json, kinds: Sequence[str]) -> str:
    fitted = {kind: report[kind]["temperature"] for kind in kinds if report[kind]["temperature"]}
    if not fitted:
        return ""
    rows = [
        [
            kind,
            f"{found['temperature']:.2f}" + " (at the bound)" * found["at_bound"],
            str(found["n_fit"]),
            str(found["n"]),
            *(
                f"{found['before'][name]:.3f} -> {found['after'][name]:.3f}"
                for name in ("ece", "brier", "nll")
            ),
        ]
        for kind, found in fitted.items()
    ]
    on = next(iter(fitted.values()))["fitted_on"]
    lines = [
        "### Temperature",
        f"The log-odds of the confidence divided by T; T fitted on {on}.",
        table(["questions", "T", "n fitted", "n", "ECE", "Brier", "NLL"], rows),
    ]
    if report["shared_images"]:
        lines.append(
            f"**{report['shared_images']} images are in both sets**: the gain may not carry over."
        )
    return "\n\n".join(lines)


def _abstain(report: Json, kinds: Sequence[str]) -> str:
    chosen = {kind: report[kind]["abstain"] for kind in kinds if "abstain" in report[kind]}
    if not chosen:
        return ""
    rows = [
        [
            kind,
            str(found["n"]),
            str(found["n_answered"]),
            _percent(found["coverage_percent"]),
            _with_range(found["accuracy_percent"], found["accuracy_ci95"]),
            _percent(found["withheld_accuracy_percent"]),
        ]
        for kind, found in chosen.items()
    ]
    below = next(iter(chosen.values()))["below"]
    head = ["questions", "n", "answered", "coverage %", "right %", "withheld: right %"]
    return f"### Answers withheld below a confidence of {below:g}\n\n{table(head, rows)}"


def _percent(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _range(ends: Sequence[float] | None, sign: bool = False) -> str:
    if ends is None:
        return ""
    return f"({ends[0]:+.1f} to {ends[1]:+.1f})" if sign else f"({ends[0]:.1f} to {ends[1]:.1f})"


def _with_range(value: float | None, ends: Sequence[float] | None) -> str:
    return f"{_percent(value)} {_range(ends)}".strip()


def _number(value: float | None, ends: Sequence[float] | None = None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" + (f" ({ends[0]:.3f} to {ends[1]:.3f})" if ends else "")
