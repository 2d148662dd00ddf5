"""One of several processes: loads a model for training and for generation over all of them, and
prints as JSON how many bytes it has read.

`test_distributed.py` runs it: python shares_read.py MODEL HOST:PORT PROCESSES PROCESS
"""

from __future__ import annotations

import json
import sys

import jax
import numpy as np
import tensorstore
from flax.traverse_util import flatten_dict

from medmoe_jax import checkpoint, distributed, generate, layout, optim, placement, sharding
from medmoe_jax.config import ClusterConfig, MeshConfig, RunConfig


def bytes_read() -> int:
    """What TensorStore has read from files so far."""
    name = "/tensorstore/kvstore/file/bytes_read"
    return tensorstore.experimental_collect_matching_metrics(name)[0]["values"][0]["value"]


def main() -> None:
    """Prints the bytes of the model, those read for training and those read for generation."""
    folder, coordinator, processes, process = sys.argv[1:]
    distributed.join(ClusterConfig("auto", coordinator, int(processes), int(process)))
    params, meta = checkpoint.open_model(folder)
    flat = flatten_dict(params, sep="/")
    cfg = RunConfig(model=meta.model, train=("llm/moe/(experts|meta)/.*",))
    begun = bytes_read()
    mesh = sharding.make_mesh(MeshConfig(1, -1, 1))
    label = optim.labels(list(flat), cfg.train)
    placed = layout.place_weights(cfg, flat, label, mesh)
    training = bytes_read() - begun
    mesh = sharding.make_mesh(MeshConfig(1, 1, -1))
    ways = sharding.generation_ways(mesh, meta.model)
    tree = generate.for_generation(params, meta.model, ways)
    ready = placement.placed(tree, meta.model, np.float32, mesh=mesh)
    generation = bytes_read() - begun - training
    towers = flatten_dict(ready["vision"]), flatten_dict(params["vision"])
    for have, want in ((placed, flat), towers):
        for path, value in sharding.on_host(have).items():
            np.testing.assert_array_equal(value, np.asarray(want[path]).astype(value.dtype))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    print(json.dumps({"bytes": size, "training": training, "generation": generation}))


if __name__ == "__main__":
    main()
