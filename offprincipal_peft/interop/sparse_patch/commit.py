"""The last step of an in-place change: new files beside the old, and one rename that makes them the checkpoint.

A single weights file is replaced by a rename. Shards get new names, and the index that names them is replaced; until
then every reader sees the old ones. A journal says which files the index no longer needs, so that what a killed process
left is removed by the next one.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from ...audit.headers import CheckpointError, read_json
from .file import PatchError
from .writer import sync_folder

JOURNAL = ".offprincipal-patch.json"
_DRAFT = ".patching"


class Target:
    """A checkpoint that may be changed in place: a folder, or one weights file."""

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser()
        self.folder = self.path if self.path.is_dir() else self.path.absolute().parent

    @property
    def index(self) -> Path | None:
        """The index of a sharded checkpoint."""
        if not self.path.is_dir():
            return self.path if self.path.name.endswith(".json") else None
        found = sorted(self.path.glob("*.safetensors.index.json"))
        return found[0] if found else None

    def recover(self) -> None:
        """Remove what a killed process left: files that the index does not name, as its journal says."""
        journal = self.folder / JOURNAL
        if not journal.is_file():
            return
        try:
            names = [name for name in read_json(journal).get("files", []) if isinstance(name, str)]
            kept = set(_weight_map(self.index).values()) if self.index is not None else set(names)
        except CheckpointError as error:
            raise PatchError(f"{error} It was left by an interrupted change of {self.path}; remove it.") from error
        for name in names:
            if name not in kept and Path(name).name == name:
                (self.folder / name).unlink(missing_ok=True)
        journal.unlink()

    @contextmanager
    def drafts(self) -> Iterator[Drafts]:
        """Files in the making, removed where they are not committed."""
        drafts = Drafts(self)
        try:
            yield drafts
        finally:
            drafts.close()


class Drafts:
    """The new weights files of one change."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._files: dict[Path, tuple[Path, IO[bytes]]] = {}  # the file to replace -> its draft

    def open(self, path: Path) -> IO[bytes]:
        """The draft that will take the place of ``path``. Raises :class:`PatchError` where another process has it."""
        draft = path.with_name(f".{path.name}{_DRAFT}")
        handle = os.open(draft, os.O_RDWR | os.O_CREAT, 0o666)
        _lock(handle, path)
        os.ftruncate(handle, 0)
        file = os.fdopen(handle, "wb")
        self._files[path] = draft, file
        return file

    def commit(self, state: str) -> int:
        """Make the drafts the checkpoint; how many there were."""
        for path, (draft, file) in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            if path.exists():
                os.chmod(draft, path.stat().st_mode & 0o777)
        count = len(self._files)
        index = self.target.index
        if index is None or (not self.target.path.is_dir() and not self.target.path.name.endswith(".json")):
            for path, (draft, _) in self._files.items():
                os.replace(draft, path)
        elif count:
            self._commit_shards(index, state)
        sync_folder(self.target.folder)
        return count

    def _commit_shards(self, index: Path, state: str) -> None:
        values = read_json(index)
        renamed = {path.name: _fresh_name(path, state) for path in self._files}
        values["weight_map"] = {name: renamed.get(shard, shard) for name, shard in values["weight_map"].items()}
        journal = self.target.folder / JOURNAL
        _write(journal, {"files": [*renamed, *renamed.values()]})
        for path, (draft, _) in self._files.items():
            os.replace(draft, path.with_name(renamed[path.name]))
        draft_index = index.with_name(f".{index.name}{_DRAFT}")
        _write(draft_index, values)
        os.replace(draft_index, index)  # from here on it is the new state
        sync_folder(self.target.folder)
        for path in self._files:
            path.unlink(missing_ok=True)
        journal.unlink()

    def close(self) -> None:
        for draft, file in self._files.values():
            file.close()
            with suppress(FileNotFoundError):
                draft.unlink()


def _fresh_name(path: Path, state: str) -> str:
    """``model-00001-of-00002.safetensors`` -> ``model-00001-of-00002.1234abcd.safetensors``."""
    stem = re.sub(r"\.[0-9a-f]{8}$", "", path.name.removesuffix(".safetensors"))
    return f"{stem}.{state[:8]}.safetensors"


def _weight_map(index: Path) -> dict[str, str]:
    found = read_json(index).get("weight_map")
    return found if isinstance(found, dict) else {}


def _write(path: Path, values: dict[str, object]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(values, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def _lock(handle: int, path: Path) -> None:
    """Held until the file is closed or the process ends, however it ends. Nothing where the system has no locks."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        raise PatchError(f"another process is changing {path}; wait until it is done.") from error
