"""What training keeps: every tensor that a model and its optimiser hold, and the peak of the process."""

from __future__ import annotations

import ctypes
import resource
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def reachable_tensors(roots: Iterable[Any]) -> list[Tensor]:
    """Every tensor in the attributes, items and slots below ``roots``, gradients left out.

    Finds what is no parameter and no buffer too: masks, positions, stashed originals, memory kept for gradients.
    """
    skipped = (type, str, bytes, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, torch.dtype)
    seen: set[int] = set()
    stack, found = list(roots), []
    while stack:
        item = stack.pop()
        if id(item) in seen or isinstance(item, skipped):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, ctypes.Array):  # gradient memory that a layer keeps
            found.append(torch.frombuffer(item, dtype=torch.uint8))
        elif isinstance(item, dict):
            stack += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple | set | frozenset):
            stack += list(item)
        stack += list(getattr(item, "__dict__", {}).values())
        slots = [name for kind in type(item).__mro__ for name in getattr(kind, "__slots__", ())]
        stack += [getattr(item, name) for name in slots if not name.startswith("__") and hasattr(item, name)]
    return found


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of every storage below ``tensors`` by its address: a storage that several tensors share counts once."""
    found = (t.untyped_storage() for t in tensors if t.layout == torch.strided and t.device.type != "meta")
    return {s.data_ptr(): s.nbytes() for s in found if s.nbytes()}


def peak_bytes(device: torch.device) -> int:
    """The most memory held so far: allocated by torch on a GPU, resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # not getrusage first: a process inherits that peak from the one that started it
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
