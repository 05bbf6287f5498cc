"""The spectral audit of a 1.5B-shaped pair in fast mode against full fp32 SVDs of both sides.

One block of Qwen2.5-1.5B's shapes, with the number of times each stands in the model. Each round times, one after the
other and in turn: ``torch.linalg.svd(W.float(), full_matrices=False)`` of both sides as the weights are stored (what a
script would write), the same of the tall orientation (a wide matrix costs several times its transpose), and the audit's
probes spectrum, angles and bounds: all singular values of both sides, top-k angles on both sides, ||dW||_2. What is
the same after either (energy shares, masks) is left out. A round gives one ratio, so that a drift of the machine's
speed cancels. With ``--accuracy`` each shape is compared with
exact fp64 SVDs as well. Run:

    python benchmarks/audit_spectral.py --accuracy --out benchmarks/results/audit_spectral.json

and, for accuracy alone, on all projections of some layers of a real model (``audit_runs.py`` writes SmolLM2's):

    python benchmarks/audit_spectral.py --model RUNS/base --out benchmarks/results/audit_accuracy.json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _common import environment, median, paired_ratio, write_result
from torch import Tensor

from offprincipal_peft.audit import open_checkpoint
from offprincipal_peft.geometry import SpectralBase, SpectralChange

# (d_out, d_in) -> how often in a block
SHAPES = {(1536, 1536): 2, (256, 1536): 2, (8960, 1536): 2, (1536, 8960): 1}
LAYERS = 28
# relative size of the change -> what it stands for
SIZES = {"rl": 3e-4, "sft": 2e-2}
ROUTES = ("perturbation", "rotated", "exact")
REAL_SIZES = [1e-4, 3e-3, 5e-2]


def weights(shape: tuple[int, int], size: float, seed: int) -> tuple[Tensor, Tensor]:
    """bf16, a decaying spectrum of 64 directions over noise, and a change of independent entries."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(shape, generator=generator) * 0.02
    left = torch.linalg.qr(torch.randn(shape[0], 64, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(shape[1], 64, generator=generator)).Q
    values = 0.1 * max(shape) ** 0.5 * torch.arange(1, 65) ** -0.7
    base = (noise + (left * values) @ right.T).bfloat16()
    step = torch.randn(shape, generator=generator)
    tuned = base.float() + step * (size * float(base.float().norm()) / float(step.norm()))
    return base, tuned.bfloat16() if size > 1e-3 else _kept(base, tuned)


def _kept(base: Tensor, tuned: Tensor) -> Tensor:
    """bf16, with the changes that nearest rounding hides drawn at random in proportion: the size stays."""
    generator = torch.Generator().manual_seed(0)
    bits = tuned.view(torch.int32) + torch.randint(0, 1 << 16, tuned.shape, dtype=torch.int32, generator=generator)
    return (bits >> 16).to(torch.int16).view(torch.bfloat16)


def audited(pair: tuple[Tensor, Tensor], k: int) -> SpectralChange:
    base, tuned = pair
    return SpectralBase(base, k).change(tuned)


def svds(pair: tuple[Tensor, Tensor], *, tall: bool) -> None:
    for side in pair:
        single = side.float()
        torch.linalg.svd(
            single.T.contiguous() if tall and side.shape[0] < side.shape[1] else single, full_matrices=False
        )


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def accuracy(base: Tensor, tuned: Tensor, k: int) -> dict[str, Any]:
    fast, exact = SpectralBase(base, k).change(tuned), SpectralBase(base, k, method="exact").change(tuned)
    angles = [(a, b) for a, b in ((fast.output_angles, exact.output_angles), (fast.input_angles, exact.input_angles))]
    return {
        "route": fast.route,
        "shift": exact.shift,
        "shift_error": abs(fast.shift - exact.shift),
        "shift_error_relative": abs(fast.shift - exact.shift) / exact.shift,
        "shift_error_stated": fast.shift_error,
        "largest_angle": max(float(b[-1]) for _, b in angles),
        "angle_error": max(float((a - b).abs().max()) for a, b in angles),
        "angle_error_relative": max(float(((a - b).abs() / b).max()) for a, b in angles),
        "angle_error_stated": fast.angle_error,
        "within_stated": abs(fast.shift - exact.shift) <= fast.shift_error
        and max(float((a - b).abs().max()) for a, b in angles) <= fast.angle_error,
        "within_bar": all(bool(((a - b).abs() <= (0.01 * b).clamp_min(1e-6)).all()) for a, b in angles)
        and abs(fast.shift - exact.shift) <= max(0.01 * exact.shift, 1e-6),
    }


def measure(kind: str, rounds: int, with_accuracy: bool) -> dict[str, Any]:
    rows, routes = [], {}
    pairs = {shape: weights(shape, SIZES[kind], 1) for shape in SHAPES}
    for shape, pair in pairs.items():  # warm up, and what the routes were
        routes[f"{shape[0]}x{shape[1]}"] = audited(pair, min(shape) // 16).route
    for _ in range(rounds):
        row: dict[str, dict[str, float]] = {}
        for shape, pair in pairs.items():
            k = min(shape) // 16
            row[f"{shape[0]}x{shape[1]}"] = {
                "audit": seconds(partial(audited, pair, k)),
                "svd": seconds(partial(svds, pair, tall=False)),
                "svd_tall": seconds(partial(svds, pair, tall=True)),
            }
        rows.append(row)
    counts = {f"{a}x{b}": count for (a, b), count in SHAPES.items()}
    totals = [
        {what: sum(row[name][what] * counts[name] for name in counts) for what in ("audit", "svd", "svd_tall")}
        for row in rows
    ]
    found: dict[str, Any] = {
        "relative_size": SIZES[kind],
        "routes": routes,
        "block_seconds": {what: median([t[what] for t in totals]) for what in totals[0]},
        "model_seconds": {what: LAYERS * median([t[what] for t in totals]) for what in totals[0]},
        "faster_than_svd": paired_ratio([t["svd"] for t in totals], [t["audit"] for t in totals]),
        "faster_than_svd_of_tall": paired_ratio([t["svd_tall"] for t in totals], [t["audit"] for t in totals]),
        "rounds": rows,
    }
    if with_accuracy:
        found["accuracy"] = {f"{s[0]}x{s[1]}": accuracy(*pairs[s], min(s) // 16) for s in SHAPES}
    return found


def _print_accuracy(found: dict[str, Any]) -> None:
    for what in ("shift_error", "angle_error", "angle_error_relative", "shift_error_relative"):
        print(f"largest {what}: {max(one[what] for one in found.values()):.2e}")
    within = sum(one["within_bar"] for one in found.values())
    stated = sum(one["within_stated"] for one in found.values())
    routes = {route: sum(one["route"] == route for one in found.values()) for route in ROUTES}
    print(f"{within} of {len(found)} within the bar, {stated} within the stated errors; routes {routes}")


def real_accuracy(folder: Path, layers: list[int]) -> dict[str, Any]:
    """:func:`accuracy` on a real model's matrices, each changed at random by several relative sizes."""
    found: dict[str, Any] = {}
    with open_checkpoint(folder) as model:
        for name, info in model.tensors.items():
            if len(info.shape) != 2 or not any(f"layers.{layer}." in name for layer in layers):
                continue
            base = model.read(name)
            for size in REAL_SIZES:
                step = torch.randn(base.shape, generator=torch.Generator().manual_seed(len(found)))
                tuned = base.float() + step * (size * float(base.float().norm()) / float(step.norm()))
                tuned = tuned.bfloat16() if size > 1e-3 else _kept(base, tuned)
                found[f"{name} {size:g}"] = accuracy(base, tuned, min(base.shape) // 16)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--accuracy", action="store_true")
    parser.add_argument("--kinds", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--model", type=Path, help="a checkpoint's folder: accuracy on its matrices, nothing else")
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 15], help="of --model")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.model:
        real = real_accuracy(options.model, options.layers)
        _print_accuracy(real)
        if options.out:
            settings = {"layers": options.layers, "relative_sizes": REAL_SIZES, "k": "min(shape) / 16"}
            write_result(options.out, {"settings": settings, "accuracy": real, "environment": environment("cpu")})
        return
    results = {kind: measure(kind, options.rounds, options.accuracy) for kind in options.kinds}
    for kind, found in results.items():
        print(kind, found["routes"], found["block_seconds"], found["faster_than_svd"], found["faster_than_svd_of_tall"])
    if options.out:
        settings = {"shapes": {f"{a}x{b}": n for (a, b), n in SHAPES.items()}, "layers": LAYERS, "k": "min(shape) / 16"}
        write_result(options.out, {"settings": settings, "results": results, "environment": environment("cpu")})


if __name__ == "__main__":
    main()
