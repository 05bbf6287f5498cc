"""Patches applied to a checkpoint on disk: streamed, checked on the way, and committed at once at the end."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from torch import Tensor

from ...audit.checkpoints import Checkpoint, open_checkpoint
from ...audit.headers import TensorInfo, read_header
from ..folders import new_folder
from .commit import Target
from .content import TensorHash, TensorMark, bits_of, bytes_of, state_hash
from .file import EntryReader, PatchError, PatchFile
from .states import Buffers, Progress, ahead, blocks, mark, read
from .writer import sync_folder


@dataclass(frozen=True)
class Applied:
    """What :func:`apply_patch` did. ``files``: how many weights files were written; ``entries``: set in all."""

    path: Path
    step: int
    state: str
    files: int
    entries: int


def apply_patch(
    target: str | Path,
    *patches: str | Path,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> Applied:
    """Bring a checkpoint from one state to another by one patch or several in their order.

    The whole target is read and hashed on the way. Nothing of it changes before everything was checked; then one
    rename makes the new state the checkpoint's. A process that is killed at any moment leaves the old state or the new.

    Args:
        target: a Hugging Face folder (sharded or not) or a single safetensors file.
        patches: made one after the other. A "full" one stands for any state before it.
        out: a new folder (for a file: a new file) for the result; by default the target is changed in place.

    Memory: some blocks of 2^21 entries.

    Raises:
        PatchError: a patch that is damaged, does not follow the one before it, or was made for another state than the
            target's. The target is as it was.
        CheckpointError: a target that cannot be read.
    """
    if not patches:
        raise PatchError("give at least one patch to apply.")
    opened = [PatchFile(path) for path in patches]
    try:
        opened = linked(opened)
        place = Target(Path(target))
        if out is None:
            place.recover()
        with open_checkpoint(target) as before:
            _check_fit(opened, before)
            work = _Work(before, opened, progress)
            return _in_place(place, work) if out is None else _elsewhere(before, work, Path(out))
    finally:
        for patch in opened:
            patch.close()


def linked(patches: Sequence[PatchFile]) -> list[PatchFile]:
    """The patches that count, from the last full one on: each checked, each following the one before it."""
    for before, after in itertools.pairwise(patches):
        if after.info.kind != "full" and after.info.base != before.info.result:
            raise PatchError(
                f"{after.info.path} goes from step {after.info.base_step} to {after.info.step} and does not follow "
                f"{before.info.path}, which ends at step {before.info.step}"
                + ("" if before.info.step == after.info.base_step else ": a patch between them is missing")
                + f" (state {before.info.result}, needed {after.info.base})."
            )
    for patch in patches:
        patch.check_digest()
        if patch.info.kind == "values":
            patch.positions_from(_positions(patch, patches))
    first = max((i for i, patch in enumerate(patches) if patch.info.kind == "full"), default=0)
    return list(patches[first:])


def _positions(patch: PatchFile, given: Sequence[PatchFile]) -> PatchFile:
    """The patch that holds the positions: among those given, or a file in the same folder."""
    wanted = patch.info.indices_of
    for other in given:
        if other.info.digest == wanted:
            return other
    for path in sorted(patch.info.path.absolute().parent.glob("*.safetensors")):
        try:
            other = PatchFile(path)
        except PatchError:
            continue
        if other.info.digest == wanted:
            other.check_digest()
            return other
        other.close()
    raise PatchError(
        f"{patch.info.path} holds values alone; the patch with digest {wanted}, which holds their positions, is "
        "neither given nor in its folder."
    )


def _check_fit(patches: Sequence[PatchFile], target: Checkpoint) -> None:
    for patch in patches:
        for name, shape in patch.info.shapes.items():
            info = target.tensors.get(name)
            if info is None:
                raise PatchError(f"{patch.info.path} changes {name}, which {target.path} does not hold.")
            if (info.shape, info.stored) != (shape, patch.stored(name)):
                raise PatchError(
                    f"{patch.info.path} has {name} as {patch.stored(name)} {shape}, {target.path} as {info.stored} "
                    f"{info.shape}; it was made for another checkpoint."
                )
        if patch.info.total != sum(info.numel for info in target.tensors.values()):
            raise PatchError(
                f"{patch.info.path} was made for a model of {patch.info.total} entries; {target.path} has not as many."
            )
        if patch.info.kind == "full" and len(patch.info.shapes) != len(target.tensors):
            raise PatchError(f"{patch.info.path} lacks tensors that {target.path} holds.")


class _Work:
    """One pass over the target: its tensors in the new state, and both states' hashes."""

    def __init__(self, target: Checkpoint, patches: Sequence[PatchFile], progress: Progress | None) -> None:
        self.target, self.patches, self.progress = target, patches, progress
        self.marks: tuple[dict[str, TensorMark], dict[str, TensorMark]] = ({}, {})
        self.buffers, self.done, self.entries = Buffers(), 0, 0
        self.touched = {name for patch in patches for name in patch.info.shapes}

    def tensor(self, info: TensorInfo, file: IO[bytes] | None) -> None:
        """Read one tensor, apply every patch, write it to ``file``."""
        readers = [patch.entries(info.name) for patch in self.patches if info.name in patch.info.shapes]
        full = self.patches[0] if self.patches[0].info.kind == "full" else None
        if full is not None:
            readers = readers[1:]
        old, new = TensorHash(), TensorHash()
        for start, stop, part in ahead(partial(self._part, full, info, old, *block) for block in blocks(info)):
            self.entries += _set(part, start, stop, readers)
            if readers:
                new.add(part)
            if file is not None:
                file.write(bytes_of(part))
            self.done += part.nbytes
            if self.progress is not None:
                self.progress(self.done, self.target.nbytes)
        self.marks[0][info.name] = mark(info, old.result())
        self.marks[1][info.name] = mark(info, new.result()) if readers else self.marks[0][info.name]

    def _part(
        self, full: PatchFile | None, info: TensorInfo, old: TensorHash, start: int, stop: int
    ) -> tuple[int, int, Tensor]:
        if full is None:
            part = read(self.target, info, start, stop, self.buffers)
        else:
            part = full.read(info.name, "values", start, stop)
        old.add(part)  # here: in the reader's thread
        return start, stop, part

    def check(self) -> str:
        """The new state's hash. Raises :class:`PatchError` where either state is not the one that was meant."""
        before, after = (state_hash(marks) for marks in self.marks)
        first, last = self.patches[0].info, self.patches[-1].info
        if first.kind != "full" and before != first.base:
            at = next((patch.info for patch in self.patches if patch.info.result == before), None)
            why = (
                f"it is at step {at.step} of these patches already; give the later ones alone"
                if at is not None
                else f"its state is {before} and the patch from step {first.base_step} needs {first.base}: another "
                "model, another step, or changed files"
            )
            raise PatchError(f"{self.target.path} is not what {first.path} was made for: {why}. Nothing was changed.")
        if after != last.result:
            raise PatchError(
                f"{last.path} should lead to the state {last.result} and leads to {after}: the patch is wrong. Nothing "
                "was changed."
            )
        return after


