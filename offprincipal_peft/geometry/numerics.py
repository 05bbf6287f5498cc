"""Guard against reduced-precision products: TF32 on CUDA and bf16 fp32-matmuls on CPU change singular bases."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """Run fp32 matrix products in true fp32 on every device; the previous setting is restored on exit."""
    before = torch.get_float32_matmul_precision()
    if before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
