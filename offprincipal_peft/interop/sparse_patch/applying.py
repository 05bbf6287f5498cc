"""Patches applied to a checkpoint on disk: streamed, checked on the way, and committed at once at the end."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from torch import Tensor

from ...audit.buffers import Buffers, ahead
from ...audit.checkpoints import WEIGHTS, Checkpoint, open_checkpoint
from ...audit.headers import TensorInfo, read_header
from ..folders import new_folder
from .commit import Drafts, Target
from .content import TensorHash, TensorMark, bits_of, bytes_of, state_hash
from .file import EntryReader, PatchError, PatchFile
from .states import Progress, blocks, mark, read
from .writer import is_patch, sync_folder, told

_WEIGHTS = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".gguf")


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
        out: a new folder (for a file: a new file) for the result, with copies of the files beside the weights, but of
            no other weights; by default the target is changed in place.

    Memory: some blocks of 2^20 entries, however many patches there are.

    Raises:
        PatchError: a patch that is damaged, does not follow the one before it, or was made for another state than the
            target's. The target is as it was.
        CheckpointError: a target that cannot be read.
    """
    if not patches:
        raise PatchError("give at least one patch to apply.")
    with told(target if out is None else out), ExitStack() as stack:
        run = linked([stack.enter_context(PatchFile(path)) for path in patches])
        if out is not None:
            before = stack.enter_context(open_checkpoint(target))
            _check_fit(run, before)
            return _elsewhere(before, _Work(before, run, progress), Path(out))
        place = Target(Path(target))
        if not place.path.exists():
            open_checkpoint(target)  # which says so
        # Opened only when this process is alone with it: the files of another's change come and go.
        drafts = stack.enter_context(place.changing())
        before = stack.enter_context(open_checkpoint(target))
        _check_fit(run, before)
        return _in_place(drafts, _Work(before, run, progress))


class Positions:
    """The patches that "values" patches take their positions from: among those given, or files beside them.

    Each file is read whole once, each folder is looked through once.
    """

    def __init__(self) -> None:
        self._known: dict[str, PatchFile] = {}
        self._folders: set[Path] = set()
        self._checked: set[Path] = set()  # not digests: a damaged copy states the same one

    def add(self, patch: PatchFile) -> None:
        """Check a patch whole. Raises :class:`PatchError` where it is damaged."""
        if patch.info.path not in self._checked:
            patch.check_digest()
            self._checked.add(patch.info.path)
        self._known[patch.info.digest] = patch

    def of(self, patch: PatchFile) -> PatchFile:
        """The patch with the positions of ``patch``. Raises :class:`PatchError` where there is none."""
        wanted = patch.info.indices_of
        assert wanted is not None
        if wanted not in self._known:
            self._look(patch.info.path.absolute().parent)
        if wanted not in self._known:
            raise PatchError(
                f"{patch.info.path} holds values alone; the patch with digest {wanted}, which holds their positions, "
                "is neither given nor in its folder."
            )
        self.add(self._known[wanted])
        return self._known[wanted]

    def _look(self, folder: Path) -> None:
        if folder in self._folders:
            return
        self._folders.add(folder)
        for path in sorted(folder.glob("*.safetensors")):
            with suppress(PatchError, FileNotFoundError):  # other files, and those that went away meanwhile
                other = PatchFile(path)
                self._known.setdefault(other.info.digest, other)


def linked(patches: Sequence[PatchFile], known: Positions | None = None) -> list[PatchFile]:
    """The patches that count, from the last full one on: each checked, each following the one before it."""
    known = Positions() if known is None else known
    for before, after in itertools.pairwise(patches):
        if after.info.kind != "full" and after.info.base != before.info.result:
            assert after.info.base_step is not None
            gap = after.info.base_step - before.info.step
            why = ": a patch between them is missing" if gap > 0 else ": wrong order" if gap < 0 else ""
            raise PatchError(
                f"{after.info.path} goes from step {after.info.base_step} to {after.info.step} and does not follow "
                f"{before.info.path}, which ends at step {before.info.step}{why} (state {before.info.result}, needed "
                f"{after.info.base})."
            )
    for patch in patches:
        known.add(patch)
    for patch in patches:
        if patch.info.kind == "values":
            patch.positions_from(known.of(patch))
    first = max((i for i, patch in enumerate(patches) if patch.info.kind == "full"), default=0)
    return list(patches[first:])


def _check_fit(patches: Sequence[PatchFile], target: Checkpoint) -> None:
    for file in {info.file for info in target.tensors.values()}:
        if is_patch(file):
            raise PatchError(
                f"{target.path} is a patch and not a checkpoint to change; write one with `offprincipal patch restore`."
            )
    entries = sum(info.numel for info in target.tensors.values())
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
        if patch.info.total != entries:
            raise PatchError(
                f"{patch.info.path} was made for a model of {patch.info.total:,} entries; {target.path} has "
                f"{entries:,}. It was made for another checkpoint."
            )
        if patch.info.kind == "full" and len(patch.info.shapes) != len(target.tensors):
            raise PatchError(f"{patch.info.path} lacks tensors that {target.path} holds.")


