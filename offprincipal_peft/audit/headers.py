"""What a safetensors file says of itself: its header, read and checked against the file's size. No weight is read.

The header is parsed here and not by the safetensors library, because streaming needs each tensor's place in the file,
and because an error should name the tensor and both numbers. The checks are the library's: known sizes, no hole, no
overlap, nothing after the last tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_LONGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library

# safetensors' name -> the torch dtype (None: torch has none that holds one value an element) and bits an element
_DTYPES: dict[str, tuple[torch.dtype | None, int]] = {
    "F64": (torch.float64, 64),
    "F32": (torch.float32, 32),
    "F16": (torch.float16, 16),
    "BF16": (torch.bfloat16, 16),
    "F8_E4M3": (torch.float8_e4m3fn, 8),
    "F8_E5M2": (torch.float8_e5m2, 8),
    "F8_E4M3FNUZ": (torch.float8_e4m3fnuz, 8),
    "F8_E5M2FNUZ": (torch.float8_e5m2fnuz, 8),
    "F8_E8M0": (torch.float8_e8m0fnu, 8),
    "F6_E2M3": (None, 6),
    "F6_E3M2": (None, 6),
    "F4": (None, 4),
    "C64": (torch.complex64, 64),
    "I64": (torch.int64, 64),
    "U64": (torch.uint64, 64),
    "I32": (torch.int32, 32),
    "U32": (torch.uint32, 32),
    "I16": (torch.int16, 16),
    "U16": (torch.uint16, 16),
    "I8": (torch.int8, 8),
    "U8": (torch.uint8, 8),
    "BOOL": (torch.bool, 8),
}
# The other way round. Of two names for one dtype there is none here.
STORED_NAMES = {dtype: name for name, (dtype, _) in _DTYPES.items() if dtype is not None}
# How files begin that are often given, or renamed, by mistake.
_FOREIGN = (
    (b"PK\x03\x04", "a zip archive, as torch.save writes it: a pickle, which is never opened here"),
    (b"\x80", "a pickle, which is never opened here"),
    (b"GGUF", "a GGUF file"),
    (b"version https://git-lfs", "a git-lfs pointer: the weights were not downloaded (git lfs pull)"),
)


class CheckpointError(ValueError):
    """A file, folder or tensor that cannot be read or compared; the message says which, why, and what is right."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as its file's header describes it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None  # None where torch has no such dtype: `stored` names it
    nbytes: int
    file: Path
    offset: int  # bytes from the beginning of the file
    stored: str  # the dtype's name in the file: "BF16"

    @property
    def numel(self) -> int:
        """The number of entries."""
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file in the order of their bytes. Reads the header alone.

    Raises:
        CheckpointError: no such file; cut short, longer than its header says, another format under this name, a header
            that is not JSON, a name that occurs twice, or a tensor whose size, shape or place is impossible.
    """
    text, size = _header(path)
    data = 8 + len(text)
    header = _parse(path, text)
    header.pop("__metadata__", None)
    tensors = [_tensor(path, name, entry, data) for name, entry in header.items()]
    tensors.sort(key=lambda info: (info.offset, info.nbytes))
    _check_places(path, tensors, data, size)
    return {info.name: info for info in tensors}


def read_metadata(path: Path) -> dict[str, str]:
    """What the writer of a safetensors file said of it, empty where nothing. Raises as :func:`read_header` does."""
    found = _parse(path, _header(path)[0]).get("__metadata__", {})
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise CheckpointError(f"{path}: the header's __metadata__ is no object of strings; the file is damaged.")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``. Raises :class:`CheckpointError` where it holds anything else."""
    try:
        value = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}); copy it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}; an object is needed.")
    return value


def _header(path: Path) -> tuple[bytes, int]:
    """The header's text and the size of the file."""
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; give a .safetensors file.")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(32)
        if len(start) < 8:
            raise CheckpointError(f"{path} has {size} bytes; a safetensors file begins with 8 bytes of header length.")
        length = int.from_bytes(start[:8], "little")
        if length > _LONGEST_HEADER:
            # Only now: a header of 640 bytes begins like a pickle.
            what = next((what for magic, what in _FOREIGN if start.startswith(magic)), "damaged, or of another format")
            raise CheckpointError(
                f"{path} is no safetensors file but {what}. Its first 8 bytes would be a header of {length} bytes; "
                f"safetensors allows {_LONGEST_HEADER}."
            )
        if length > size - 8:
            raise CheckpointError(
                f"{path} is cut short within its header: it needs {8 + length} bytes and the file has {size}; "
                "copy it again."
            )
        file.seek(8)
        return file.read(length), size


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(f"{path}: the header names {twice!r} twice; write the file again.")
        return found

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=once)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not JSON ({error}): damaged, or no safetensors file.") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is a JSON {type(header).__name__}; an object is needed.")
    return header


def _whole(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _tensor(path: Path, name: str, entry: Any, data: int) -> TensorInfo:
    values: Mapping[str, Any] = entry if isinstance(entry, dict) else {}
    stored, shape, places = (values.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not (isinstance(stored, str) and _whole(shape) and _whole(places) and len(places) == 2):  # type: ignore[arg-type]
        raise CheckpointError(
            f"{path}: the header's entry of {name!r} is {str(entry)[:120]}; it needs a dtype, a shape of whole numbers "
            "and data_offsets [begin, end]."
        )
    assert isinstance(shape, list) and isinstance(places, list)
    begin, end = places
    dtype, bits = _DTYPES.get(stored, (None, 0))
    needed = math.prod(shape) * bits // 8
    # Of a dtype that a later safetensors defines the size is unknown here; its tensor is listed and cannot be read.
    if end < begin or (bits and end - begin != needed):
        raise CheckpointError(
            f"{path}: {name!r} of shape {tuple(shape)} and dtype {stored} needs {needed} bytes, its data_offsets "
            f"[{begin}, {end}] hold {end - begin}; the file is damaged."
        )
    return TensorInfo(name, tuple(shape), dtype, end - begin, path, data + begin, stored)


def _check_places(path: Path, tensors: list[TensorInfo], data: int, size: int) -> None:
    """Each tensor begins where the one before ended, and the last ends with the file."""
    expected, before = data, "the header"
    for info in tensors:
        if info.offset != expected:
            fault = "overlaps" if info.offset < expected else "leaves a hole after"
            raise CheckpointError(
                f"{path}: {info.name!r} begins at byte {info.offset} and {fault} {before}, which ends at {expected}; "
                "the file is damaged."
            )
        expected, before = info.offset + info.nbytes, repr(info.name)
    if expected > size:
        raise CheckpointError(
            f"{path} is cut short: its tensors end at byte {expected} and the file has {size}; copy it again."
        )
    if expected < size:
        raise CheckpointError(
            f"{path} has {size - expected} bytes after its last tensor, which ends at byte {expected}; "
            "the file is damaged."
        )
