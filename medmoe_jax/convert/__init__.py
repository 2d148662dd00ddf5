"""Conversion between PyTorch checkpoints and model folders, both ways and exact to the bit.

Command line: `python -m medmoe_jax.convert {to-jax,to-torch,to-peft,...}`. Read on in `table.py`.
"""

from medmoe_jax.convert.report import ConversionError, Report
from medmoe_jax.convert.to_jax import to_jax
from medmoe_jax.convert.to_torch import to_torch

__all__ = ["ConversionError", "Report", "to_jax", "to_torch"]
