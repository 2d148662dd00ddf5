"""Med-MoE in JAX: lightweight medical vision-language models with domain-specific experts.

`load` gives a model that answers questions. Names are imported when they are first used, so that
`medmoe_jax.models` needs JAX and Flax alone.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medmoe_jax.model import Model, Reply, load
    from medmoe_jax.sampling import Sampling

__version__ = "0.1.0"
__all__ = ["Model", "Reply", "Sampling", "load"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'medmoe_jax' has no attribute {name!r}")
    from medmoe_jax import model

    return getattr(model, name)
