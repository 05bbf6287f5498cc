"""PEFT adaptation: configs, layers and models. The mathematics lives in :mod:`offprincipal_peft.geometry`."""

from .offprincipal_lora import OffPrincipalLinear, OffPrincipalLoraConfig, OffPrincipalLoraModel

__all__ = ["OffPrincipalLinear", "OffPrincipalLoraConfig", "OffPrincipalLoraModel"]
