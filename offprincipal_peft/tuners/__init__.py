"""PEFT adaptation: configs, layers and models. The mathematics lives in :mod:`offprincipal_peft.geometry`."""

from .offprincipal_lora import OffPrincipalLoraConfig, OffPrincipalLoraModel

__all__ = ["OffPrincipalLoraConfig", "OffPrincipalLoraModel"]
