"""Training checkpoints: trainable weights, optimiser state, step and the data iterator's state,
written as one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from medmoe_jax.step import State
from medmoe_jax.stored import CheckpointError


class Checkpoints:
    """Numbered checkpoints under `workdir/checkpoints`, each complete or absent, whenever the run
    is killed.
    """

    def __init__(self, workdir: Path, keep: int) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        self._folder = (workdir / "checkpoints").absolute()
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, state: State, iterator: dict[str, Any]) -> None:
        """Writes `state` and the iterator's JSON state under the state's step, unless that step is
        there already.
        """
        step = int(state.step)
        if step == self.latest():
            return
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state._asdict()), iterator=ocp.args.JsonSave(iterator)
        )
        self._manager.save(step, args=args)

    def restore(self, step: int, like: State) -> tuple[State, dict[str, Any]]:
        """Reads checkpoint `step` with the shapes, dtypes and shardings of `like`.

        Raises:
          CheckpointError: it is damaged, or of a program that keeps another state.
        """
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like._asdict())
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(target), iterator=ocp.args.JsonRestore()
        )
        try:
            found = self._manager.restore(step, args=args)
        except (OSError, ValueError, KeyError) as error:
            why = (str(error).splitlines() or [type(error).__name__])[0]
            raise CheckpointError(
                f"{self._folder / str(step)} cannot be read ({why}); remove this folder to go on "
                "from the checkpoint before it, or begin in another --workdir"
            ) from error
        return State(**found["state"]), found["iterator"]

    def close(self) -> None:
        """Waits for pending writes."""
        self._manager.close()
