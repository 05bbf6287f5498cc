"""Checkpoints that are read tensor by tensor, or a few rows at a time: models larger than memory.

Opening reads headers only. Weights are copied by plain reads into memory of their own and not mapped: both run at the
same speed out of the page cache, but a mapping counts every page that was touched as resident (300 MB of a 300 MB
file) until it is closed or memory runs short, and a file that shrinks under a mapping ends the process.

Nothing here unpickles, and nothing needs transformers: a checkpoint is its safetensors files and its config.json.
"""

from __future__ import annotations

import ctypes
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import MappingProxyType, TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from .headers import CheckpointError, TensorInfo, read_header, read_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_CONVERT = (
    "a pickle can run any code when it is opened and is never read here; convert it where you trust it, by loading the "
    "model with transformers and save_pretrained(new_folder), and give the new folder"
)


class AdapterFolder(CheckpointError):
    """A saved PEFT adapter where whole weights are needed. A caller that can merge it catches this.

    Attributes:
        path: the adapter's folder.
        base: the ``base_model_name_or_path`` of its config, or None.
    """

    def __init__(self, path: Path) -> None:
        config = path / ADAPTER_CONFIG
        base = read_json(config).get("base_model_name_or_path") if config.is_file() else None
        self.path = path
        self.base: str | None = base if isinstance(base, str) else None
        of = f" of {self.base}" if self.base else ""
        super().__init__(
            f"{path} holds a PEFT adapter{of}: factors or entries, not the weights that they change. Give it after its "
            "base on the command line (offprincipal audit BASE ADAPTER), or in Python what "
            "offprincipal_peft.interop.audit_source.open_adapter(folder, base) returns."
        )


@dataclass(frozen=True)
class ModelConfig:
    """What config.json says of a model; None where it says nothing (the model class then has its own default)."""

    model_type: str | None = None
    tie_word_embeddings: bool | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    quantization_config: dict[str, Any] | None = None

    @property
    def quantized_by(self) -> str | None:
        """The quantisation method's name, ``"unknown"`` for a config without one; None for a plain model."""
        if self.quantization_config is None:
            return None
        return str(self.quantization_config.get("quant_method", "unknown"))


