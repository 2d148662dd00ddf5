"""Phase 1, alignment: the projector learns to turn image features into words of the language model.

Trains the projector only, on image + caption pairs (500K in the paper,
`llava_med_alignment_500k.json`), next-token loss on the caption, template `plain`. Paper section
2.1, equation 1, Tables 12 and 13.

    python -m medmoe_jax.train --config configs/stage1.py:phi2 --workdir runs/stage1 \\
        --config.init=models/start --config.data.files="('alignment.json',)" \\
        --config.data.image_folder=images

Sizes: phi2, stablelm, tiny, tiny_stablelm. The paper used 8 GPUs with 24 GB, 2 samples each.
"""

from medmoe_jax import presets
from medmoe_jax.config import DataConfig, OptimConfig, RunConfig


def get_config(size: str = "phi2") -> RunConfig:
    """The run for a model size."""
    config = RunConfig(
        phase="stage1",
        model=presets.model(size),
        train=("projector/.*",),
        data=DataConfig(template="plain", image_aspect="square"),
        optim=OptimConfig(lr=1e-3, epochs=1.0, batch_size=16),
    )
    return (
        presets.shrink(config, lr=3e-3, epochs=2.0, batch_size=32)
        if presets.is_tiny(size)
        else config
    )
