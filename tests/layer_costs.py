"""A program that compiles single MoE layers and two dense networks of their size ahead of time and
prints, as one JSON list, what they compute and move; `test_costs.py` runs it.

    python tests/layer_costs.py v5e:1x1
"""

from __future__ import annotations

import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from medmoe_jax import presets, sharding
from medmoe_jax.config import LlmConfig, MeshConfig, MoeConfig
from medmoe_jax.models import experts, layers, moe
from medmoe_jax.plan import hlo, targets

MODELS = {"stablelm": presets.STABLELM, "phi2": presets.PHI2}
ROWS, LENGTH = (1, 8), 2048
MOE = MoeConfig(experts=4, top_k=1)


def costs(form: Any, target: targets.Target, *arguments: Any) -> dict[str, Any]:
    """FLOPs, bytes of main memory, and the least seconds on the chip, of a bfloat16 program."""
    place = SingleDeviceSharding(target.devices[0])
    given = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), arguments
    )
    # As in `plan`, and because JAX 0.11 asks the mesh for which GPU it makes a kernel.
    with jax.set_mesh(sharding.make_mesh(MeshConfig(1, 1, 1), target.devices[:1])):
        lowered = jax.jit(form).trace(*given).lower(lowering_platforms=(target.platform,))
    found, chip = hlo.work(lowered.compile().as_text()), target.chip
    assert chip is not None and not found.endless
    seconds = max(found.flops / chip.peak["bfloat16"], found.traffic / chip.bandwidth)
    return {
        "flops": found.flops,
        "traffic": found.traffic,
        "seconds": seconds,
        "unknown": found.kernels,
    }


def shapes(leaves: Any) -> Any:
    """bfloat16 arrays for `Leaf`s, as shapes."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16),
        leaves,
        is_leaf=lambda leaf: isinstance(leaf, layers.Leaf),
    )


def layer(p: Any, x: Any) -> Any:
    """Router, top-1 experts and meta expert."""
    return moe.moe_layer(p, MOE, x, jnp.ones(x.shape[:2], bool))[0]


def dense(p: Any, x: Any) -> Any:
    """Two dense networks."""
    return layers.mlp(p[0], x) + layers.mlp(p[1], x)


def backward(form: Any) -> Any:
    """Value and gradients in all parameters and the input."""
    return jax.value_and_grad(lambda p, x: (form(p, x) * x).sum().astype(jnp.float32), (0, 1))


def of_layers(llm: LlmConfig, rows: int, target: targets.Target) -> list[dict[str, Any]]:
    """The layer beside two dense networks, forward, and forward and backward."""
    one = layers.mlp_leaves(llm.family, llm.width, llm.ffn)
    sparse, pair = shapes(moe.leaves(llm, MOE, ())), shapes((one, one))
    x = jax.ShapeDtypeStruct((rows, LENGTH, llm.width), jnp.bfloat16)
    return [
        {
            "way": way,
            "layer": costs(around(layer), target, sparse, x),
            "dense": costs(around(dense), target, pair, x),
        }
        for way, around in (("forward", lambda form: form), ("backward", backward))
    ]


def of_experts(llm: LlmConfig, rows: int, target: targets.Target) -> list[dict[str, Any]]:
    """The experts alone, as one array and, as in generation, one by one."""
    stack = shapes(layers.mlp_leaves(llm.family, llm.width, llm.ffn, (MOE.experts,)))
    each = jax.eval_shape(lambda p: experts.separate(p, MOE.experts, 1), stack)
    x = jax.ShapeDtypeStruct((rows, LENGTH, llm.width), jnp.bfloat16)
    choice = jax.ShapeDtypeStruct((rows, LENGTH, MOE.top_k), jnp.int32)
    weight = jax.ShapeDtypeStruct(choice.shape, jnp.float32)

    def run(p: Any, x: Any, choice: Any, weight: Any) -> Any:
        return experts.mixture(p, x, choice, weight, MOE.experts)

    found = {
        name: costs(run, target, p, x, choice, weight)
        for name, p in (("stacked", stack), ("separate", each))
    }
    weights = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(stack))
    return [{"way": "generation", "weights": weights, **found}]


def main() -> None:
    """Prints the costs."""
    targets.prepare(sys.argv[1])
    target = targets.load(sys.argv[1])
    table = [
        {"model": name, "rows": rows, **found}
        for name, llm in MODELS.items()
        for rows in ROWS
        for found in [*of_layers(llm, rows, target), *of_experts(llm, rows, target)]
    ]
    print(json.dumps(table))


if __name__ == "__main__":
    main()
