"""Med-MoE in JAX: lightweight medical vision-language models with domain-specific experts."""

__version__ = "0.1.0"
