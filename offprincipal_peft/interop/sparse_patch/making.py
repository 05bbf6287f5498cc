"""A patch from two checkpoints on disk."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ...audit.buffers import Buffers, ahead
from ...audit.checkpoints import Checkpoint, open_checkpoint
from ...audit.headers import TensorInfo
from .content import TensorHash, bits_of, state_hash
from .file import PatchError, PatchFile, PatchInfo
from .states import Progress, blocks, mark, pick, read, same_tensors
from .writer import PatchWriter, told

_DENSE = 8  # where more than one in so many words differs, entries are compared at once


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

    Memory: some blocks of 2^21 entries, and up to 32 MB of the patch; the rest of it waits on disk.

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
            marks, done, buffers = {}, 0, Buffers(4)
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


def _compare(
    before: Checkpoint, after: Checkpoint, writer: PatchWriter, known: PatchFile | None, progress: Progress | None
) -> tuple[str, str]:
    marks: tuple[dict, dict] = ({}, {})
    done, size, buffers = 0, before.nbytes + after.nbytes, (Buffers(4), Buffers(4))
    for info in before.tensors.values():
        hashes = TensorHash(), TensorHash()
        covered = known.entries(info.name) if known is not None and info.name in known.info.shapes else None
        reads = (partial(_pair, before, after, info, hashes, buffers, *block) for block in blocks(info))
        for start, first, second in ahead(reads):
            stop = start + len(first)
            if covered is not None:
                _covered(writer, info, covered.take(stop)[0] - start, first, second)
            else:
                changed = differing(first, second)
                if len(changed) and (known is not None or info.dtype is None):
                    raise PatchError(_refusal(info, known))
                if len(changed):
                    writer.add(info.name, info.shape, changed + start, pick(second, changed))
            done += first.nbytes + second.nbytes
            if progress is not None:
                progress(done, size)
        for found, one in zip(marks, hashes, strict=True):
            found[info.name] = mark(info, one.result())
    return state_hash(marks[0]), state_hash(marks[1])


def _pair(
    before: Checkpoint,
    after: Checkpoint,
    info: TensorInfo,
    hashes: tuple[TensorHash, TensorHash],
    buffers: tuple[Buffers, Buffers],
    start: int,
    stop: int,
) -> tuple[int, Tensor, Tensor]:
    """One block of both sides, hashed where it was read: in the reader's thread."""
    first = read(before, info, start, stop, buffers[0])
    second = read(after, after.tensors[info.name], start, stop, buffers[1])
    hashes[0].add(first)
    hashes[1].add(second)
    return start, first, second


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


def differing(first: Tensor, second: Tensor) -> Tensor:  # (n,), (n,) of one dtype -> (c,) int64, ascending
    """Where two tensors' bytes differ. Eight bytes are compared at once, and entries only where those differ."""
    a, b = bits_of(first), bits_of(second)
    lanes = 8 // a.itemsize  # a power of two
    whole = len(a) - len(a) % lanes
    if lanes == 1 or not whole:
        return (a != b).nonzero().view(-1)
    c, d = a[:whole].view(torch.int64), b[:whole].view(torch.int64)
    words = (c != d).nonzero().view(-1)
    if len(words) * _DENSE > len(c):
        return (a != b).nonzero().view(-1)
    apart = c.index_select(0, words).view(a.dtype) != d.index_select(0, words).view(a.dtype)
    inside = apart.nonzero().view(-1)
    found = words.index_select(0, inside >> (lanes.bit_length() - 1)).mul_(lanes).add_(inside & (lanes - 1))
    if whole == len(a):
        return found
    return torch.cat([found, (a[whole:] != b[whole:]).nonzero().view(-1) + whole])
