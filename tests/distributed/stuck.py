"""Checks that do not end, for the tests of the launcher."""

import time
from pathlib import Path
from typing import Any

import torch.distributed as dist


def sleeps(rank: int, folder: Path) -> dict[str, Any]:
    time.sleep(600)
    return {}


def one_fails(rank: int, folder: Path) -> dict[str, Any]:
    """The other waits for it in a collective."""
    if rank == 1:
        raise ValueError("planted")
    dist.barrier()
    return {}
