"""What a conversion tells its user: every problem in one error, or a report of what was done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

SHOWN = 40  # problems listed one by one; a checkpoint of another model has thousands


class ConversionError(ValueError):
    """A conversion that cannot be done.

    The message has one line for each problem found, with file, key, shapes and remedy.
    """


def raise_all(what: str, problems: Sequence[str]) -> None:
    """Raises one ConversionError for all `problems`; returns where there are none."""
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        lines = "".join(f"\n  - {problem}" for problem in problems[:SHOWN])
        if len(problems) > SHOWN:
            lines += f"\n  - ... and {len(problems) - SHOWN} more"
        raise ConversionError(f"{what}: {count}{lines}")


@dataclass
class Report:
    """What a conversion did.

    Attributes:
      title: the command in words.
      stage: the stage that was recognised, with a word on the model.
      parameters: component -> number of parameters.
      converted: tensors that were carried over.
      ignored: reason -> keys that were not carried over.
      notes: everything else that the user should know, in order.
    """

    title: str
    stage: str = ""
    parameters: dict[str, int] = field(default_factory=dict)
    converted: int = 0
    ignored: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def ignore(self, key: str, reason: str) -> None:
        """Records that `key` is not carried over."""
        self.ignored.setdefault(reason, []).append(key)

    def text(self) -> str:
        """The report as lines to print."""
        lines = [self.title, f"  stage       {self.stage}"]
        total = sum(self.parameters.values())
        parts = ", ".join(f"{name} {count:,}" for name, count in self.parameters.items())
        lines.append(f"  parameters  {total:,} ({parts})")
        lines.append(f"  tensors     {self.converted} converted")
        for reason, keys in self.ignored.items():
            example = keys[0] if len(keys) == 1 else f"{keys[0]}, ..."
            lines.append(f"  ignored     {len(keys)}: {reason} ({example})")
        lines += [f"  note        {note}" for note in self.notes]
        return "\n".join(lines)
