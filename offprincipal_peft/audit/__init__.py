"""What did training do to these weights? Checkpoints compared as they lie on disk, whatever trained them."""

from .checkpoints import AdapterFolder, Checkpoint, ModelConfig, open_checkpoint
from .headers import CheckpointError, TensorInfo
from .pairing import Block, Matched, Pairing, Rename, Skipped, iterate, pair
from .sparsity import Sparsity, TensorSparsity, bf16_sparsity

__all__ = [
    "AdapterFolder",
    "Block",
    "Checkpoint",
    "CheckpointError",
    "Matched",
    "ModelConfig",
    "Pairing",
    "Rename",
    "Skipped",
    "Sparsity",
    "TensorInfo",
    "TensorSparsity",
    "bf16_sparsity",
    "iterate",
    "open_checkpoint",
    "pair",
]
