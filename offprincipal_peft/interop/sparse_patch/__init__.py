"""Exact weight sync by sparse patches: the entries that changed between two states of a model, and nothing else."""

from .applying import Applied, apply_patch
from .chain import PatchChain, verify_patch
from .content import bytes_of, hash_tensor, state_hash
from .file import PatchError, PatchFile, PatchInfo
from .live import PatchFollower, PatchRecorder
from .live_state import LiveState
from .making import make_anchor, make_patch
from .states import checkpoint_hash

__all__ = [
    "Applied",
    "LiveState",
    "PatchChain",
    "PatchError",
    "PatchFile",
    "PatchFollower",
    "PatchInfo",
    "PatchRecorder",
    "apply_patch",
    "bytes_of",
    "checkpoint_hash",
    "hash_tensor",
    "make_anchor",
    "make_patch",
    "state_hash",
    "verify_patch",
]
