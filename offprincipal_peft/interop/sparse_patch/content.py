"""What a set of weights is, byte for byte: one hash of each tensor, and one of all of them together.

Trade-off: 128-bit XXH3 runs at the speed of memory, ten times SHA-256, so that a whole model can be checked at every
step of a chain. It finds every accident and is no defence against someone who forges a file on purpose.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Mapping
from typing import NamedTuple

import torch
import xxhash
from torch import Tensor

HEX = 32  # characters of a hash


class TensorMark(NamedTuple):
    """One tensor of a state: the dtype's name as safetensors has it ("BF16"), the shape, the hash of its bytes."""

    stored: str
    shape: tuple[int, ...]
    content: str


def state_hash(marks: Mapping[str, TensorMark]) -> str:
    """The hash of named tensors, 32 hex digits: the same for any order, any sharding and any file."""
    lines = [[name, mark.stored, list(mark.shape), mark.content] for name, mark in sorted(marks.items())]
    return xxhash.xxh3_128_hexdigest(json.dumps(lines, ensure_ascii=True).encode())


class TensorHash:
    """The hash of a tensor that comes in parts, in the order of its entries."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_128()

    def add(self, part: Tensor) -> None:
        """``part``: contiguous, in CPU memory, of any dtype."""
        self._hash.update(bytes_of(part))

    def result(self) -> str:
        return self._hash.hexdigest()


def hash_tensor(tensor: Tensor) -> str:
    """Of a whole tensor on any device: 32 hex digits."""
    found = TensorHash()
    found.add(tensor.detach().resolve_conj().resolve_neg().contiguous().cpu())
    return found.result()


def bytes_of(tensor: Tensor) -> memoryview:
    """A contiguous CPU tensor's memory, not copied: it must not outlive the tensor. Without numpy, which lacks bf16."""
    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError(f"a contiguous tensor in CPU memory is needed, got {tensor.device} {tuple(tensor.shape)}")
    count = tensor.numel() * tensor.itemsize
    if not count:
        return memoryview(b"")
    return memoryview((ctypes.c_ubyte * count).from_address(tensor.data_ptr())).cast("B")


def bits_of(tensor: Tensor) -> Tensor:
    """The same memory as whole numbers, so that equal means equal bytes: -0 is not 0, and NaN is itself."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(kinds[tensor.itemsize])
