"""The last step of an in-place change: new files beside the old, and one rename that makes them the checkpoint.

A single weights file is replaced by a rename. Shards get new names, and the index that names them is replaced; until
then every reader sees the old ones. A journal says which files belong to the change, so that those which the index does
not name are removed: at the end of the change, or by the next one where the process was killed.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from ...audit.checkpoints import INDEX, WEIGHTS
from ...audit.headers import CheckpointError, read_json
from .file import PatchError
from .writer import sync_folder

try:
    import fcntl
except ImportError:  # no locks on this system
    fcntl = None  # type: ignore[assignment]

JOURNAL = ".offprincipal-patch.json"
LOCK = ".offprincipal-patch.lock"
_DRAFT = ".patching"


class Target:
    """A checkpoint that is changed in place: a folder, an index, or one weights file (which may be a new one)."""

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser()
        self.folder = self.path if self.path.is_dir() else self.path.absolute().parent

    @property
    def index(self) -> Path | None:
        """The index of a sharded checkpoint: the one that :func:`~offprincipal_peft.audit.open_checkpoint` reads."""
        if not self.path.is_dir():
            return self.path if self.path.name.endswith(".json") else None
        if (self.path / INDEX).is_file() or (self.path / WEIGHTS).is_file():
            return self.path / INDEX if (self.path / INDEX).is_file() else None
        return next(iter(sorted(self.path.glob("*.safetensors.index.json"))), None)

    @contextmanager
    def changing(self) -> Iterator[Drafts]:
        """Alone with the folder: what a killed process left is removed before, and what is not needed any more after.

        Raises :class:`PatchError` where another process changes a checkpoint in the folder.
        """
        with _lock(self.folder):
            self._tidy()
            drafts = Drafts(self)
            try:
                yield drafts
            finally:
                drafts.close()
                # What does not work here is done by the next change: the checkpoint is whole, old or new.
                with suppress(OSError, PatchError):
                    self._tidy()

    def _tidy(self) -> None:
        """Remove drafts, and the files of the journal that its index does not name."""
        folders = {self.folder}
        journal = self.folder / JOURNAL
        if journal.is_file():
            try:
                values = read_json(journal)
                index = self.folder / str(values["index"])
                files = [index.parent / str(name) for name in values["files"]] if index.is_file() else []
                kept = {index.parent / shard for shard in _weight_map(index).values()} if files else set()
            except (CheckpointError, KeyError, TypeError) as error:
                raise PatchError(
                    f"{journal} was left by an interrupted change and cannot be used ({error!r}). Remove it; "
                    "safetensors files that the index does not name are not needed."
                ) from error
            for file in files:
                if file not in kept and ".." not in file.parts:
                    file.unlink(missing_ok=True)
            folders |= {file.parent for file in files}
        for folder in folders:
            for draft in folder.glob(f".*{_DRAFT}"):
                draft.unlink(missing_ok=True)
        journal.unlink(missing_ok=True)


class Drafts:
    """The new weights files of one change."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._files: dict[Path, tuple[Path, IO[bytes]]] = {}  # the file to replace -> its draft

    def open(self, path: Path) -> IO[bytes]:
        """The draft that will take the place of ``path``."""
        draft = path.with_name(f".{path.name}{_DRAFT}")
        file = draft.open("wb")
        self._files[path] = draft, file
        return file

    def commit(self, state: str) -> int:
        """Make the drafts the checkpoint, whose state is ``state``; how many there were."""
        for path, (draft, file) in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            if path.exists():
                with suppress(OSError):  # some file systems have no modes
                    os.chmod(draft, path.stat().st_mode & 0o777)
        index = self.target.index
        shards = {index.parent / shard for shard in _weight_map(index).values()} if index is not None else set()
        if index is not None and len(shards) > 1:
            if self._files:
                self._commit_shards(index, state)
        else:
            for path, (draft, _) in self._files.items():  # one at most
                os.replace(draft, path)
        sync_folder(self.target.folder)
        return len(self._files)

    def _commit_shards(self, index: Path, state: str) -> None:
        values = read_json(index)
        fresh: dict[Path, Path] = {}
        for path in self._files:
            fresh[path] = _fresh(path, state, set(fresh.values()))
        names = {path: path.relative_to(index.parent).as_posix() for path in (*fresh, *fresh.values())}
        values["weight_map"] = {
            name: names[fresh[index.parent / shard]] if index.parent / shard in fresh else shard
            for name, shard in values["weight_map"].items()
        }
        _write(self.target.folder / JOURNAL, {"index": index.name, "files": [*names.values()]})
        for path, (draft, _) in self._files.items():
            os.replace(draft, fresh[path])
        for folder in {path.parent for path in fresh}:
            sync_folder(folder)  # the shards' names must last before the index that names them
        _write(index, values)  # from here on it is the new state

    def close(self) -> None:
        for draft, file in self._files.values():
            with suppress(OSError):  # what could not be written to a full disk
                file.close()
            draft.unlink(missing_ok=True)


def _fresh(path: Path, state: str, taken: set[Path]) -> Path:
    """``model-00001-of-00002.safetensors`` -> ``model-00001-of-00002.1234abcd.safetensors``, a name that is free."""
    stem = re.sub(r"\.[0-9a-f]{8}$", "", path.name.removesuffix(".safetensors"))
    for more in itertools.count():
        tag = (int(state[:8], 16) + more) % 2**32
        found = path.with_name(f"{stem}.{tag:08x}.safetensors")
        if found not in taken and not os.path.lexists(found):
            return found
    raise AssertionError("unreachable")


def _weight_map(index: Path) -> dict[str, str]:
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise CheckpointError(f"{index} has no weight_map with entries; it needs one of tensor names to shard names.")
    return found


def _write(path: Path, values: dict[str, object]) -> None:
    """Write JSON so that ``path`` holds what it held before or all of it."""
    draft = path.with_name(f".{path.name}{_DRAFT}")
    with draft.open("w", encoding="utf-8") as file:
        json.dump(values, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    if path.exists():
        with suppress(OSError):
            os.chmod(draft, path.stat().st_mode & 0o777)
    os.replace(draft, path)
    sync_folder(path.parent)


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Held until the block or the process ends, however it ends. Nothing where the system or its disk has no locks."""
    if fcntl is None:
        yield
        return
    path = folder / LOCK
    handle = -1
    while handle < 0:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                os.close(handle)
                raise PatchError(
                    f"another process is changing a checkpoint in {folder}; wait until it is done. Nothing was changed."
                ) from error
        try:  # the file that is locked may be one that its last holder has removed since
            same = os.path.samestat(os.fstat(handle), os.stat(path))
        except FileNotFoundError:
            same = False
        if not same:
            os.close(handle)
            handle = -1
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        os.close(handle)
