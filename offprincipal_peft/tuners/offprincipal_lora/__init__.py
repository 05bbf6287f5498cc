"""Off-principal LoRA as a PEFT method; importing this package registers it."""

from ..registration import register
from .config import OffPrincipalLoraConfig
from .layer import OffPrincipalLinear
from .model import OffPrincipalLoraModel

register("offprincipal_lora", OffPrincipalLoraConfig, OffPrincipalLoraModel, hotswap_like_lora=True)

__all__ = ["OffPrincipalLinear", "OffPrincipalLoraConfig", "OffPrincipalLoraModel"]
