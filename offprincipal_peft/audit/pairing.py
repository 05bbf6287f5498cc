"""Which tensors of two or more checkpoints are the same weight, why the others are not, and both sides block by block.

*Dtypes.* Tensors that are stored in different floating dtypes are kept, with a note. Two comparisons, two rules. What
is *stored* (bf16 visibility, sparsity) is compared in the coarser dtype of the base and that tuned checkpoint, the one
with the larger eps: the finer file is rounded to it first, or the rounding that a save did would count as training.
*Geometry* (norms, angles, spectra of the difference) takes the stored values as they are, in fp32: there the coarser
file's rounding is part of the difference, which the note says.

*Names.* One rename for a whole checkpoint, the one under which most tensors of equal shape meet; two renames that do
equally well and differ are refused. Nothing is matched by resemblance.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .absences import absence, fault, stored_fault
from .buffers import Buffers
from .checkpoints import Checkpoint
from .headers import CheckpointError, TensorInfo

# What wrappers put before names: torch.compile, DDP and FSDP, PEFT, and the model class around its backbone.
PREFIXES = ("_orig_mod.", "module.", "base_model.model.", "model.")
_Names = tuple["Rename", dict[str, str]]  # base name -> tuned name under the rename


@dataclass(frozen=True)
class Rename:
    """The prefixes that the base's and the tuned checkpoint's names lose to become equal; empty: none."""

    base: str = ""
    tuned: str = ""

    def __str__(self) -> str:
        parts = [f"{side} names without {prefix!r}" for side, prefix in vars(self).items() if prefix]
        return ", ".join(parts) or "names as they are"


@dataclass(frozen=True)
class Skipped:
    """A tensor that is not compared. ``name``: as in the checkpoint that holds it, the first of them."""

    name: str
    reason: str


@dataclass(frozen=True)
class Matched:
    """One weight in every checkpoint, base first.

    Attributes:
        infos: one for each checkpoint, each with its own name and dtype and all with the same shape.
        note: what to know of a comparison between dtypes; empty where all are the same.
    """

    infos: tuple[TensorInfo, ...]
    note: str = ""

    def common(self, tuned: int = 0) -> torch.dtype:
        """The coarser dtype of the base and of one tuned checkpoint, counted from 0: stored values are compared in it.

        Of that pair alone: what one checkpoint's figures are does not depend on those beside it.
        """
        return _coarser(self.infos[0], self.infos[tuned + 1])

    @property
    def name(self) -> str:
        """The base's name of it."""
        return self.infos[0].name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.infos[0].shape

    @property
    def nbytes(self) -> int:
        """Bytes in all checkpoints together."""
        return sum(info.nbytes for info in self.infos)