class _Work:
    """One pass over the target: its tensors in the new state, and both states' hashes."""

    def __init__(self, target: Checkpoint, patches: Sequence[PatchFile], progress: Progress | None) -> None:
        self.target, self.patches, self.progress = target, patches, progress
        self.marks: tuple[dict[str, TensorMark], dict[str, TensorMark]] = ({}, {})
        self.buffers, self.done, self.entries = Buffers(2), 0, 0
        self.touched = {name for patch in patches for name in patch.info.shapes}

    def tensor(self, info: TensorInfo, file: IO[bytes] | None) -> None:
        """Read one tensor, apply every patch, write it to ``file``."""
        full = self.patches[0] if self.patches[0].info.kind == "full" else None
        chosen = [patch for patch in self.patches if patch is not full and info.name in patch.info.shapes]
        readers = [patch.entries(info.name, sharing=len(chosen)) for patch in chosen]
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
            if at is last:
                why = f"it is at step {at.step} already, where they lead"
            elif at is not None:
                why = f"it is at step {at.step} already; give the later patches alone"
            else:
                why = (
                    f"its state is {before} and the patch from step {first.base_step} needs {first.base}: another "
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
    count, bits = 0, bits_of(part).numpy()
    for reader in readers:
        positions, values = reader.take(stop)
        if len(positions):
            bits[positions.numpy() - start] = bits_of(values).numpy()
            count += len(positions)
    return count


def _by_file(target: Checkpoint) -> dict[Path, list[TensorInfo]]:
    """The tensors of each weights file in the order of their bytes."""
    found: dict[Path, list[TensorInfo]] = {}
    for info in target.tensors.values():  # which are in that order
        found.setdefault(info.file, []).append(info)
    return found


def _rewrite(source: Path, draft: IO[bytes], infos: list[TensorInfo], work: _Work) -> None:
    """The same file with the new values: its header stays as it is, to the byte."""
    with source.open("rb") as file:
        draft.write(file.read(infos[0].offset))
    for info in infos:
        work.tensor(info, draft)


def _in_place(drafts: Drafts, work: _Work) -> Applied:
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
    files = _by_file(target)
    source = Target(target.path)
    single = not source.path.is_dir() and source.index is None
    if out.exists():
        raise PatchError(f"{out} exists; give the name of a new {'file' if single else 'folder'}.")
    if single:
        if out.suffix != ".safetensors":
            raise PatchError(f"{out}: a weights file's name ends with .safetensors.")
        if not out.absolute().parent.is_dir():
            raise PatchError(f"{out}: there is no folder {out.absolute().parent}.")
        with Target(out).changing() as drafts:
            for file, infos in files.items():
                _rewrite(file, drafts.open(out), infos, work)
            state = work.check()
            drafts.commit(state)
    else:
        folder = next(iter(files)).parent if source.index is None else source.index.parent
        with new_folder(out.absolute()) as fresh:
            for file, infos in files.items():
                copy = fresh / file.relative_to(folder)
                copy.parent.mkdir(parents=True, exist_ok=True)
                with copy.open("wb") as draft:
                    _rewrite(file, draft, infos, work)
                    _sync(draft)
            state = work.check()
            for other in folder.iterdir():
                # Other weights are of the state before, in other files or formats.
                if other == source.index or (other.is_file() and not _hidden_or_weights(other)):
                    shutil.copyfile(other, fresh / other.name)
            sync_folder(fresh)
    return Applied(out, work.patches[-1].info.step, state, len(files), work.entries)


def _hidden_or_weights(path: Path) -> bool:
    return path.name.startswith(".") or path.name.endswith(_WEIGHTS)


def write_checkpoint(
    patches: Sequence[PatchFile], out: Path, beside: Iterator[Path], progress: Progress | None = None
) -> Applied:
    """A new folder from a full patch and those that follow it, with copies of the files ``beside``."""
    anchor = patches[0].info
    if anchor.kind != "full":
        raise PatchError(f"{anchor.path} is a {anchor.kind} patch; a checkpoint begins with a full one.")
    if out.exists():
        raise PatchError(f"{out} exists; give the name of a new folder.")
    infos = list(read_header(anchor.path).values())
    with open_checkpoint(anchor.path) as source, new_folder(out.absolute()) as fresh:
        work = _Work(source, patches, progress)
        with (fresh / WEIGHTS).open("wb") as draft:
            draft.write(_plain_header(infos))
            for info in infos:
                work.tensor(info, draft)
            _sync(draft)
        state = work.check()
        for path in beside:
            shutil.copyfile(path, fresh / path.name)
        sync_folder(fresh)
    return Applied(out, patches[-1].info.step, state, 1, work.entries)


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


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
