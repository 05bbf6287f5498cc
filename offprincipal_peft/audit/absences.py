"""Why a tensor cannot be compared with its namesakes: quantised, of another shape, tied away, or just missing."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .checkpoints import Checkpoint
from .headers import TensorInfo

# Names' ends of output heads and of the embeddings that they can share memory with.
HEADS = ("lm_head.weight", "embed_out.weight", "output.weight", "output_projection.weight")
EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "embed_in.weight",
    "tok_embeddings.weight",
)
# What quantisation stores beside a weight: bitsandbytes 4 and 8 bit, GPTQ and AWQ, compressed-tensors and fp8.
_COMPANIONS = (
    ".absmax",
    ".quant_map",
    ".nested_absmax",
    ".nested_quant_map",
    ".SCB",
    ".scales",
    ".weight_scale",
    ".weight_scale_inv",
    ".weight_scale_2",
    ".input_scale",
)
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_PACKED = ("I8", "U8", "I32", "F8_E4M3", "F8_E5M2")  # what quantised weights are stored as
_COMPARED = 4 << 20  # bytes at a time where two tensors' contents are compared


def fault(name: str, infos: list[TensorInfo | None], sides: tuple[Checkpoint, ...], labels: list[str]) -> str | None:
    """Why the tensor that the base calls ``name`` cannot be compared; None where it can."""
    reasons = []
    for info, side, label in zip(infos, sides, labels, strict=True):
        if info is not None and (reason := stored_fault(info, side, label)):
            reasons.append(reason)
    base = infos[0]
    assert base is not None
    for info, side, label in zip(infos[1:], sides[1:], labels[1:], strict=True):
        if info is None:
            reasons.append(absence(sides[0], base, "base", side, label))
        elif not reasons and info.shape != base.shape:
            reasons.append(f"shape {base.shape} in base and {info.shape} in {label}")
    return "; ".join(reasons) or None


def stored_fault(info: TensorInfo, side: Checkpoint, label: str) -> str | None:
    """Why the values as ``side`` stores them are no weights that can be compared."""
    if info.dtype in _FLOATS:
        owner = _owner(info.name, side.tensors)
        return f"quantised: belongs to {owner} in {label}" if owner else None
    by = side.config.quantized_by if info.stored in _PACKED else None
    if by or info.stored.startswith(("F8", "F6", "F4")) or _has_companion(info.name, side.tensors):
        return f"quantised{f' by {by}' if by else ''}: stored as {info.stored} in {label}"
    return f"holds {info.stored} values in {label}, which are no floating-point weights"


def _owner(name: str, tensors: Mapping[str, TensorInfo]) -> str | None:
    """The quantised tensor that ``name`` holds scales or a code book of."""
    for ending in _COMPANIONS:
        if name.endswith(ending):
            stem = name.removesuffix(ending)
            for owner in (stem, f"{stem}.weight", f"{stem}.qweight", f"{stem}.weight_packed"):
                if owner in tensors and tensors[owner].dtype not in _FLOATS:
                    return owner
    return None


def _has_companion(name: str, tensors: Mapping[str, TensorInfo]) -> bool:
    module = name.rpartition(".")[0]
    return any(stem + ending in tensors for ending in _COMPANIONS for stem in (name, module))


def absence(holder: Checkpoint, info: TensorInfo, label: str, other: Checkpoint, other_label: str) -> str:
    """Why ``other`` lacks a tensor that ``holder`` has: tied away, quantised under another name, or just missing."""
    absent = f"missing in {other_label}"
    for ends, partners in ((HEADS, EMBEDDINGS), (EMBEDDINGS, HEADS)):
        if _ends(info.name, ends):
            for twin in holder.tensors.values():
                if _ends(twin.name, partners) and (twin.shape, twin.stored) == (info.shape, info.stored):
                    if _same_content(holder, info.name, twin.name):
                        return f"tied: the same content as {twin.name} in {label}, and {absent}"
                    tie = "whose config.json ties" if other.config.tie_word_embeddings else "which may tie"
                    return f"{absent}, {tie} it to {twin.name}; in {label} their contents differ, so it is untied there"
    stem = info.name.removesuffix(".weight")
    for ending in (".qweight", ".weight_packed"):
        packed = other.tensors.get(stem + ending)
        if packed is not None and packed.dtype not in _FLOATS:
            return f"quantised: {other_label} holds {packed.name} ({packed.stored}) in its place"
    return absent


def _ends(name: str, endings: tuple[str, ...]) -> bool:
    return any(f".{name}".endswith(f".{ending}") for ending in endings)


def _same_content(side: Checkpoint, first: str, second: str) -> bool:
    info = side.tensors[first]
    if info.dtype is None:
        return False
    step = _COMPARED // info.dtype.itemsize
    for start in range(0, info.numel, step):
        stop = min(start + step, info.numel)
        a, b = (side.read_entries(name, start, stop).view(torch.uint8) for name in (first, second))
        if not torch.equal(a, b):
            return False
    return True