@dataclass(frozen=True)
class Pairing:
    """What :func:`pair` found. ``matched`` is in the order of the base's files; ``renames`` has one for each tuned."""

    checkpoints: tuple[Checkpoint, ...]
    matched: tuple[Matched, ...]
    skipped: list[Skipped] = field(default_factory=list)
    renames: tuple[Rename, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes that :func:`iterate` reads."""
        return sum(match.nbytes for match in self.matched)


@dataclass(frozen=True)
class Block:
    """Rows (or, with ``flat``, entries) ``start`` to ``stop`` of one weight in every checkpoint, base first.

    The tensors have the dtypes they are stored in, and memory of their own unless it was to be used again.
    """

    match: Matched
    start: int
    stop: int
    tensors: tuple[Tensor, ...]


def pair(base: Checkpoint, *tuned: Checkpoint) -> Pairing:
    """Match the tensors of ``tuned`` to those of ``base``; every other tensor is in ``skipped`` with its reason.

    A tensor is matched where all hold it, with one shape and in bf16, fp16, fp32 or fp64. Headers are enough for that;
    contents are read only of an output head or embedding that one side lacks, to see whether it was a tied copy.

    Raises:
        CheckpointError: no tuned checkpoint; nothing can be compared; two renames fit a checkpoint equally well.
    """
    if not tuned:
        raise CheckpointError("pair needs a base and at least one tuned checkpoint to compare with it.")
    sides = (base, *tuned)
    labels = ["base", *(["tuned"] if len(tuned) == 1 else [f"tuned {i}" for i in range(1, len(sides))])]
    found = [_find_rename(base, side, label) for side, label in zip(tuned, labels[1:], strict=True)]
    matched, skipped = [], []
    for name in base.tensors:
        names = [name, *(mapping.get(name) for _, mapping in found)]
        infos = [side.tensors[own] if own else None for side, own in zip(sides, names, strict=True)]
        if reason := fault(name, infos, sides, labels):
            skipped.append(Skipped(name, reason))
        else:
            matched.append(_match(tuple(info for info in infos if info), labels))
    skipped += _additions(sides, labels, found)
    if not matched:
        why = "; ".join(f"{skip.name}: {skip.reason}" for skip in skipped[:3])
        raise CheckpointError(f"no tensor of {base.path} can be compared with its namesake: {why}.")
    return Pairing(sides, tuple(matched), skipped, tuple(rename for rename, _ in found))


def iterate(
    pairing: Pairing,
    rows: int | None = None,
    *,
    block_bytes: int | None = None,
    flat: bool = False,
    share: tuple[int, int] = (0, 1),
    reuse: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Block]:
    """Every matched weight in the order of the base's files, in blocks that are read as they are asked for.

    Args:
        rows: at most so many rows (with ``flat`` entries) a block. Without it and ``block_bytes``: whole tensors.
        block_bytes: at most so many bytes a block, all checkpoints together, but at least one row; with ``flat`` one
            entry, so that the bound holds for every shape.
        flat: blocks of 1-D entries in row-major order instead of rows. A scalar is always one block, whole.
        share: (index, count): every count-th block from the index-th on, for a thread that shares them with others,
            each with a pairing of its own.
        reuse: read into the memory of earlier blocks, with ``flat`` alone: a block's tensors are valid until the next
            block is asked for.
        progress: called after each block was used, with the bytes done (of this share) and the bytes in all.
    """
    for what, value in (("rows", rows), ("block_bytes", block_bytes)):
        if value is not None and value < 1:
            raise ValueError(f"{what} must be positive, got {value}")
    if reuse and not flat:
        raise ValueError("reuse is for blocks of entries: flat=True")
    buffers = [Buffers(1) for _ in pairing.checkpoints] if reuse else None
    total, done = pairing.nbytes, 0
    for span in itertools.islice(_spans(pairing, rows, block_bytes, flat), share[0], None, share[1]):
        block = _block(pairing, *span, flat, buffers)
        yield block
        done += sum(tensor.nbytes for tensor in block.tensors)
        del block  # or the next one would be read while this one is still held
        if progress is not None:
            progress(done, total)


def _spans(
    pairing: Pairing, rows: int | None, block_bytes: int | None, flat: bool
) -> Iterator[tuple[Matched, int, int]]:
    for match in pairing.matched:
        length = match.infos[0].numel if flat else (match.shape or (1,))[0]
        unit = max(1, match.nbytes // length) if length else 1  # bytes of one row or entry in all checkpoints
        step = max(1, min(rows or length, block_bytes // unit if block_bytes else length))
        for start in range(0, length, step) or (0,):  # an empty tensor is one empty block
            yield match, start, min(start + step, length)


def _block(pairing: Pairing, match: Matched, start: int, stop: int, flat: bool, buffers: list[Buffers] | None) -> Block:
    tensors = []
    for i, (side, info) in enumerate(zip(pairing.checkpoints, match.infos, strict=True)):
        if flat:
            into = buffers[i].take(stop - start, info.dtype) if buffers and info.dtype else None
            tensors.append(side.read_entries(info.name, start, stop, into=into))
        else:
            tensors.append(side.read_rows(info.name, start, stop) if info.shape else side.read(info.name))
    return Block(match, start, stop, tuple(tensors))


def _additions(sides: tuple[Checkpoint, ...], labels: list[str], found: list[_Names]) -> list[Skipped]:
    """What tuned checkpoints hold and the base does not: one entry for a tensor, with the reasons that differ."""
    extra: dict[str, tuple[str, list[str]]] = {}  # by the name that the base would have for it
    for side, label, (rename, mapping) in zip(sides[1:], labels[1:], found, strict=True):
        known = set(mapping.values())
        for name in [name for name in side.tensors if name not in known]:
            info = side.tensors[name]
            _, reasons = extra.setdefault(rename.base + name.removeprefix(rename.tuned), (name, []))
            reasons.append(stored_fault(info, side, label) or absence(side, info, label, sides[0], "base"))
    return [Skipped(name, "; ".join(dict.fromkeys(reasons))) for name, reasons in extra.values()]


def _match(infos: tuple[TensorInfo, ...], labels: list[str]) -> Matched:
    stored = ", ".join(f"{info.stored} in {label}" for info, label in zip(infos, labels, strict=True))
    coarse = {_coarser(infos[0], info) for info in infos[1:] if info.dtype != infos[0].dtype}
    if not coarse:
        return Matched(infos)
    if len(infos) == 2:
        (name,) = (str(dtype).removeprefix("torch.") for dtype in coarse)
        rule = f"stored values are compared in {name}; in fp32 the rounding to {name} is part of the difference"
    else:
        rule = (
            "stored values are compared in the coarser dtype of the base and each checkpoint; in fp32 the rounding to "
            "it is part of the difference"
        )
    return Matched(infos, f"{stored}: {rule}")


def _coarser(first: TensorInfo, second: TensorInfo) -> torch.dtype:
    dtypes = [info.dtype for info in (first, second) if info.dtype is not None]
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


# ---- names


def _find_rename(base: Checkpoint, tuned: Checkpoint, label: str) -> _Names:
    """The rename under which most tensors meet, and base name -> tuned name under it."""
    best: list[_Names] = []
    most = (0, 0)
    for rename in sorted(
        (Rename(b, t) for b in _chains(base.tensors) for t in _chains(tuned.tensors)),
        key=lambda rename: len(rename.base) + len(rename.tuned),
    ):
        mapping = _meet(base.tensors, tuned.tensors, rename)
        alike = sum(base.tensors[name].shape == tuned.tensors[own].shape for name, own in mapping.items())
        score = (alike, len(mapping))
        if score > most:
            best, most = [], score
        if score == most and all(mapping != other for _, other in best):
            best.append((rename, mapping))
    if not best or not most[1]:
        raise CheckpointError(
            f"no tensor of {tuned.path} ({label}) has the name of one in {base.path}, nor without the prefixes "
            f"{', '.join(PREFIXES)}. {label.capitalize()} holds {_first(tuned)}; base holds {_first(base)}. "
            "Both must be checkpoints of one model, with one naming."
        )
    if len(best) > 1 and best[0][0] != Rename():
        raise CheckpointError(
            f"{tuned.path} ({label}) fits {base.path} in two ways that differ, {most[0]} tensors each: "
            f"{best[0][0]}; or {best[1][0]}. Save it with the base's names."
        )
    return best[0]


def _chains(names: Mapping[str, TensorInfo]) -> list[str]:
    """Every run of known prefixes that some name begins with, the empty one first."""
    found = [""]
    for chain in found:  # it grows while it is walked
        found += [
            chain + prefix
            for prefix in PREFIXES
            if chain + prefix not in found and any(name.startswith(chain + prefix) for name in names)
        ]
    return found


def _meet(base: Mapping[str, TensorInfo], tuned: Mapping[str, TensorInfo], rename: Rename) -> dict[str, str]:
    """Base name -> tuned name where they are equal without the prefixes; empty where a name would stand twice."""
    bare_base = {name.removeprefix(rename.base): name for name in base}
    bare_tuned = {name.removeprefix(rename.tuned): name for name in tuned}
    if len(bare_base) != len(base) or len(bare_tuned) != len(tuned):
        return {}
    return {name: bare_tuned[bare] for bare, name in bare_base.items() if bare in bare_tuned}


def _first(side: Checkpoint) -> str:
    return ", ".join(list(side.tensors)[:3])
