"""Phase 2, instruction tuning: the language model learns to follow medical instructions about
images.

Trains everything but the vision tower, on conversations (60K in the paper,
`llava_med_instruct_60k_inline_mention.json`), next-token loss on the answers. Paper section 2.2,
equation 2, Tables 12 and 13. The router is trained on the result, by `configs/router.py`.

    python -m medmoe_jax.train --config configs/stage2.py:phi2 --workdir runs/stage2 \\
        --config.init=runs/stage1/model --config.data.files="('instruct.json',)" \\
        --config.data.image_folder=images

Sizes: phi2, stablelm, tiny, tiny_stablelm. The paper used 8 GPUs with 24 GB, 2 samples each.
"""

from medmoe_jax import presets
from medmoe_jax.config import OptimConfig, RunConfig


def get_config(size: str = "phi2") -> RunConfig:
    """The run for a model size."""
    config = RunConfig(
        phase="stage2",
        model=presets.model(size),
        train=("projector/.*", "llm/.*"),
        optim=OptimConfig(lr=2e-5, epochs=3.0, batch_size=16),
    )
    return (
        presets.shrink(config, lr=2e-3, epochs=4.0, batch_size=16)
        if presets.is_tiny(size)
        else config
    )
