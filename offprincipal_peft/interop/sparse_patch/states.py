"""Checkpoints as runs of bytes: blocks of their tensors in order, one read ahead, whatever their dtypes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from ...audit.buffers import Buffers, ahead
from ...audit.checkpoints import Checkpoint
from ...audit.headers import CheckpointError, TensorInfo
from .content import TensorHash, TensorMark, bits_of, bytes_of, state_hash
from .file import BLOCK, PatchError

Progress = Callable[[int, int], None]  # bytes done, bytes in all


def length(info: TensorInfo) -> int:
    """Entries of a tensor; bytes where torch has no such dtype."""
    return info.numel if info.dtype is not None else info.nbytes


def blocks(info: TensorInfo) -> Iterator[tuple[int, int]]:
    """Runs of entries that are worked on at once."""
    for start in range(0, length(info), BLOCK):
        yield start, min(start + BLOCK, length(info))


def read(side: Checkpoint, info: TensorInfo, start: int, stop: int, buffers: Buffers) -> Tensor:  # -> (stop - start,)
    """Entries of a tensor as they are stored; bytes where torch has no such dtype."""
    found = buffers.take(stop - start, info.dtype or torch.uint8)
    if info.dtype is not None:
        return side.read_entries(info.name, start, stop, into=found)
    with info.file.open("rb") as file:
        file.seek(info.offset + start)
        if file.readinto(bytes_of(found)) != stop - start:
            raise CheckpointError(f"{info.file} became shorter since it was opened; use a copy that nothing writes to.")
    return found


def pick(values: Tensor, positions: Tensor) -> Tensor:  # (n,), (c,) int64 -> (c,)
    """Entries of a flat tensor, as bits, since torch cannot select from every dtype.

    By numpy, here and beside: torch's own threads, once they were called, wait in a loop for more to do and take the
    time of the threads that read and write.
    """
    return torch.from_numpy(bits_of(values).numpy().take(positions.numpy())).view(values.dtype)


def mark(info: TensorInfo, content: str) -> TensorMark:
    return TensorMark(info.stored, info.shape, content)


def checkpoint_hash(side: Checkpoint, progress: Progress | None = None) -> str:
    """The content hash of a checkpoint: of every tensor in it, whatever files they lie in. Reads all of it."""
    marks, done, buffers = {}, 0, Buffers(2)
    for info in side.tensors.values():
        found = TensorHash()
        for part in ahead(partial(read, side, info, *block, buffers) for block in blocks(info)):
            found.add(part)
            done += part.nbytes
            if progress is not None:
                progress(done, side.nbytes)
        marks[info.name] = mark(info, found.result())
    return state_hash(marks)


def same_tensors(base: Checkpoint, other: Checkpoint) -> None:
    """Raise :class:`PatchError` where two checkpoints do not hold the same names, shapes and dtypes."""
    for first, second in ((base, other), (other, base)):
        lacking = [name for name in first.tensors if name not in second.tensors]
        if lacking:
            more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
            raise PatchError(
                f"{second.path} lacks {', '.join(lacking[:3])}{more}, which {first.path} holds; a patch neither adds "
                "nor removes tensors. Save both the same way (a head that is tied in one must be tied in the other)."
            )
    for name, info in base.tensors.items():
        own = other.tensors[name]
        if (own.shape, own.stored) != (info.shape, info.stored):
            raise PatchError(
                f"{name} is {info.stored} {info.shape} in {base.path} and {own.stored} {own.shape} in {other.path}; a "
                "patch keeps shapes and dtypes. Save both in one dtype."
            )
