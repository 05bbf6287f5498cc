"""Memory for large packed gradients on the CPU, kept between steps.

A C library hands blocks above 32 MiB straight to the operating system and takes fresh, zeroed pages for the next one;
filling them cost 11 ms for 34 MB where the same memory costs 1.2 ms when it is used again. So the memory of a large
gradient goes back to its layer when the last tensor on it dies, and not before: 4 bytes per trained entry stay with
the layers of more than 8.4 M trained entries. On a GPU torch's own allocator does this for every tensor.
"""

from __future__ import annotations

import ctypes
import weakref
from typing import Any

import torch
from torch import Tensor

LINE = 64  # bytes of a cache line: what torch aligns its own memory to
KEPT_BYTES = 32 << 20  # smaller blocks are recycled by the C library itself


class GradientMemory:
    """The blocks of one layer that no tensor uses."""

    def __init__(self) -> None:
        self.free: list[ctypes.Array[ctypes.c_float]] = []

    def empty(self, count: int, device: torch.device) -> Tensor:
        """An uninitialised fp32 vector (count,)."""
        if device.type != "cpu" or 4 * count < KEPT_BYTES:
            return torch.empty(count, dtype=torch.float32, device=device)
        memory = self.free.pop() if self.free else (ctypes.c_float * (count + LINE // 4))()
        aligned = -ctypes.addressof(memory) % LINE
        lease = (ctypes.c_float * count).from_buffer(memory, aligned)  # held by the tensor's storage, it ends with it
        weakref.finalize(lease, self.free.append, memory).atexit = False
        return torch.frombuffer(lease, dtype=torch.float32)

    def __deepcopy__(self, memo: Any) -> GradientMemory:
        return GradientMemory()

    def __reduce__(self) -> tuple[type[GradientMemory], tuple[()]]:
        return GradientMemory, ()
