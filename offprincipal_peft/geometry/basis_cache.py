"""Bases on disk, keyed by the weight's bytes.

Trade-off: hashing reads every byte of a weight (about a gigabyte a second) so that a hit can never belong to
another weight; names, paths and timestamps take no part. One file per request keeps writers independent:
several processes may compute the same basis, and the last atomic rename wins.
"""

import ctypes
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

ALGORITHM_VERSION = 1  # raise it whenever a solver changes what it returns
ENVIRONMENT_VARIABLE = "OFFPRINCIPAL_CACHE"

Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


def weight_digest(weight: Tensor) -> bytes:
    """sha256 over dtype, shape and the raw bytes in row-major order; no copy of a contiguous CPU tensor."""
    digest = hashlib.sha256(f"{weight.dtype}:{tuple(weight.shape)}:".encode())
    flat = weight.detach().cpu().contiguous().view(-1)
    size = flat.numel() * flat.element_size()
    digest.update(memoryview((ctypes.c_char * size).from_address(flat.data_ptr())) if size else b"")
    return digest.digest()


class BasisCache:
    """Tensors of one weight, each request in a safetensors file of its own."""

    def __init__(self, directory: Path, weight: Tensor) -> None:
        self.directory = directory
        self.weight = weight
        self._digest: bytes | None = None

    @staticmethod
    def directory_from(cache_dir: str | Path | None) -> Path | None:
        """The directory that was asked for, else the environment's, else None: no cache."""
        chosen = cache_dir if cache_dir is not None else os.environ.get(ENVIRONMENT_VARIABLE)
        return Path(chosen).expanduser() if chosen else None

    def path(self, request: Mapping[str, str | int]) -> Path:
        """The file for a request; the weight is hashed on the first call only."""
        if self._digest is None:
            self._digest = weight_digest(self.weight)
        described = json.dumps({"version": ALGORITHM_VERSION, **request}, sort_keys=True).encode()
        return self.directory / f"{hashlib.sha256(self._digest + described).hexdigest()}.safetensors"

    def load(self, request: Mapping[str, str | int], layout: Layout) -> dict[str, Tensor] | None:
        """The stored tensors on the weight's device, None when absent; a damaged file warns and counts as absent."""
        path = self.path(request)
        if not path.exists():
            return None
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            warnings.warn(f"basis cache file {path} cannot be read, computing anew: {error}", stacklevel=4)
            return None
        found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        if found != dict(layout) or not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            warnings.warn(f"basis cache file {path} does not hold what its key says, computing anew", stacklevel=4)
            return None
        return {name: tensor.to(self.weight.device) for name, tensor in tensors.items()}

    def store(self, request: Mapping[str, str | int], tensors: Mapping[str, Tensor]) -> None:
        """Write atomically: a reader sees the old file, the whole new one, or none."""
        path = self.path(request)
        self.directory.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=self.directory, suffix=".tmp")
        os.close(handle)
        try:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
