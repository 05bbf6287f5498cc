"""Geometry-aware adapters for reinforcement learning with verifiable rewards.

Importing this package registers its methods with PEFT, so that ``get_peft_model``, ``PeftModel.from_pretrained`` and
``AutoPeftModel`` know them.
"""

from . import geometry
from .kernels import MaskedAdamW
from .tuners import OffPrincipalLoraConfig, PrincipalSparseConfig

__version__ = "0.1.0"
__all__ = ["MaskedAdamW", "OffPrincipalLoraConfig", "PrincipalSparseConfig", "__version__", "geometry"]
