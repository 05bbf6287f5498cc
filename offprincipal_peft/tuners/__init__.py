"""PEFT adaptation: configs, layers and models. The mathematics lives in :mod:`offprincipal_peft.geometry`."""

from .offprincipal_lora import OffPrincipalLinear, OffPrincipalLoraConfig, OffPrincipalLoraModel
from .principal_sparse import MaskReport, PrincipalSparseConfig, PrincipalSparseLinear, PrincipalSparseModel

__all__ = [
    "MaskReport",
    "OffPrincipalLinear",
    "OffPrincipalLoraConfig",
    "OffPrincipalLoraModel",
    "PrincipalSparseConfig",
    "PrincipalSparseLinear",
    "PrincipalSparseModel",
]
