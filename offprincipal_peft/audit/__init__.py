"""What did training do to these weights? Checkpoints compared as they lie on disk, whatever trained them."""

from .checkpoints import AdapterFolder, Checkpoint, ModelConfig, open_checkpoint
from .headers import CheckpointError, TensorInfo
from .pairing import Block, Matched, Pairing, Rename, Skipped, iterate, pair
from .results import AuditReport, Change, Verdict, WeightAudit
from .run import PROBES, AuditError, audit
from .sparsity import Sparsity, TensorSparsity, bf16_sparsity
from .storing import AuditFormatError, from_json, read_json_report, to_json, without_curves, write_json

__all__ = [
    "PROBES",
    "AdapterFolder",
    "AuditError",
    "AuditFormatError",
    "AuditReport",
    "Block",
    "Change",
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
    "Verdict",
    "WeightAudit",
    "audit",
    "bf16_sparsity",
    "from_json",
    "iterate",
    "open_checkpoint",
    "pair",
    "read_json_report",
    "to_json",
    "without_curves",
    "write_json",
]
