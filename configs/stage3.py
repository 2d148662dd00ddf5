"""Phase 3, domain-specific MoE tuning: every second FFN becomes 4 experts, chosen by the frozen
router, plus a meta expert.

Experts and meta expert start as copies of the stage-2 FFN and are all that trains. Mixed closed and
open questions and classification (44K rows in the paper: VQA-RAD, SLAKE, PathVQA, PneumoniaMNIST,
OrganCMNIST), next-token loss on the answers. Paper section 2.3, equations 4 and 5, Tables 12 and
13.

    python -m medmoe_jax.train --config configs/stage3.py:phi2 --workdir runs/stage3 \\
        --config.init=runs/router/model --config.data.files="('train_all.json',)" \\
        --config.data.image_folder=images

The router comes from `init`, or from `--config.router=FILE.pth` (the official ones work). Top-1 +
meta expert is what the official scripts run and what gives the paper's 3.6B / 2.0B activated
parameters; `--config.model.moe.top_k=2` is what the paper's text says.
`--config.train="('llm/moe/(experts|meta)/.*', 'llm/mlp/.*', 'projector/.*')"` trains what the
official code trains (the plain FFNs and the projector as well); with `use_residual` add
`llm/moe/coefficient/.*`.

Sizes: phi2, stablelm, tiny, tiny_stablelm. The paper used 8 GPUs with 24 GB, 2 samples each,
optimiser on the host.
"""

from medmoe_jax import presets
from medmoe_jax.config import MoeConfig, OptimConfig, RunConfig


def get_config(size: str = "phi2") -> RunConfig:
    """The run for a model size."""
    config = RunConfig(
        phase="stage3",
        model=presets.model(size, MoeConfig(experts=4, top_k=1, placement="sparse")),
        train=("llm/moe/(experts|meta)/.*",),
        optim=OptimConfig(lr=2e-5, epochs=9.0, batch_size=16),
    )
    return (
        presets.shrink(config, lr=1e-3, epochs=1.0, batch_size=16)
        if presets.is_tiny(size)
        else config
    )
