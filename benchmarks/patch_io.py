"""What making and applying a sparse patch costs beside reading and writing the same files, and how small patches are.

Two bf16 checkpoints lie in the page cache, so that the disk is not measured; the second has some entries moved. Each
round does, one after the other: read both files in blocks and write a file of the patch's size; ``make_patch``; read
the target and the patch and write a file of the target's size; ``apply_patch`` in place. Plain writing is as safe as
theirs: a new file, flushed to disk, renamed over the old one (rewriting a file in place spares the system the search
for free pages, and leaves neither state where it is interrupted). A round gives one ratio for each, so that a drift of
the machine's speed cancels. Run:

    python benchmarks/patch_io.py --out benchmarks/results/patch_io.json
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _common import environment, median, paired_ratio, write_result
from audit_io import write_pair

from offprincipal_peft.interop.sparse_patch import apply_patch, make_patch

PART = 4 << 20  # bytes read at once by the plain reader, into one buffer


def plain(sources: list[Path], target: Path, size: int) -> None:
    """Read ``sources`` into one buffer and put a file of ``size`` bytes in the place of ``target``, flushed."""
    buffer = memoryview(bytearray(PART))
    for path in sources:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    fresh = target.with_suffix(".new")
    with fresh.open("wb", buffering=0) as file:
        for start in range(0, size, PART):
            file.write(buffer[: min(PART, size - start)])
        os.fsync(file.fileno())
    os.replace(fresh, target)


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(folder: Path, megabytes: int, density: float, rounds: int) -> dict[str, Any]:
    base, tuned = write_pair(folder, megabytes, density)
    patch, scratch = folder / "patch.safetensors", folder / "scratch.bin"
    info = make_patch(base, tuned, patch, overwrite=True)
    alone = make_patch(base, tuned, folder / "values.safetensors", positions=patch)
    back = folder / "back.safetensors"
    make_patch(tuned, base, back, overwrite=True)
    size = base.stat().st_size
    times: dict[str, list[float]] = {"read_for_make": [], "make": [], "read_and_write_for_apply": [], "apply": []}
    for _ in range(rounds):
        times["read_for_make"].append(seconds(partial(plain, [base, tuned], scratch, info.nbytes)))
        times["make"].append(seconds(lambda: make_patch(base, tuned, patch, overwrite=True)))
        times["read_and_write_for_apply"].append(seconds(partial(plain, [base, patch], scratch, size)))
        times["apply"].append(seconds(lambda: apply_patch(base, patch)))
        apply_patch(base, back)
    return {
        "density": info.density,
        "patch_bytes_over_dense": info.nbytes / size,
        "patch_bytes_over_dense_over_density": info.nbytes / size / info.density,
        "values_alone_bytes_over_dense_over_density": alone.nbytes / size / alone.density,
        "make_speed": paired_ratio(times["read_for_make"], times["make"]),
        "apply_speed": paired_ratio(times["read_and_write_for_apply"], times["apply"]),
        "gigabytes_per_second": {
            "make": 2 * size / 1e9 / median(times["make"]),
            "apply": 2 * size / 1e9 / median(times["apply"]),
        },
        "seconds": times,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--megabytes", type=int, default=512, help="of each checkpoint")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.002, 0.01, 0.05, 0.2])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where the files lie (default: the system's temporary folder)")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = {}
    for density in options.densities:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            found = results[str(density)] = measure(Path(folder), options.megabytes, density, options.rounds)
        print(
            density, found["patch_bytes_over_dense_over_density"], found["values_alone_bytes_over_dense_over_density"]
        )
        print("  ", found["make_speed"], found["apply_speed"], found["gigabytes_per_second"])
    if options.out:
        settings = {"megabytes": options.megabytes, "rounds": options.rounds}
        write_result(options.out, {"settings": settings, "results": results, "environment": environment("cpu")})


if __name__ == "__main__":
    main()
