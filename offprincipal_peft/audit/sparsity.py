"""How many stored weights a training changed, streamed: the count of two whole checkpoints in a few megabytes.

The definition is that of :mod:`offprincipal_peft.geometry.precision`: both values rounded to bf16, equal ones (zeros of
either sign among them) unchanged, NaN as NaN too. Where a block is finite, which a sum tells at little cost, equality
of bf16 values is that of 16-bit integers, which is several times faster to find.
"""

from __future__ import annotations

import dataclasses
import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..geometry.precision import count_changed
from .checkpoints import Checkpoint, open_checkpoint
from .counts import as_bf16, bits_of
from .pairing import Block, Matched, Pairing, Rename, Skipped, iterate, pair

_WORDS = 65_535  # 64-bit words of 16-bit counters that are summed at once; one more would overflow a counter
_THREADS = 2  # memory's bandwidth is used up by then
_ENTRIES = 16 * _WORDS  # of a block, about 2^20: fewer, and the calls cost as much as the passes


@dataclass(frozen=True)
class TensorSparsity:
    """The counts of one weight; ``nan`` and ``inf``: entries of the base and of the tuned tensor as stored."""

    name: str
    entries: int
    changed: int
    nan: tuple[int, int] = (0, 0)
    inf: tuple[int, int] = (0, 0)
    note: str = ""

    @property
    def sparsity(self) -> float:
        """The share of unchanged entries; NaN for a tensor without entries."""
        return 1.0 - self.changed / self.entries if self.entries else math.nan


@dataclass(frozen=True)
class Sparsity:
    """The counts of every compared weight, in the order of the base's files, and what was not compared."""

    tensors: tuple[TensorSparsity, ...]
    skipped: tuple[Skipped, ...]
    rename: Rename

    @property
    def entries(self) -> int:
        return sum(tensor.entries for tensor in self.tensors)

    @property
    def changed(self) -> int:
        return sum(tensor.changed for tensor in self.tensors)

    @property
    def sparsity(self) -> float:
        """The share of unchanged entries of all compared weights."""
        return 1.0 - self.changed / self.entries if self.entries else math.nan

    @property
    def nonfinite(self) -> tuple[str, ...]:
        """The names of the weights with a NaN or an infinity on either side."""
        return tuple(tensor.name for tensor in self.tensors if any(tensor.nan + tensor.inf))


def bf16_sparsity(
    base: Checkpoint | str | Path,
    tuned: Checkpoint | str | Path,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Sparsity:
    """The bf16-aware update sparsity of every weight, and in all, in one pass over both checkpoints.

    Each count is that of :func:`offprincipal_peft.geometry.count_changed` with its defaults. Two dtypes are first
    rounded to the coarser of them, as :mod:`offprincipal_peft.audit.pairing` says; that differs only for fp16 beside
    fp32 or fp64. Memory: a few blocks of about 2^20 entries. Paths are opened and closed here.

    ``progress`` is called in the caller's thread with the bytes done and the bytes in all, at the end with both equal.

    Raises :class:`CheckpointError` where a checkpoint cannot be read or nothing matches.
    """
    with ExitStack() as stack:
        sides = [
            side if isinstance(side, Checkpoint) else stack.enter_context(open_checkpoint(side))
            for side in (base, tuned)
        ]
        pairing = pair(*sides)
        tallies = _tallies(pairing, stack, progress)
        tensors = tuple(tally.result() for tally in tallies.values())
        return Sparsity(tensors, tuple(pairing.skipped), pairing.renames[0])


def _tallies(pairing: Pairing, stack: ExitStack, progress: Callable[[int, int], None] | None) -> dict[str, _Tally]:
    """The counts of every weight. Blocks are dealt out to up to ``_THREADS`` threads, of which this one is one."""
    shares = [pairing]
    while len(shares) < min(_THREADS, _cores()):
        twins = [side.twin() for side in pairing.checkpoints]
        if any(twin is None for twin in twins):
            break
        known = tuple(stack.enter_context(twin) for twin in twins if twin is not None)
        shares.append(dataclasses.replace(pairing, checkpoints=known))
    found = [{match.name: _Tally(match) for match in pairing.matched} for _ in shares]
    done, stop = [0] * len(shares), threading.Event()

    def work(which: int) -> None:
        try:
            for block in iterate(shares[which], _ENTRIES, flat=True, share=(which, len(shares)), reuse=True):
                if stop.is_set():
                    return
                found[which][block.match.name].add(block)
                done[which] += sum(tensor.nbytes for tensor in block.tensors)
                if progress is not None and which == 0 and (so_far := sum(done)) < pairing.nbytes:
                    progress(so_far, pairing.nbytes)
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(max(1, len(shares) - 1), "sparsity") as pool:
        others = [pool.submit(work, which) for which in range(1, len(shares))]
        work(0)
        for other in others:
            other.result()
    if progress is not None:
        progress(pairing.nbytes, pairing.nbytes)
    for more in found[1:]:
        for name, tally in more.items():
            found[0][name].merge(tally)
    return found[0]


def _cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Tally:
    """The counts of one weight as its blocks come."""

    def __init__(self, match: Matched) -> None:
        self.match = match
        self.changed = 0
        self.nan = [0, 0]
        self.inf = [0, 0]

    def add(self, block: Block) -> None:
        """Count ``block`` and use up its tensors: they hold nothing of use afterwards."""
        finite = True
        for side, tensor in enumerate(block.tensors):
            # A sum is NaN or infinite where an entry is; where it merely overflows, the counts below are zero.
            if not math.isfinite(tensor.sum(dtype=_summed(tensor.dtype)).item()):
                self.nan[side] += int(tensor.isnan().sum())
                self.inf[side] += int(tensor.isinf().sum())
                finite = False
        before, after = (as_bf16(tensor, self.match.common()) for tensor in block.tensors)
        self.changed += _count_finite(before, after) if finite else count_changed(before, after)

    def merge(self, other: _Tally) -> None:
        """Add what another thread counted of the same weight."""
        self.changed += other.changed
        for mine, theirs in ((self.nan, other.nan), (self.inf, other.inf)):
            mine[:] = [a + b for a, b in zip(mine, theirs, strict=True)]

    def result(self) -> TensorSparsity:
        match, (nan_base, nan_tuned), (inf_base, inf_tuned) = self.match, self.nan, self.inf
        return TensorSparsity(
            match.name, match.infos[0].numel, self.changed, (nan_base, nan_tuned), (inf_base, inf_tuned), match.note
        )


def _summed(dtype: torch.dtype) -> torch.dtype | None:
    # bf16 in itself is three times faster than in fp32 and has its range; fp16 would overflow at once.
    return torch.float32 if dtype == torch.float16 else None


def _count_finite(before: Tensor, after: Tensor) -> int:  # bf16, both 1-D of one length, no NaN
    """How many entries differ, from their bits. ``before`` is overwritten."""
    count = before.numel()
    if not count:
        return 0
    first, second = bits_of(before, after)
    flags = torch.ne(first, second, out=first)  # 0 or 1 as int16: as bool it is seven times slower
    ragged = count % 4
    words = flags[: count - ragged].view(torch.int64)
    changed = int(flags[count - ragged :].sum()) if ragged else 0
    for part in words.split(_WORDS):
        lanes = int(part.sum())
        changed += sum((lanes >> shift) & 0xFFFF for shift in (0, 16, 32, 48))
    return changed
