"""One sparse patch: the entries of a model's weights that differ between two states, as a safetensors file.

For each changed tensor the file holds ``<name>.indices``, the flat, row-major positions in ascending order (int32;
int64 for a tensor of more than 2^31 entries), and ``<name>.values``, the new values themselves in the checkpoint's
dtype. Names, shapes and dtypes are those of the checkpoint: what vLLM's sparse checkpoint loader takes. Applying a
patch twice is applying it once.

Three kinds. "sparse" has both. "values" has values alone, for the positions of the patch whose digest ``indices_of``
names: a method that trains a fixed mask sends its positions once. "full" has whole tensors under their own names: an
anchor, from which a chain can be restored.

The metadata name the states by their content (:mod:`.content`): ``base`` before and ``result`` after, each over
*all* tensors of the model. ``digest`` is over the whole file with itself taken as zeros, so that one flipped bit
anywhere is found.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, Self

import numpy as np
import torch
import xxhash
from torch import Tensor

from ...audit.headers import CheckpointError, TensorInfo, read_header, read_metadata
from .content import HEX, bytes_of

FORMAT, VERSION = "offprincipal-sparse-patch", "1"
Kind = Literal["sparse", "values", "full"]
WIDE = 2**31  # entries above which positions need int64
BLOCK = 1 << 20  # entries that are worked on at once
_MANY = 64  # readers at once from which on no file stays open between two reads
_LEAST = 1 << 12  # entries that a reader takes at once, however many there are
_KEYS = ("version", "kind", "step", "base_step", "base", "result", "digest", "indices_of", "total", "shapes")


class PatchError(ValueError):
    """A patch, a chain or a target that does not fit; the message says which, why, and what would be right."""


@dataclass(frozen=True)
class PatchInfo:
    """What a patch says of itself.

    Attributes:
        step, base_step: numbers of the two states; ``base_step`` is None for a full anchor.
        base, result: content hashes of the whole state before and after; ``base`` is None for a full anchor.
        digest: of the file. ``indices_of``: of the patch that holds the positions of a "values" patch.
        total: entries of the whole state. ``shapes``: of the tensors with entries, by name.
        entries: how many each of them has here.
        nbytes: of the file.
    """

    path: Path
    kind: Kind
    step: int
    base_step: int | None
    base: str | None
    result: str
    digest: str
    indices_of: str | None
    total: int
    shapes: dict[str, tuple[int, ...]]
    entries: dict[str, int]
    nbytes: int

    @property
    def count(self) -> int:
        """Entries in all tensors."""
        return sum(self.entries.values())

    @property
    def density(self) -> float:
        """Entries in the patch over entries in the state."""
        return self.count / self.total if self.total else 0.0


# ---- reading


class PatchFile:
    """An open patch. Reading checks what it reads; :meth:`check_digest` reads the whole file once."""

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        if not path.is_file():
            raise PatchError(f"{path} is no file; give a patch that `offprincipal patch make` wrote.")
        try:
            metadata = read_metadata(path)
            self._tensors = read_header(path)
        except CheckpointError as error:
            raise PatchError(f"{error}") from error
        if metadata.get("patch") != FORMAT:
            raise PatchError(f"{path} is a safetensors file but no patch: its metadata do not say {FORMAT!r}.")
        self.info = _info(path, metadata, self._tensors)
        self._positions: PatchFile | None = None
        self._file: IO[bytes] | None = None

    @property
    def names(self) -> list[str]:
        """Of the tensors with entries."""
        return list(self.info.shapes)

    def stored(self, name: str) -> str:
        """The dtype's name in the file: "BF16"."""
        return self._tensors[self._key(name)].stored

    def check_digest(self) -> None:
        """Read the whole file. Raises :class:`PatchError` where a byte is not what was written."""
        with self.info.path.open("rb") as file:
            start = file.read(8)
            header = file.read(int.from_bytes(start, "little"))
            data = xxhash.xxh3_128()
            while part := file.read(1 << 22):
                data.update(part)
        zeroed = header.replace(self.info.digest.encode(), b"0" * HEX, 1)
        if file_digest(start + zeroed, data) != self.info.digest:
            raise PatchError(
                f"{self.info.path} is damaged: its bytes do not have the digest {self.info.digest} that it states. "
                "Copy or make it again; nothing was applied."
            )

    def positions_from(self, other: PatchFile) -> None:
        """Take the positions of a "values" patch from the patch that holds them."""
        if other.info.digest != self.info.indices_of or other.info.kind != "sparse":
            raise PatchError(
                f"{self.info.path} needs the positions of the sparse patch with digest {self.info.indices_of}; "
                f"{other.info.path} is {other.info.kind} and has {other.info.digest}."
            )
        for name, count in self.info.entries.items():
            if other.info.entries.get(name) != count:
                raise PatchError(f"{self.info.path}: {name} has {count} values and not the entries of its positions.")
        self._positions = other

    def entries(self, name: str, *, sharing: int = 1) -> EntryReader:
        """The entries of one tensor, in order. ``sharing``: how many readers share the memory of one block."""
        info = self.info
        if info.kind == "values" and self._positions is None:
            raise PatchError(
                f"{info.path} holds values alone; the patch with digest {info.indices_of} holds their positions. Put "
                "it into the same folder or give it before this one."
            )
        return EntryReader(self, self._positions or self, name, sharing)

    def read(self, name: str, what: str, start: int, stop: int) -> Tensor:  # -> (stop - start,)
        """Some "values" or "indices" of a tensor, as they are stored."""
        info = self._tensors[self._key(name, what)]
        assert info.dtype is not None and 0 <= start <= stop <= info.numel
        found = torch.empty(stop - start, dtype=info.dtype)
        if len(found):
            file = self._open()
            file.seek(info.offset + start * found.itemsize)
            if file.readinto(bytes_of(found)) != found.nbytes:  # type: ignore[attr-defined]
                raise PatchError(f"{info.file} became shorter while it was read; copy it again.")
        return found

    def close(self) -> None:
        """Close the file. Reading opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._positions is not None:
            self._positions.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _open(self) -> IO[bytes]:
        if self._file is None:
            self._file = self.info.path.open("rb")
        return self._file

    def _key(self, name: str, what: str = "values") -> str:
        return name if self.info.kind == "full" else f"{name}.{what}"


class EntryReader:
    """The positions and values of one tensor, taken from the front: bounded memory however many there are."""

    def __init__(self, values: PatchFile, positions: PatchFile, name: str, sharing: int = 1) -> None:
        self._values, self._positions, self._name = values, positions, name
        self._count, self._done, self._last = values.info.entries[name], 0, -1
        self._size = math.prod(values.info.shapes[name])
        self._at_once, self._close = max(BLOCK // sharing, _LEAST), sharing > _MANY
        self._held: tuple[Tensor, Tensor] | None = None

    def take(self, stop: int) -> tuple[Tensor, Tensor]:  # -> ((c,) int64, (c,) in the checkpoint's dtype)
        """All entries at positions below ``stop`` that were not taken yet.

        Raises :class:`PatchError` for positions that do not ascend or are not in the tensor.
        """
        parts = []
        while True:
            if self._held is None:
                if self._done == self._count:
                    break
                self._held = self._next()
            positions, values = self._held
            cut = int(torch.searchsorted(positions, stop))
            if cut:
                parts.append((positions[:cut], values[:cut]))
            if cut < len(positions):
                self._held = positions[cut:], values[cut:]
                break
            self._held = None
        if not parts:
            return torch.empty(0, dtype=torch.int64), self._values.read(self._name, "values", 0, 0)
        if len(parts) == 1:
            return parts[0]
        return torch.cat([p for p, _ in parts]), torch.cat([v for _, v in parts])

    def _next(self) -> tuple[Tensor, Tensor]:
        stop = min(self._count, self._done + self._at_once)
        stored = self._positions.read(self._name, "indices", self._done, stop).numpy()
        values = self._values.read(self._name, "values", self._done, stop)
        if self._close:
            self._values.close()
        where = f"{self._positions.info.path}: the positions of {self._name}"
        if int(stored[0]) <= self._last or not bool((stored[1:] > stored[:-1]).all()):
            raise PatchError(f"{where} do not ascend; the file is damaged or was not written by this package.")
        self._last, self._done = int(stored[-1]), stop
        if self._last >= self._size:
            raise PatchError(f"{where} reach {self._last} and the tensor has {self._size} entries.")
        return torch.from_numpy(stored.astype(np.int64)), values


def _info(path: Path, metadata: dict[str, str], tensors: Mapping[str, TensorInfo]) -> PatchInfo:
    if metadata.get("version") != VERSION:
        raise PatchError(
            f"{path} has version {metadata.get('version')!r} of the patch format; this package reads {VERSION!r}. Use "
            "the version of the package that wrote it, or a later one."
        )
    try:
        missing = [key for key in _KEYS if key not in metadata]
        if missing:
            raise ValueError(f"its metadata lack {', '.join(missing)}")
        kind: Any = metadata["kind"]
        if kind not in ("sparse", "values", "full"):
            raise ValueError(f"its kind is {kind!r}; sparse, values or full is known")
        _check_states(kind, metadata)
        shapes = _shapes(kind, metadata["shapes"], tensors)
        return PatchInfo(
            path=path,
            kind=kind,
            step=int(metadata["step"]),
            base_step=int(metadata["base_step"]) if metadata["base_step"] else None,
            base=metadata["base"] or None,
            result=metadata["result"],
            digest=metadata["digest"],
            indices_of=metadata["indices_of"] or None,
            total=int(metadata["total"]),
            shapes=shapes,
            entries=_entries(kind, shapes, dict(tensors)),
            nbytes=path.stat().st_size,
        )
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise PatchError(f"{path} is damaged, or no patch of this package: {error}.") from error


def _check_states(kind: Kind, metadata: Mapping[str, str]) -> None:
    """Hashes and numbers that are there where the kind has them, and steps that go forward."""
    needed = {"result", "digest"} | ({"base", "base_step"} if kind != "full" else set())
    needed |= {"indices_of"} if kind == "values" else set()
    for key in ("base", "base_step", "result", "digest", "indices_of"):
        text = metadata[key]
        if bool(text) != (key in needed):
            raise ValueError(f"a {kind} patch {'needs' if not text else 'has no'} {key}")
        if text and key != "base_step" and (len(text) != HEX or set(text) - set("0123456789abcdef")):
            raise ValueError(f"its {key} {text!r} is no hash of {HEX} hex digits")
    for key in ("step", "base_step", "total"):
        if metadata[key] and not (metadata[key].isascii() and metadata[key].isdecimal()):
            raise ValueError(f"its {key} {metadata[key]!r} is no whole number")
    if metadata["base_step"] and int(metadata["step"]) <= int(metadata["base_step"]):
        raise ValueError(f"it goes from step {metadata['base_step']} to {metadata['step']}, which is not later")


def _shapes(kind: Kind, text: str, tensors: Mapping[str, TensorInfo]) -> dict[str, tuple[int, ...]]:
    """Of each tensor with entries. The metadata list them in the order of their names, which are in the keys."""
    keys = tensors if kind == "full" else [key.removesuffix(".values") for key in tensors if key.endswith(".values")]
    shapes = json.loads(text)
    if not isinstance(shapes, list) or len(shapes) != len(keys):
        raise ValueError(f"its metadata should list the shapes of {len(keys)} tensors")
    return {name: tuple(shape) for name, shape in zip(sorted(keys), shapes, strict=True)}


def _entries(kind: Kind, shapes: Mapping[str, tuple[int, ...]], tensors: dict[str, TensorInfo]) -> dict[str, int]:
    """How many entries each tensor has; the file must hold just what the metadata say."""
    entries = {}
    for name, shape in shapes.items():
        size = math.prod(shape)
        values = tensors.pop(name if kind == "full" else f"{name}.values", None)
        if kind == "full" and (values is None or values.shape != shape):
            raise ValueError(f"{name} should have the shape {shape}")
        if values is None or (kind != "full" and len(values.shape) != 1):
            raise ValueError(f"it has no 1-D {name}.values")
        if values.dtype is None:
            raise ValueError(f"{values.name} is stored as {values.stored}, which torch cannot hold")
        entries[name] = size if kind == "full" else values.numel
        if kind == "sparse":
            positions = tensors.pop(f"{name}.indices", None)
            wanted = positions_dtype(shape)
            if positions is None or positions.dtype != wanted or positions.shape != values.shape:
                raise ValueError(f"{name}.indices should be {wanted} of shape {values.shape}")
    if tensors:
        raise ValueError(f"it holds {next(iter(tensors))}, which its metadata do not name")
    return entries


def positions_dtype(shape: tuple[int, ...]) -> torch.dtype:
    return torch.int64 if math.prod(shape) > WIDE else torch.int32


def file_digest(header: bytes, data: Any) -> str:
    """Of the bytes before the data, the digest's own place as zeros, and of the data's running hash."""
    return xxhash.xxh3_128_hexdigest(data.digest() + header)
