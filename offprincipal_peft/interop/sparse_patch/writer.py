"""Writing one patch, so that it appears whole or not at all."""

from __future__ import annotations

import json
import math
import os
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
import torch
import xxhash
from torch import Tensor

from ...audit.headers import STORED_NAMES, CheckpointError, read_metadata
from .content import HEX, bytes_of
from .file import FORMAT, VERSION, Kind, PatchError, PatchFile, PatchInfo, file_digest, positions_dtype

_SPOOLED = 16 << 20  # bytes of the positions, and of the values, that stay in memory


class PatchWriter:
    """Writes one patch. Entries come tensor by tensor and part by part; the file appears whole, at :meth:`finish`.

    A "full" patch, whose sizes are known before, is written where it will lie; others wait in memory, or beside it
    where they are long, until their header is known. Use as a context manager: what was not finished leaves no trace.

    Args:
        step, base_step: numbers of the two states; ``base_step`` None for a full anchor.
        total: entries of the whole state.
        indices_of: of a "values" patch, the digest of the patch with the positions.
        whole: of a "full" patch, shape and dtype of each tensor in the order in which they will come.

    Raises :class:`PatchError` for a target in the way.
    """

    def __init__(
        self,
        path: str | Path,
        kind: Kind,
        *,
        step: int,
        base_step: int | None,
        total: int,
        indices_of: str | None = None,
        whole: Mapping[str, tuple[tuple[int, ...], torch.dtype]] | None = None,
        overwrite: bool = False,
    ) -> None:
        self.path, self.kind = Path(path), kind
        if self.path.suffix != ".safetensors":
            raise PatchError(f"{self.path}: a patch is a safetensors file; give a name that ends with .safetensors.")
        if self.path.is_dir() or (self.path.exists() and not overwrite):
            raise PatchError(f"{self.path} exists; give another name, or overwrite=True (--overwrite).")
        if self.path.exists() and not is_patch(self.path):
            raise PatchError(f"{self.path} exists and is no patch; only a patch is overwritten. Give another name.")
        folder = self.path.absolute().parent
        if not folder.is_dir():
            raise PatchError(f"{self.path}: there is no folder {folder}.")
        self._metadata = {
            "format": "pt",  # what loaders of a full patch ask for
            "patch": FORMAT,
            "version": VERSION,
            "kind": kind,
            "step": str(step),
            "base_step": "" if base_step is None else str(base_step),
            "base": "" if kind == "full" else "0" * HEX,
            "result": "0" * HEX,
            "digest": "0" * HEX,
            "indices_of": indices_of or "",
            "total": str(total),
        }
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._counts: dict[str, int] = {}
        self._draft = self.path.with_name(f".{self.path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
        self._data = xxhash.xxh3_128()
        self._file: IO[bytes] | None = None
        self._indices, self._values = _spool(folder), _spool(folder)
        if whole is not None:
            for name, (shape, dtype) in whole.items():
                self._shapes[name], self._dtypes[name], self._counts[name] = tuple(shape), dtype, math.prod(shape)
            self._file = self._draft.open("wb")
            self._file.write(self._header())

    def add(
        self, name: str, shape: tuple[int, ...], positions: Tensor | None, values: Tensor, *, start: int = 0
    ) -> None:
        """Some more entries of ``name``, after those before: ``positions`` (c,) from ``start`` on, ``values`` (c,)."""
        values = values.contiguous()  # a name of its own: the bytes are those of living tensors
        if self._file is not None:
            self._put(bytes_of(values))
            return
        if name not in self._shapes:
            self._shapes[name], self._dtypes[name], self._counts[name] = tuple(shape), values.dtype, 0
        elif name != next(reversed(self._shapes)):
            raise ValueError(f"{name} was finished before; entries come tensor by tensor")
        self._counts[name] += values.numel()
        if self.kind == "sparse":
            assert positions is not None and len(positions) == len(values)
            wide = positions_dtype(shape) == torch.int64
            absolute: Any = positions.numpy().astype(np.int64 if wide else np.int32)
            absolute += start
            self._indices.write(absolute.data)
        self._values.write(bytes_of(values))

    def finish(self, *, base: str | None, result: str) -> PatchInfo:
        """Write the file under its name, at once. A patch without entries is a patch too."""
        self._metadata |= {"base": base or "", "result": result}
        header = self._header()
        if self._file is None:
            self._file = self._draft.open("wb")
            self._file.write(header)
            for spool in (self._indices, self._values):
                spool.seek(0)
                while part := spool.read(1 << 22):
                    self._put(part)
        self._metadata["digest"] = file_digest(header, self._data)
        self._file.seek(0)
        self._file.write(self._header())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._draft, self.path)
        sync_folder(self.path.absolute().parent)
        with PatchFile(self.path) as written:
            return written.info

    def _put(self, part: bytes | memoryview) -> None:
        assert self._file is not None
        self._data.update(part)
        self._file.write(part)

    def _header(self) -> bytes:
        """As the file begins, with the hashes as they are now: they do not change its length."""
        shapes = json.dumps([list(shape) for _, shape in sorted(self._shapes.items())], separators=(",", ":"))
        header = {"__metadata__": {**self._metadata, "shapes": shapes}, **dict(self._places())}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def _places(self) -> Iterator[tuple[str, dict[str, Any]]]:
        place = 0
        for what in ("indices", "values") if self.kind == "sparse" else ("values",):
            for name, shape in self._shapes.items():
                kind = positions_dtype(shape) if what == "indices" else self._dtypes[name]
                count = self._counts[name]
                end = place + count * kind.itemsize
                size = list(shape) if self.kind == "full" else [count]
                entry = {"dtype": STORED_NAMES[kind], "shape": size, "data_offsets": [place, end]}
                yield (name if self.kind == "full" else f"{name}.{what}"), entry
                place = end

    def close(self) -> None:
        """Give up what was not finished."""
        for file in (self._indices, self._values, self._file):
            if file is not None:
                file.close()
        self._draft.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _spool(folder: Path) -> IO[bytes]:
    return tempfile.SpooledTemporaryFile(max_size=_SPOOLED, dir=str(folder))


def is_patch(path: Path) -> bool:
    """Whether a file says that it is a patch; a damaged one may still say so."""
    try:
        return read_metadata(path).get("patch") == FORMAT
    except CheckpointError:
        return False


@contextmanager
def told(path: str | Path) -> Iterator[None]:
    """A full disk, a missing permission and the like as :class:`PatchError`: what was written, and why it was not."""
    try:
        yield
    except OSError as error:
        raise PatchError(f"writing {path} failed: {error}. What was there is as it was.") from error


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` last; nothing where the system or its disk cannot do that with folders."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
