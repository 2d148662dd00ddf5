"""Evaluation during training: the questions of a named split are answered with the weights of the
moment, as `predict` and `evaluate` do it for a finished model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh

from medmoe_jax import generate, lora, placement, predict, sharding
from medmoe_jax.config import ModelConfig, RunConfig
from medmoe_jax.data import images, questions, sources, tokens
from medmoe_jax.evaluation import rows
from medmoe_jax.evaluation.report import report
from medmoe_jax.model import PARTS, Model
from medmoe_jax.models.layers import Params
from medmoe_jax.sampling import Sampling


class Validation:
    """Answers and scores the rows of `config.evaluation`."""

    def __init__(self, cfg: RunConfig, model: ModelConfig, mesh: Mesh) -> None:
        """Reads the questions; nothing is loaded onto the device.

        Raises:
          DataError: the file cannot be read, or has rows without a question and its answer.
        """
        self.cfg, self.model, self.mesh, wanted = cfg, model, mesh, cfg.evaluation
        asked = questions.read_questions(wanted.file)
        self.asked = asked[: wanted.rows] if wanted.rows else asked
        self.rows = rows.read(wanted.file)[: len(self.asked)]
        # Now, not behind the first steps. Ids may occur twice: answers come in the order of rows.
        rows.pair(self.rows, [{"text": ""}] * len(self.rows), "order", (wanted.file, "no answers"))
        given = wanted.image_folder or cfg.data.image_folder
        self.folder = sources.image_folder_of(wanted.file, given)
        init = Path(cfg.init)
        self.tokenizer = tokens.load_tokenizer(init / "tokenizer", model.llm.family)
        self.spec = images.read_image_spec(
            init / "preprocessor_config.json", cfg.data.image_aspect, cfg.data.view
        )

    @property
    def prefix(self) -> str:
        """What the names of its figures begin with."""
        return f"{self.cfg.evaluation.split}/"

    def due(self, step: int, total: int) -> bool:
        """Whether to evaluate behind this step: every N-th and the last one."""
        return step % self.cfg.evaluation.every == 0 or step == total

    def __call__(self, flat: dict[str, Any]) -> dict[str, float]:
        """The figures of `evaluate`, percent, under "SPLIT/figure". Of several processes all must
        call this; they answer together, and all get the figures.

        Args:
          flat: all parameters, path -> array, adapters among them.
        """
        wanted, tree = self.cfg.evaluation, unflatten_dict(flat, sep="/")
        ways = sharding.generation_ways(self.mesh, self.model)

        def unstacked(parts: Params) -> Params:
            whole = generate.for_generation(parts, self.model, ways)
            return lora.merge(whole, self.cfg.lora.scale) if self.cfg.lora.rank else whole

        parts = {part: tree[part] for part in PARTS}
        places = placement.places(jax.eval_shape(unstacked, parts), self.model, self.mesh)
        ready = jax.jit(unstacked, out_shardings=places)(parts)
        dtype = jnp.dtype(self.cfg.compute_dtype)
        template = self.cfg.data.template or self.model.llm.family
        model = Model(ready, self.model, self.tokenizer, self.spec, template, dtype, self.mesh)
        stream = predict.replies(
            model,
            self.asked,
            self.folder,
            Sampling(max_new_tokens=wanted.max_new_tokens),
            batch_size=wanted.batch_size,
        )
        found = {
            question.row: predict.row(question, reply, "", "shown") for question, reply in stream
        }
        answers = [found[question.row] for question in self.asked]
        summary = report(self.rows, answers, pairing="order", samples=0)["summary"]
        return {
            f"{self.prefix}{name}": value for name, value in summary.items() if value is not None
        }
