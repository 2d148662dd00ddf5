"""Phase 2, second part: the router learns to tell the image modality from the hidden states of the
stage-2 model.

Trains one linear layer (`model.moe.router_layers` = 1, 2 or 3) that reads the input of the FFN of
every layer that will hold experts; cross-entropy on the modality label, 200 labelled rows for each
modality, everything else frozen. Paper section 2.2, equation 3. Which hidden states the authors
read is not published; these are the ones the router sees in phase 3. `router_level=sample` labels
the mean score of a sample instead of every token.

    python -m medmoe_jax.train --config configs/router.py:phi2 --workdir runs/router \\
        --config.init=runs/stage2/model --config.data.files="('instruct.json',)" \\
        --config.data.image_folder=images

Writes the accuracy and the confusion matrix on `data.eval_files`, or on the rows that were not
drawn. The folder `runs/router/model` holds the stage-2 model and the router; `convert to-torch`
writes the router as a `.pth` file.
"""

from medmoe_jax import presets
from medmoe_jax.config import DataConfig, MoeConfig, OptimConfig, RunConfig


def get_config(size: str = "phi2") -> RunConfig:
    """The run for a model size."""
    config = RunConfig(
        phase="router",
        model=presets.model(size, MoeConfig()),
        objective="router",
        train=("router/.*",),
        data=DataConfig(labels_per_modality=200),
        optim=OptimConfig(lr=1e-3, epochs=3.0, batch_size=16),
    )
    return (
        presets.shrink(config, lr=1e-2, epochs=3.0, batch_size=32)
        if presets.is_tiny(size)
        else config
    )
