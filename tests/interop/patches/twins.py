"""Patches by hand: whole tensors, compared and set byte by byte, files by safetensors itself. Slow and plain."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors.torch import load_file, save_file
from torch import Tensor

State = dict[str, Tensor]
DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "I64": torch.int64,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
LAYOUTS = ("file", "single", "sharded")


# -- states -----------------------------------------------------------------------------------------------------------


def draw(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> Tensor:
    """Random bytes: every NaN payload, both zeros and infinity can occur."""
    generator = torch.Generator().manual_seed(seed)
    size = math.prod(shape) * dtype.itemsize
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


def bytes_by_entry(tensor: Tensor) -> Tensor:  # -> (entries, bytes of one)
    return tensor.reshape(-1).view(torch.uint8).view(tensor.numel(), tensor.itemsize)


def copy(tensor: Tensor) -> Tensor:
    """As bytes: torch's own copy of a bool makes 1 of a 2."""
    return bytes_by_entry(tensor).clone().view(-1).view(tensor.dtype).reshape(tensor.shape)


def changed(tensor: Tensor, count: int, seed: int) -> Tensor:
    """A copy with another first byte in ``count`` entries."""
    new = copy(tensor)
    at = torch.randperm(tensor.numel(), generator=torch.Generator().manual_seed(seed))[:count]
    bytes_by_entry(new)[at, 0] ^= 1
    return new


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Names, dtypes, shapes and bytes."""
    return one.keys() == other.keys() and all(
        (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(bytes_by_entry(a), bytes_by_entry(b))
        for a, b in ((one[name], other[name]) for name in one)
    )


def model_state(seed: int = 0) -> State:
    """Several dtypes and shapes; sizes that are no multiples of eight."""
    return {
        "a.weight": draw(torch.bfloat16, (37, 11), seed),
        "b.scale": draw(torch.float32, (), seed + 1),
        "c.cube": draw(torch.float16, (3, 5, 7), seed + 2),
        "d.empty": draw(torch.float32, (0, 4), seed + 3),
        "e.long": draw(torch.float32, (301,), seed + 4),
        "f.codes": draw(torch.int8, (129,), seed + 5),
        "g.wide": draw(torch.float64, (13, 3), seed + 6),
    }


def next_state(state: State, seed: int, names: tuple[str, ...] = ("a.weight", "c.cube", "f.codes")) -> State:
    """A later state: some entries of some tensors differ."""
    moved = {name: changed(state[name], max(state[name].numel() // 10, 1), seed + i) for i, name in enumerate(names)}
    return {name: moved.get(name, copy(value)) for name, value in state.items()}


# -- files ------------------------------------------------------------------------------------------------------------


def write(path: Path, state: State, layout: str, parts: int = 3, metadata: dict[str, str] | None = None) -> Path:
    """``path``, or ``path`` with .safetensors for the layout "file". With a config beside the weights of a folder."""
    metadata = {"format": "pt", "who": "ärger"} if metadata is None else metadata
    if layout == "file":
        path = path.with_name(f"{path.name}.safetensors")
        save_file(state, path, metadata)
        return path
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama"}')
    if layout == "single":
        save_file(state, path / "model.safetensors", metadata)
        return path
    names = list(state)
    places = {name: f"model-{i % parts + 1:05d}-of-{parts:05d}.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(places.values())):
        save_file({name: state[name] for name in names if places[name] == file}, path / file, metadata)
    index = {
        "metadata": {"total_size": sum(t.nbytes for t in state.values()), "kept": "as it is"},
        "weight_map": places,
    }
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def load(path: Path) -> State:
    """The tensors of a file, or of a folder by its index where it has one."""
    if path.is_file():
        return load_file(path)
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        return load_file(path / "model.safetensors")
    places: dict[str, str] = json.loads(index.read_text())["weight_map"]
    files = {file: load_file(path / file) for file in set(places.values())}
    return {name: files[file][name] for name, file in places.items()}


def listing(path: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones too, with its bytes; of a file: those of its folder."""
    folder = path if path.is_dir() else path.parent
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


# -- patches ----------------------------------------------------------------------------------------------------------


def differences(before: State, after: State) -> dict[str, tuple[Tensor, Tensor]]:
    """Positions (c,) int64 and new values (c,) of the tensors that changed."""
    found = {}
    for name in before:
        at = (bytes_by_entry(before[name]) != bytes_by_entry(after[name])).any(1).nonzero().view(-1)
        if len(at):
            values = bytes_by_entry(after[name])[at].reshape(-1).view(after[name].dtype)
            found[name] = at, values
    return found


def patched(state: State, patch: State) -> State:
    """By index assignment of bytes, from a patch as ``load_file`` returns it."""
    new = {name: copy(value) for name, value in state.items()}
    for key in patch:
        if key.endswith(".indices"):
            name = key.removesuffix(".indices")
            values = patch[f"{name}.values"]
            bytes_by_entry(new[name])[patch[key].long()] = bytes_by_entry(values)
    return new


def hash_of(state: State) -> str:
    """The content hash of a state, as docs/patches.md describes it."""
    stored = {dtype: name for name, dtype in DTYPES.items()}
    lines = [
        [name, stored[t.dtype], list(t.shape), xxhash.xxh3_128_hexdigest(bytes(bytes_by_entry(t).view(-1).tolist()))]
        for name, t in sorted(state.items())
    ]
    return xxhash.xxh3_128_hexdigest(json.dumps(lines).encode())


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join(header: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def signed(header: dict[str, Any], data: bytes) -> bytes:
    """A patch whose digest is right, as docs/patches.md describes it."""
    header["__metadata__"]["digest"] = "0" * 32
    zeroed = join(header, data)
    text = zeroed[: len(zeroed) - len(data)]
    header["__metadata__"]["digest"] = xxhash.xxh3_128_hexdigest(xxhash.xxh3_128_digest(data) + text)
    return join(header, data)


def craft(path: Path, change: Callable[[dict[str, Any], bytearray], None]) -> Path:
    """Change a patch's header or data and give it a right digest."""
    header, data = split(path)
    raw = bytearray(data)
    change(header, raw)
    path.write_bytes(signed(header, bytes(raw)))
    return path
