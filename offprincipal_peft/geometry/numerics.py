"""Guard against reduced-precision products: TF32 and bf16 backends, and autocast, change singular bases."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """No TF32, no bf16 products, no autocast and no graph inside; the caller's settings are restored."""
    backends = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    attribute, exact = ("fp32_precision", "ieee") if hasattr(backends[0], "fp32_precision") else ("allow_tf32", False)
    backends = [backend for backend in backends if hasattr(backend, attribute)]
    saved = [getattr(backend, attribute) for backend in backends]
    try:
        for backend in backends:
            setattr(backend, attribute, exact)
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        for backend, value in zip(backends, saved, strict=True):
            setattr(backend, attribute, value)
