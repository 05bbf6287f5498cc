"""Principal-masked sparse fine-tuning as a PEFT method; importing this package registers it."""

from ..registration import register
from .config import PrincipalSparseConfig
from .layer import PrincipalSparseLinear
from .model import MaskReport, PrincipalSparseModel

register("principal_sparse", PrincipalSparseConfig, PrincipalSparseModel)

__all__ = ["MaskReport", "PrincipalSparseConfig", "PrincipalSparseLinear", "PrincipalSparseModel"]
