"""A patch from two checkpoints on disk."""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...audit.buffers import Buffers, ahead
from ...audit.checkpoints import Checkpoint, open_checkpoint
from ...audit.headers import TensorInfo
from .content import TensorHash, bits_of, state_hash
from .file import PatchError, PatchFile, PatchInfo
from .states import Progress, blocks, mark, pick, read, same_tensors
from .writer import PatchWriter, told


def make_patch(
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    *,
    step: int = 1,
    base_step: int = 0,
    positions: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> PatchInfo:
    """Write what differs between two checkpoints of one model, bit for bit.

    Memory: some blocks of 2^20 entries, and up to 32 MB of the patch; the rest of it waits on disk.

    Args:
        base, tuned: Hugging Face folders (sharded or not) or single safetensors files.
        out: the patch, a ``.safetensors`` file; written whole or not at all.
        step, base_step: numbers of the two states, for chains.
        positions: a "sparse" patch whose positions cover every change; only values are written then.

    Raises:
        PatchError: other tensors, shapes or dtypes; changes outside of ``positions``; a target in the way.
        CheckpointError: a checkpoint that cannot be read.
    """
    if step <= base_step or base_step < 0:
        raise PatchError(f"step {step} must come after base_step {base_step}, and both must not be negative.")
    with told(out), ExitStack() as stack:
        before, after = (stack.enter_context(open_checkpoint(side)) for side in (base, tuned))
        same_tensors(before, after)
        total = sum(info.numel for info in before.tensors.values())
        known = stack.enter_context(PatchFile(positions)) if positions is not None else None
        if known is not None:
            _check_positions(known, before)
            if Path(out).exists() and Path(out).samefile(known.info.path):
                raise PatchError(f"{out} holds the positions that the new patch needs; give another name.")
        with PatchWriter(
            out,
            "sparse" if known is None else "values",
            step=step,
            base_step=base_step,
            total=total,
            indices_of=known.info.digest if known is not None else None,
            overwrite=overwrite,
        ) as writer:
            hashes = _compare(before, after, writer, known, progress)
            return writer.finish(base=hashes[0], result=hashes[1])


def make_anchor(
    source: str | Path, out: str | Path, *, step: int = 0, overwrite: bool = False, progress: Progress | None = None
) -> PatchInfo:
    """Write a whole state as a "full" patch, from which a chain can begin or be restored.

    ``source``: a Hugging Face folder or a safetensors file. Raises as :func:`make_patch` does.
    """
    if step < 0:
        raise PatchError(f"step must not be negative, got {step}.")
    with told(out), open_checkpoint(source) as side:
        whole = {}
        for info in side.tensors.values():
            if info.dtype is None:
                raise PatchError(f"{info.name} is stored as {info.stored}, which torch cannot hold; anchors need it.")
            whole[info.name] = (info.shape, info.dtype)
        total = sum(info.numel for info in side.tensors.values())
        with PatchWriter(
            out, "full", step=step, base_step=None, total=total, whole=whole, overwrite=overwrite
        ) as writer:
            marks, done, buffers = {}, 0, Buffers(2)
            for info in side.tensors.values():
                found = TensorHash()
                for part in ahead(partial(read, side, info, *block, buffers) for block in blocks(info)):
                    found.add(part)
                    writer.add(info.name, info.shape, None, part)
                    done += part.nbytes
                    if progress is not None:
                        progress(done, side.nbytes)
                marks[info.name] = mark(info, found.result())
            return writer.finish(base=None, result=state_hash(marks))


_READERS = 2  # threads that read and compare beside the one that hashes and writes


def _compare(
    before: Checkpoint, after: Checkpoint, writer: PatchWriter, known: PatchFile | None, progress: Progress | None
) -> tuple[str, str]:
    marks: tuple[dict, dict] = ({}, {})
    done, size = 0, before.nbytes + after.nbytes
    with ExitStack() as stack:
        readers = [_PairReader(before, after, stack) for _ in range(_READERS + 1)]
        for info in before.tensors.values():
            hashes = TensorHash(), TensorHash()
            covered = known.entries(info.name) if known is not None and info.name in known.info.shapes else None
            jobs = (
                partial(reader.read, info, *block, covered is None)
                for reader, block in zip(itertools.cycle(readers), blocks(info), strict=False)
            )
            for part in ahead(jobs, _READERS):
                hashes[0].add(part.before)
                hashes[1].add(part.after)
                if covered is not None:
                    positions = covered.take(part.start + len(part.before))[0] - part.start
                    _covered(writer, info, positions, part.before, part.after)
                elif len(part.changed):
                    if known is not None or info.dtype is None:
                        raise PatchError(_refusal(info, known))
                    writer.add(info.name, info.shape, part.changed, part.values, start=part.start)
                done += part.before.nbytes + part.after.nbytes
                if progress is not None:
                    progress(done, size)
            for found, one in zip(marks, hashes, strict=True):
                found[info.name] = mark(info, one.result())
    return state_hash(marks[0]), state_hash(marks[1])


class _Part(NamedTuple):
    """One block of both sides, and what differs: positions (c,) int64 in the block, and the new values (c,)."""

    start: int
    before: Tensor
    after: Tensor
    changed: Tensor
    values: Tensor


class _PairReader:
    """Reads and compares blocks, in whatever thread: for one block at a time, whose memory is used again."""

    def __init__(self, before: Checkpoint, after: Checkpoint, stack: ExitStack) -> None:
        self._sides = [
            stack.enter_context(Checkpoint(side.path, side.tensors, side.config)) for side in (before, after)
        ]
        self._buffers = Buffers(1), Buffers(1)

    def read(self, info: TensorInfo, start: int, stop: int, compared: bool) -> _Part:
        first, second = (
            read(side, side.tensors[info.name], start, stop, buffers)
            for side, buffers in zip(self._sides, self._buffers, strict=True)
        )
        changed = differing(first, second) if compared else torch.empty(0, dtype=torch.int64)
        return _Part(start, first, second, changed, pick(second, changed) if len(changed) else second[:0])


def _covered(writer: PatchWriter, info: TensorInfo, positions: Tensor, first: Tensor, second: Tensor) -> None:
    """The values at known positions; nothing else may have changed."""
    kept = bits_of(second).index_select(0, positions)
    expected = bits_of(first).clone().index_copy_(0, positions, kept)
    if not torch.equal(expected, bits_of(second)):
        raise PatchError(f"{info.name} changed at entries that are not among the given positions; make a sparse patch.")
    if len(positions):
        writer.add(info.name, info.shape, None, pick(second, positions))


def _check_positions(known: PatchFile, side: Checkpoint) -> None:
    known.check_digest()
    if known.info.kind != "sparse":
        raise PatchError(f"{known.info.path} is a {known.info.kind} patch and holds no positions; give a sparse one.")
    for name, shape in known.info.shapes.items():
        if name not in side.tensors or side.tensors[name].shape != shape:
            raise PatchError(f"{known.info.path} has positions for {name} {shape}, which {side.path} does not hold.")


def _refusal(info: TensorInfo, known: PatchFile | None) -> str:
    if known is None:
        return f"{info.name} changed and is stored as {info.stored}, which torch cannot hold one value of."
    return f"{info.name} changed and {known.info.path} has no positions for it; make a sparse patch."


def differing(first: Tensor, second: Tensor) -> Tensor:  # (n,), (n,) of one dtype, on the CPU -> (c,) int64, ascending
    """Where two tensors' bytes differ. By numpy, whose comparison and whose nonzero are several times torch's speed."""
    apart = bits_of(first).numpy() != bits_of(second).numpy()
    return torch.from_numpy(_nonzero(apart))


def _nonzero(flags: np.ndarray) -> np.ndarray:  # (n,) bool -> (c,) int64, ascending
    """``np.flatnonzero``, in two steps where few flags are set: words of eight flags first, which takes half the time.

    From a tenth on numpy itself takes another way, whose time does not grow with the count.
    """
    whole = len(flags) - len(flags) % 8
    if not whole or np.count_nonzero(flags) * 10 > len(flags):
        return np.flatnonzero(flags)
    words = flags[:whole].view(np.uint64)
    marked = np.flatnonzero(words != 0)
    found = np.flatnonzero(words[marked].view(np.bool_))  # of the marked words' flags alone
    found += ((marked - np.arange(len(marked))) * 8).take(found >> 3)
    if whole == len(flags):
        return found
    return np.concatenate([found, np.flatnonzero(flags[whole:]) + whole])
