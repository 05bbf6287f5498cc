"""Geometry-aware adapters for reinforcement learning with verifiable rewards.

Importing this package registers its methods with PEFT, so that ``get_peft_model``, ``PeftModel.from_pretrained`` and
``AutoPeftModel`` know them.
"""

from typing import Any

from . import audit, geometry
from .kernels import MaskedAdamW
from .tuners import OffPrincipalLoraConfig, PrincipalSparseConfig

__version__ = "0.1.0"
__all__ = [
    "GeometryCallback",
    "MaskedAdamW",
    "OffPrincipalLoraConfig",
    "PatchCallback",
    "PrincipalSparseConfig",
    "__version__",
    "audit",
    "geometry",
]


def __getattr__(name: str) -> Any:
    """The callbacks on first use: they import transformers' Trainer, which takes a second."""
    if name == "GeometryCallback":
        from .rlvr.callbacks import GeometryCallback

        return GeometryCallback
    if name == "PatchCallback":
        from .rlvr.patch_callback import PatchCallback

        return PatchCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
