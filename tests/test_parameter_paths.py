"""All parameter paths and shapes of the full models, against a golden list.

Regexes, checkpoints and the conversion depend on the names. Where a change is meant, write the list
anew and look at the difference: `python tests/test_parameter_paths.py > tests/parameter_paths.txt`
"""

from __future__ import annotations

from pathlib import Path

from flax.traverse_util import flatten_dict

from medmoe_jax import presets
from medmoe_jax.config import ModelConfig, MoeConfig
from medmoe_jax.convert import table
from medmoe_jax.models import medmoe

GOLDEN = Path(__file__).with_name("parameter_paths.txt")


def models() -> dict[str, ModelConfig]:
    """The models of the list by name."""
    stages = {"stage2": None, "stage3": MoeConfig(experts=4, top_k=1, placement="sparse")}
    return {
        f"{size} {stage}": presets.model(size, mixture)
        for size in ("phi2", "stablelm")
        for stage, mixture in stages.items()
    }


def listing() -> str:
    """One line a parameter: model, path, shape; sorted by path within a model."""
    lines = []
    for name, cfg in models().items():
        flat = flatten_dict(medmoe.shapes(cfg), sep="/")
        lines += [f"{name} {path} {'x'.join(map(str, flat[path].shape))}" for path in sorted(flat)]
    return "\n".join(lines) + "\n"


def test_names_and_shapes_are_stable() -> None:
    want, got = GOLDEN.read_text().splitlines(), listing().splitlines()
    changes = [f"- {line}" for line in want if line not in got]
    changes += [f"+ {line}" for line in got if line not in want]
    assert not changes, "\n".join([*changes, "If this is meant: " + (__doc__ or "")])
    assert want == got


def test_conversion_fills_every_parameter() -> None:
    """The table makes exactly these leaves."""
    for cfg in models().values():
        flat = flatten_dict(medmoe.shapes(cfg), sep="/")
        shapes = table.leaf_shapes(table.table(cfg))
        assert shapes == {path: leaf.shape for path, leaf in flat.items()}


if __name__ == "__main__":
    print(listing(), end="")