class Checkpoint:
    """Named tensors in one or more safetensors files. Open with :func:`open_checkpoint`; a context manager.

    At most one file is open at a time. Not for several threads at once.

    Attributes:
        path: as given to :func:`open_checkpoint`.
        tensors: read-only mapping of name to :class:`TensorInfo`, in the order of the files' names and bytes.
        config: of config.json, every field None where there is none.
    """

    def __init__(self, path: Path, tensors: Mapping[str, TensorInfo], config: ModelConfig) -> None:
        self.path = path
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(dict(tensors))
        self.config = config
        self._file: FileIO | None = None
        self._closed = False

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def read(self, name: str) -> Tensor:
        """The whole tensor, in memory of its own."""
        info = self._readable(name)
        return self._read(info, 0, info.numel).view(info.shape)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:  # -> (stop - start, *shape[1:])
        """Entries ``start`` to ``stop`` of the first axis, in memory of their own; nothing else is read.

        Raises :class:`CheckpointError` for a range that is not within the axis and for a scalar, which has no rows.
        """
        info = self._readable(name)
        if not info.shape:
            raise CheckpointError(f"{name!r} in {info.file} is a scalar and has no rows; read it whole.")
        if not 0 <= start <= stop <= info.shape[0]:
            raise CheckpointError(
                f"rows {start} to {stop} of {name!r} in {info.file}: 0 <= start <= stop <= {info.shape[0]} is needed."
            )
        row = math.prod(info.shape[1:])
        return self._read(info, start * row, stop * row).view(stop - start, *info.shape[1:])

    def read_entries(
        self, name: str, start: int, stop: int, *, into: Tensor | None = None
    ) -> Tensor:  # -> (stop - start,)
        """Entries ``start`` to ``stop`` in flat, row-major order: bounded memory however long a row is.

        ``into``: a contiguous CPU tensor of the stored dtype, whose first entries are overwritten and returned. A
        buffer that is used again saves the system from clearing fresh pages, which costs more than reading does.
        """
        info = self._readable(name)
        if not 0 <= start <= stop <= info.numel:
            raise CheckpointError(
                f"entries {start} to {stop} of {name!r} in {info.file}: 0 <= start <= stop <= {info.numel} is needed."
            )
        return self._read(info, start, stop, into)

    def twin(self) -> Checkpoint | None:
        """The same files opened once more, for another thread; None where reading is more than reading files."""
        return Checkpoint(self.path, self.tensors, self.config) if type(self) is Checkpoint else None

    def close(self) -> None:
        """Close the open file, if any; reading raises from then on."""
        self._closed = True
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, {len(self.tensors)} tensors, {self.nbytes} bytes)"

    def _readable(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            near = difflib.get_close_matches(name, self.tensors, 3, 0.0)
            raise CheckpointError(f"{self.path} holds no tensor {name!r}; the nearest names are {', '.join(near)}.")
        info = self.tensors[name]
        if info.dtype is None:
            raise CheckpointError(f"{name!r} in {info.file} is stored as {info.stored}, which torch cannot hold.")
        return info

    def _read(self, info: TensorInfo, start: int, stop: int, into: Tensor | None = None) -> Tensor:
        assert info.dtype is not None
        if into is None:
            into = torch.empty(stop - start, dtype=info.dtype)
        elif into.dtype != info.dtype or into.numel() < stop - start or not into.is_contiguous() or into.is_cuda:
            raise ValueError(
                f"into: {stop - start} entries of {info.dtype} in CPU memory are needed, got {into.dtype} "
                f"{tuple(into.shape)} on {into.device}"
            )
        result = into[: stop - start]
        nbytes = (stop - start) * info.dtype.itemsize
        if not nbytes:
            return result
        # A view of the tensor's memory, which numpy could not give of bf16; it does not outlive `result`.
        target = memoryview((ctypes.c_ubyte * nbytes).from_address(result.data_ptr())).cast("B")
        file = self._open(info.file)
        file.seek(info.offset + start * info.dtype.itemsize)
        done = 0
        while done < nbytes:  # one call returns at most 2 GiB
            count = file.readinto(target[done:])
            if not count:
                raise CheckpointError(
                    f"{info.file} ended after {done} of {nbytes} bytes of {info.name!r}: it became shorter since it "
                    "was opened. Audit a copy that nothing writes to."
                )
            done += count
        return result

    def _open(self, path: Path) -> FileIO:
        if self._closed:
            raise CheckpointError(f"{self.path} was closed; open it again.")
        if self._file is None or self._file.name != str(path):
            if self._file is not None:
                self._file.close()
            self._file = FileIO(str(path))
        return self._file


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a model's weights without reading them.

    ``path``: a Hugging Face folder (``model.safetensors``, or ``model.safetensors.index.json`` and its shards), a
    folder with exactly one safetensors file or index, one ``.safetensors`` file, or one index. ``config.json`` is read
    where it lies beside the weights. A shard may hold tensors that the index does not name; they are listed too.

    Raises:
        AdapterFolder: a saved PEFT adapter.
        CheckpointError: nothing to read, several candidates, a pickle or GGUF file, a damaged or missing file, a
            tensor in two shards, an index that names tensors which no shard holds.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a model's folder or a .safetensors file.")
    source = _source_in(path) if path.is_dir() else path
    _refuse_foreign(source)
    tensors = _read_index(source) if source.name.endswith(".json") else read_header(source)
    if not tensors:
        raise CheckpointError(f"{source} holds no tensors.")
    return Checkpoint(path, tensors, _read_config(source.parent / "config.json"))


def _source_in(folder: Path) -> Path:
    """The one safetensors file or index that holds the folder's weights."""
    if (folder / ADAPTER_CONFIG).is_file():
        raise AdapterFolder(folder)
    whole, index = folder / WEIGHTS, folder / INDEX
    if whole.is_file() and index.is_file() and set(_weight_map(index).values()) != {WEIGHTS}:
        raise CheckpointError(f"{folder} holds both {WEIGHTS} and {INDEX} with other shards; give the one you mean.")
    for known in (index, whole):
        if known.is_file():
            return known
    for pattern, what in (("*.safetensors.index.json", "indexes"), ("*.safetensors", "safetensors files")):
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(file.name for file in found[:3])
            raise CheckpointError(
                f"{folder} holds {len(found)} {what} ({names}{', …' if len(found) > 3 else ''}) and neither {WEIGHTS} "
                f"nor {INDEX}; give the one you mean, or the missing index."
            )
    foreign = [file for file in sorted(folder.iterdir()) if file.suffix.lower() in (*_PICKLES, ".gguf")]
    # Optimiser states and arguments are pickles too: the weights' usual names come first.
    for file in sorted(foreign, key=lambda file: not file.name.startswith(("pytorch_model", "model"))):
        _refuse_foreign(file)
    raise CheckpointError(f"{folder} holds no safetensors file; give a folder with {WEIGHTS} or {INDEX}.")


def _refuse_foreign(path: Path) -> None:
    """Raise for a file that is no safetensors file or index by its name."""
    name = path.name.lower()
    if name == ADAPTER_WEIGHTS:
        raise AdapterFolder(path.parent)
    if name.endswith(_PICKLES) or name.endswith((".bin.index.json", ".pt.index.json")):
        raise CheckpointError(f"{path}: {_CONVERT}.")
    if name.endswith(".gguf"):
        raise CheckpointError(
            f"{path}: GGUF files hold mostly quantised blocks and are not read; give the safetensors folder that it "
            "was made from, or convert it back to one."
        )
    if not name.endswith((".safetensors", ".safetensors.index.json")):
        raise CheckpointError(f"{path} is neither a .safetensors file nor an index (.safetensors.index.json).")


def _weight_map(index: Path) -> dict[str, str]:
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise CheckpointError(f"{index} has no weight_map with entries; it needs one of tensor names to shard names.")
    for name, shard in found.items():
        # Also when it runs on another system: an index that leaves its folder is no checkpoint's.
        if (
            not isinstance(shard, str)
            or not shard
            or any(kind(shard).is_absolute() or ".." in kind(shard).parts for kind in (PurePosixPath, PureWindowsPath))
        ):
            raise CheckpointError(
                f"{index} puts {name!r} into {shard!r}; a shard is the name of a file in the index's own folder."
            )
    return found


def _read_index(index: Path) -> dict[str, TensorInfo]:
    """The tensors of every shard that ``index`` names."""
    places = _weight_map(index)
    shards = sorted(set(places.values()))
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise CheckpointError(
            f"{index} names {len(shards)} shards and {len(missing)} of them are not in its folder: "
            f"{_some(missing)}. Copy them there."
        )
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        for name, info in read_header(index.parent / shard).items():
            if name in tensors:
                raise CheckpointError(
                    f"{index}: {name!r} is in {tensors[name].file.name} and in {shard}; it must be in one of them."
                )
            tensors[name] = info
    absent = [name for name in places if name not in tensors]
    if absent:
        raise CheckpointError(
            f"{index} names {len(absent)} tensors that no shard holds: {_some(absent)}. The index and the shards "
            "are of different checkpoints, or the index is out of date."
        )
    return tensors


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _read_config(path: Path) -> ModelConfig:
    """The fields of config.json, each of the top level or else of its ``text_config``; None for another type."""
    if not path.is_file():
        return ModelConfig()
    top = read_json(path)
    text = top.get("text_config")

    def find(key: str, kind: type) -> Any:
        for values in (top, text if isinstance(text, dict) else {}):
            if type(values.get(key)) is kind:
                return values[key]
        return None

    return ModelConfig(
        model_type=find("model_type", str),
        tie_word_embeddings=find("tie_word_embeddings", bool),
        num_attention_heads=find("num_attention_heads", int),
        num_key_value_heads=find("num_key_value_heads", int),
        head_dim=find("head_dim", int),
        quantization_config=find("quantization_config", dict),
    )
