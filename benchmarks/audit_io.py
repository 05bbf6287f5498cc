"""What the streamed count of changed weights costs beside reading both checkpoints.

Two synthetic bf16 checkpoints (the second with some entries moved) lie in the page cache, so that the disk is not
measured. Each round first reads both files, block by block into one buffer, and then counts with
``audit.bf16_sparsity``; a round gives one ratio, so that a drift of the machine's speed cancels. One torch thread; the
plain reader is one thread, the count shares the blocks between two. Memory is the process' private resident memory,
sampled after every block of the first. Run:

    python benchmarks/audit_io.py --out benchmarks/results/audit_io.json
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _common import environment, median, paired_ratio, write_result
from safetensors.torch import save_file

from offprincipal_peft.audit import bf16_sparsity

ROWS, COLUMNS = 4096, 4096
BLOCK_ENTRIES = 16 * 65_535  # the block of bf16_sparsity


def write_pair(folder: Path, megabytes: int, density: float) -> tuple[Path, Path]:
    """Two files of 4096 x 4096 bf16 matrices, the last one shorter, of ``megabytes`` each."""
    generator = torch.Generator().manual_seed(0)
    base: dict[str, torch.Tensor] = {}
    tuned: dict[str, torch.Tensor] = {}
    left = megabytes * 1_000_000 // (2 * COLUMNS)
    while left > 0:
        rows = min(ROWS, left)
        name = f"model.layers.{len(base)}.weight"
        weight = (torch.randn(rows, COLUMNS, generator=generator) * 0.02).bfloat16()
        moved = torch.rand(rows, COLUMNS, generator=generator) < density
        base[name], tuned[name] = weight, torch.where(moved, weight * 1.01, weight)
        left -= rows
    paths = folder / "base.safetensors", folder / "tuned.safetensors"
    save_file(base, paths[0])
    save_file(tuned, paths[1])
    return paths


def read_both(*paths: Path) -> None:
    """Every byte of each file into one buffer that is used again, in blocks of the count's size, one after the other.

    A buffer of its own: a reader that asks for fresh memory measures the allocator, at 2.6 to 15 GB/s on one machine.
    """
    buffer = memoryview(bytearray(2 * BLOCK_ENTRIES))
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def private_bytes() -> int | None:
    """Private resident memory; None where the system does not say."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    lines = (line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("RssAnon"))
    return next((int(line.split()[1]) * 1024 for line in lines), None)


def growth(run: Callable[[Callable[[int, int], None]], Any]) -> int | None:
    """How much private memory grows at most, between the start of ``run`` and the ends of its blocks."""
    before = private_bytes()
    if before is None:
        return None
    most = before

    def sample(done: int, total: int) -> None:
        nonlocal most
        most = max(most, private_bytes() or 0)

    run(sample)
    return most - before


def timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(base: Path, tuned: Path, rounds: int) -> dict[str, Any]:
    # First: the rounds leave memory to the allocator, which would hide what a first run takes.
    memory = growth(lambda sample: bf16_sparsity(base, tuned, progress=sample))
    result = bf16_sparsity(base, tuned)
    times: dict[str, list[float]] = {"read": [], "sparsity": []}
    for _ in range(rounds):
        times["read"].append(timed(lambda: read_both(base, tuned)))
        times["sparsity"].append(timed(lambda: bf16_sparsity(base, tuned)))
    nbytes = base.stat().st_size + tuned.stat().st_size
    seconds = {name: median(values) for name, values in times.items()}
    return {
        "bytes": nbytes,
        "changed": result.changed,
        "entries": result.entries,
        "seconds": seconds,
        "gigabytes_per_s": {name: nbytes / value / 1e9 for name, value in seconds.items()},
        "speed_of_reading": paired_ratio(times["read"], times["sparsity"]),  # sparsity's speed / reading's
        "private_memory_growth": memory,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=500, help="of each checkpoint")
    parser.add_argument("--density", type=float, default=0.05, help="share of entries that are moved")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        # In a process of its own: memory that the drawing leaves to the allocator would hide what reading takes.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            base, tuned = pool.apply(write_pair, (Path(folder), args.megabytes, args.density))
        case = measure(base, tuned, args.rounds)
    ratio, speed = case["speed_of_reading"], case["gigabytes_per_s"]
    print(
        f"read {speed['read']:.1f} GB/s, count {speed['sparsity']:.1f} GB/s: {ratio['ratio']:.2f} of the reading speed "
        f"({ratio['interval'][0]:.2f} to {ratio['interval'][1]:.2f}); load {load[0]:.1f}"
    )
    if args.out is not None:
        settings = {"megabytes": args.megabytes, "density": args.density, "rounds": args.rounds}
        environment_ = environment("cpu") | {"load_before": list(load)}
        write_result(args.out, {"settings": settings, "environment": environment_, **case})


if __name__ == "__main__":
    main()