def _set(part: Tensor, start: int, stop: int, readers: Sequence[EntryReader]) -> int:
    """Put every patch's entries into one block, in their order; how many."""
    count, bits = 0, bits_of(part)
    for reader in readers:
        positions, values = reader.take(stop)
        if len(positions):
            bits.index_copy_(0, positions - start if start else positions, bits_of(values))
            count += len(positions)
    return count


def _by_file(target: Checkpoint) -> dict[Path, list[TensorInfo]]:
    """The tensors of each weights file in the order of their bytes."""
    found: dict[Path, list[TensorInfo]] = {}
    for info in target.tensors.values():
        found.setdefault(info.file, []).append(info)
    return {file: sorted(infos, key=lambda info: (info.offset, info.nbytes)) for file, infos in found.items()}


def _rewrite(source: Path, draft: IO[bytes], infos: list[TensorInfo], work: _Work) -> None:
    """The same file with the new values: its header stays as it is, to the byte."""
    with source.open("rb") as file:
        draft.write(file.read(infos[0].offset))
    for info in infos:
        work.tensor(info, draft)


def _in_place(place: Target, work: _Work) -> Applied:
    with place.drafts() as drafts:
        for source, infos in _by_file(work.target).items():
            if any(info.name in work.touched for info in infos):
                _rewrite(source, drafts.open(source), infos, work)
            else:
                for info in infos:
                    work.tensor(info, None)
        state = work.check()
        files = drafts.commit(state)
    return Applied(work.target.path, work.patches[-1].info.step, state, files, work.entries)


def _elsewhere(target: Checkpoint, work: _Work, out: Path) -> Applied:
    """A copy of the target with the new values, written whole or not at all."""
    if out.exists():
        raise PatchError(f"{out} exists; give the name of a new {'folder' if target.path.is_dir() else 'file'}.")
    files = _by_file(target)
    if not target.path.is_dir():
        place = Target(out)
        with place.drafts() as drafts:
            for source, infos in files.items():
                _rewrite(source, drafts.open(out), infos, work)
            state = work.check()
            drafts.commit(state)
    else:
        with new_folder(out.absolute()) as fresh:
            for source, infos in files.items():
                with (fresh / source.name).open("wb") as draft:
                    _rewrite(source, draft, infos, work)
            state = work.check()
            names = {source.name for source in files}
            for other in target.path.iterdir():
                if other.is_file() and other.name not in names and not other.name.startswith("."):
                    shutil.copyfile(other, fresh / other.name)
            sync_folder(fresh)
    return Applied(out, work.patches[-1].info.step, state, len(files), work.entries)


def write_checkpoint(patches: Sequence[PatchFile], out: Path, beside: Iterator[Path]) -> Applied:
    """A new folder from a full patch and those that follow it, with copies of the files ``beside``."""
    anchor = patches[0].info
    if anchor.kind != "full":
        raise PatchError(f"{anchor.path} is a {anchor.kind} patch; a checkpoint begins with a full one.")
    if out.exists():
        raise PatchError(f"{out} exists; give the name of a new folder.")
    infos = sorted(read_header(anchor.path).values(), key=lambda info: (info.offset, info.nbytes))
    with open_checkpoint(anchor.path) as source, new_folder(out.absolute()) as fresh:
        work = _Work(source, patches, None)
        with (fresh / "model.safetensors").open("wb") as draft:
            draft.write(_plain_header(infos))
            for info in infos:
                work.tensor(info, draft)
        state = work.check()
        for path in beside:
            shutil.copyfile(path, fresh / path.name)
    return Applied(out, patches[-1].info.step, state, 1, work.entries)


def _plain_header(infos: list[TensorInfo]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place = 0
    for info in infos:
        end = place + info.nbytes
        header[info.name] = {"dtype": info.stored, "shape": list(info.shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
