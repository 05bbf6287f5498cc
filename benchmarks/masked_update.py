"""One masked linear layer against full fine-tuning: step time, memory, the update alone, and a stack of layers.

Forward + backward + optimiser step in bf16. Every method has its own copy of the same base, the same inputs and the
same AdamW; rounds are interleaved in a random order and each ratio is taken inside a round. Run:

    python benchmarks/masked_update.py --out benchmarks/results/masked_update.json
    python benchmarks/masked_update.py --device cuda --parts step memory update stack --stack 8b --out ...
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _common import environment, median, paired_ratio, write_result
from _masked_methods import BASELINE, METHODS, Adapted, cost_of, density_of, training_step
from adapter_step import OneLayer, timed
from masked_update_stack import STACKS, measure_stack
from peft import get_peft_model
from torch import Tensor, nn

from offprincipal_peft import MaskedAdamW, PrincipalSparseConfig
from offprincipal_peft.kernels import Layout, layout_of, write_sum_

SHAPES = {"4096x4096": (4096, 4096), "8960x1536": (8960, 1536), "4864x896": (4864, 896)}
PARTS = ("step", "memory", "update", "stack")
LINE = 32  # bf16 entries in a cache line
ROTATED_BYTES = 300e6  # state that the update alone walks over, so that none of it stays in the last-level cache
STREAM_BYTES = 576 * 2**20
# Of the methods, in their order: the dense ones and the floor without colour.
COLOURS = ("black", "dimgrey", "C0", "C9", "C2", "C8", "C4", "C3", "C1", "C5", "lightgrey", "darkgrey")


# -- one layer's step ---------------------------------------------------------------------------------------------


def prepare(method: str, shape: str, density: float, args: argparse.Namespace) -> tuple[Adapted, Callable[[], None]]:
    d_out, d_in = SHAPES[shape]
    adapted = METHODS[method](OneLayer(d_out, d_in, torch.bfloat16, args.device), density / 100)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(args.tokens, d_in, generator=generator).to(args.device, torch.bfloat16).requires_grad_()
    upstream = torch.randn(args.tokens, d_out, generator=generator).to(args.device, torch.bfloat16)
    step = training_step(adapted, x, upstream)
    for _ in range(args.warmup):
        step()
    return adapted, step


def interleaved(steps: dict[str, Callable[[], None]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of every step in every round, each round in a random order."""
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    order = torch.Generator().manual_seed(0)
    for _ in range(rounds):
        for i in torch.randperm(len(names), generator=order).tolist():
            seconds[names[i]].append(timed(steps[names[i]], device))
    return seconds


def measure_layer(shape: str, density: float, args: argparse.Namespace) -> dict[str, Any]:
    prepared = {method: prepare(method, shape, density, args) for method in args.methods}
    rows: dict[str, dict[str, Any]] = {
        method: {"entries": adapted.entries, "density": density_of(adapted)}
        for method, (adapted, _) in prepared.items()
    }
    if "step" in args.parts:
        seconds = interleaved({method: step for method, (_, step) in prepared.items()}, args.rounds, args.device)
        for method, s in seconds.items():
            rows[method] |= {"median_s": median(s), **paired_ratio(s, seconds[BASELINE])}
    if "memory" in args.parts:
        for method, (adapted, step) in prepared.items():
            rows[method] |= cost_of(adapted, step, args.device)
    return {"shape": shape, "density": density, "methods": rows}


def print_layer(case: dict[str, Any]) -> None:
    print(f"{case['shape']}, {case['density']} %")
    for name, row in case["methods"].items():
        line = f"  {name:20s} density {row['density']:.4f}"
        if "ratio" in row:
            low, high = row["interval"]
            line += f"  {row['median_s'] * 1e3:8.2f} ms  {row['ratio']:.3f} [{low:.3f}, {high:.3f}]"
        if "state" in row:
            each = row["state_bytes_per_entry"]
            line += f"  transient {row['transient']:6.2f}  state {row['state']:6.2f}"
            line += "" if each is None else f" ({each:.2f} B/entry)"
        print(line, flush=True)


# -- the update alone ---------------------------------------------------------------------------------------------


def traffic(numel: int, entries: int) -> dict[str, float]:
    """Bytes of DRAM traffic for one layer.

    ``floor``: read a dense gradient's touched lines, read and write the weight's, 28 B of fp32 state and index an
    entry. The other two count what each update moves at least, given a packed gradient: the touched lines of the
    weight twice, and per entry fp32 gradient 4, delta 8, moments 16, index 4, kept original 2; or gradient 4, low
    half 4, bf16 moments 8, index 4.
    """
    density = entries / numel
    touched = 2 * numel * (1 - (1 - density) ** LINE)
    return {
        "floor": 3 * touched + 28 * entries,
        "packed fp32": 2 * touched + 34 * entries,
        "split, bf16 moments": 2 * touched + 20 * entries,
    }


def streams(device: str) -> dict[str, tuple[Callable[[], None], float]]:
    """Kernels over 576 MiB of written memory, with the bytes that each moves."""
    buffer = torch.ones(STREAM_BYTES // 4, device=device)
    half, third = buffer.numel() // 2, buffer.numel() // 3
    a, b, c = buffer[:third], buffer[third : 2 * third], buffer[2 * third : 3 * third]
    allocate = 1 if device == "cpu" else 0  # a CPU reads a line before a plain store to it
    return {
        "add in place": (lambda: _ignore(buffer.add_(1e-3)), 2 * STREAM_BYTES),
        "copy": (lambda: _ignore(buffer[:half].copy_(buffer[half:])), (2 + allocate) * STREAM_BYTES / 2),
        "add to a third": (lambda: _ignore(torch.add(a, b, out=c)), (3 + allocate) * STREAM_BYTES / 3),
        "sum": (lambda: _ignore(buffer.sum()), STREAM_BYTES),
    }


def _ignore(_: Tensor) -> None:
    pass


class PackedUpdate:
    """Fused AdamW on a packed fp32 delta and the write into the weight, for one layer."""

    def __init__(self, shape: tuple[int, int], layout: Layout, device: str) -> None:
        self.layout = layout.to(torch.device(device))
        self.matrix = (0.02 * torch.randn(shape)).to(device, torch.bfloat16)
        self.original = self.layout.gather(self.matrix)
        self.delta, self.exp_avg, self.exp_avg_sq = torch.zeros(3, layout.count, device=device).unbind()
        self.grad = torch.randn(layout.count, device=device)
        self.number = torch.zeros((), device=device)

    def __call__(self) -> None:
        self.number += 1
        torch._fused_adamw_(
            [self.delta],
            [self.grad],
            [self.exp_avg],
            [self.exp_avg_sq],
            [],
            [self.number],
            lr=1e-5,
            beta1=0.9,
            beta2=0.999,
            weight_decay=0.0,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )
        write_sum_(self.matrix, self.layout, self.original, self.delta)


def split_update(shape: tuple[int, int], layers: int, density: float, device: str) -> Callable[[], None]:
    """``MaskedAdamW.step`` over ``layers`` adapted layers, with gradients from one real backward."""
    base = nn.ModuleDict({f"linear{i}": OneLayer(*shape, torch.bfloat16, device).linear for i in range(layers)})
    config = PrincipalSparseConfig(
        mask="random", random_density=density, precision="split", target_modules=[f"linear{i}" for i in range(layers)]
    )
    model: Any = get_peft_model(base, config)
    x = torch.randn(8, shape[1], device=device, dtype=torch.bfloat16)
    for i in range(layers):
        model.base_model.model[f"linear{i}"](x).sum().backward()
    optimizer = MaskedAdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-5, weight_decay=0.0, moments="bf16"
    )
    model.step = optimizer.step  # the masters live as long as the model does: keep it with the step
    return lambda: model.step()


def _each(updates: list[PackedUpdate]) -> None:
    for update in updates:
        update()


def measure_update(density: float, args: argparse.Namespace) -> dict[str, Any]:
    shape = SHAPES[args.update_shape]
    numel, fraction = shape[0] * shape[1], density / 100
    touched = 2 * numel * (1 - (1 - fraction) ** LINE) + 18 * fraction * numel  # the split state is the smaller
    layers = max(2, int(-(-ROTATED_BYTES // touched)))
    generator = torch.Generator().manual_seed(0)
    packed = [
        PackedUpdate(shape, layout_of(torch.rand(shape, generator=generator) < fraction, shape, "element"), args.device)
        for _ in range(layers)
    ]
    kernels = streams(args.device)
    steps = {name: kernel for name, (kernel, _) in kernels.items()}
    steps["packed fp32"] = lambda: _each(packed)
    steps["split, bf16 moments"] = split_update(shape, layers, fraction, args.device)
    for step in steps.values():
        step()
    seconds = interleaved(steps, args.rounds, args.device)
    entries = sum(update.layout.count for update in packed) // layers
    moved = traffic(numel, entries)
    per_byte = [s / kernels["add in place"][1] for s in seconds["add in place"]]
    rows = {}
    for name in ("packed fp32", "split, bf16 moments"):
        each = [s / layers for s in seconds[name]]
        rows[name] = {
            "median_s": median(each),
            "over_floor": paired_ratio(each, [moved["floor"] * s for s in per_byte]),
            "own_bytes": moved[name],
            "over_own_bytes": paired_ratio(each, [moved[name] * s for s in per_byte]),
        }
    bandwidth = {name: count / median(seconds[name]) / 1e9 for name, (_, count) in kernels.items()}
    case = {"shape": args.update_shape, "density": density, "layers": layers, "entries": entries}
    return case | {"floor_bytes": moved["floor"], "gigabytes_per_s": bandwidth, "methods": rows}


def print_update(case: dict[str, Any]) -> None:
    speeds = ", ".join(f"{name} {speed:.1f}" for name, speed in case["gigabytes_per_s"].items())
    print(f"update of {case['shape']}, {case['density']} %, {case['layers']} layers; GB/s: {speeds}")
    for name, row in case["methods"].items():
        over = f"{row['over_floor']['ratio']:.2f} x the floor, {row['over_own_bytes']['ratio']:.2f} x its own bytes"
        print(f"  {name:20s} {row['median_s'] * 1e3:8.2f} ms  {over}", flush=True)


# -- plot ---------------------------------------------------------------------------------------------------------


def plot(payload: dict[str, Any], target: Path) -> None:
    """Time and transient memory against density, one column a shape. Without matplotlib a note is printed."""
    try:
        figures = importlib.import_module("matplotlib.figure")
    except ImportError:
        print("no plot: matplotlib is not installed (pip install matplotlib)")
        return
    cases = payload["cases"]
    shapes = list(dict.fromkeys(case["shape"] for case in cases))
    quantities = {"ratio": "step time / dense bf16", "transient": "transient peak / weight bytes"}
    quantities = {key: label for key, label in quantities.items() if all(_has(case, key) for case in cases)}
    if not quantities or not shapes:
        print("no plot: nothing in the result to draw")
        return
    figure = figures.Figure(figsize=(max(6.4, 4.4 * len(shapes)), 3.4 * len(quantities)), layout="constrained")
    grid = figure.subplots(len(quantities), len(shapes), squeeze=False)
    for row, (key, label) in zip(grid, quantities.items(), strict=True):
        for axis, shape in zip(row, shapes, strict=True):
            _panel(axis, [case for case in cases if case["shape"] == shape], key)
            axis.set(title=shape.replace("x", " × "), xlabel="density, %", ylabel=label, yscale="log")
            low, high = axis.get_ylim()
            axis.set_yticks([], minor=True)
            axis.set_yticks([2.0**i for i in range(-8, 9) if low <= 2.0**i <= high])
            axis.yaxis.set_major_formatter("{x:g}")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120)
    print(f"wrote {target}")


def _has(case: dict[str, Any], key: str) -> bool:
    return all(key in row for row in case["methods"].values())


def _panel(axis: Any, cases: list[dict[str, Any]], key: str) -> None:
    cases = sorted(cases, key=lambda case: case["density"])
    densities = [case["density"] for case in cases]
    for i, method in enumerate(METHODS):
        if not all(method in case["methods"] for case in cases):
            continue
        rows = [case["methods"][method] for case in cases]
        style: dict[str, Any] = {"color": COLOURS[i], "marker": "o", "markersize": 3, "linewidth": 1.2}
        if not method.startswith("ours"):
            style |= {"linestyle": "--", "marker": "x"}
        values = [row[key] for row in rows]
        axis.plot(densities, values, label=method, **style)
        if key == "ratio":
            low, high = zip(*(row["interval"] for row in rows), strict=True)
            axis.fill_between(densities, low, high, color=style["color"], alpha=0.15, linewidth=0)
    axis.set_xticks(densities)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--parts", nargs="+", default=["step", "memory", "update"], choices=PARTS)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--densities", nargs="+", type=float, default=[1.0, 5.0, 20.0, 50.0, 74.0], help="in percent")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--update-shape", default="4096x4096", choices=list(SHAPES))
    parser.add_argument("--stack", default="1.5b", choices=list(STACKS))
    parser.add_argument("--stack-densities", nargs="+", type=float, default=[5.0, 20.0], help="in percent")
    parser.add_argument("--stack-tokens", type=int, default=2048)
    parser.add_argument("--stack-rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/masked_update.json"))
    parser.add_argument("--replot", action="store_true", help="measure nothing, draw the plot of --out again")
    args = parser.parse_args()
    if BASELINE not in args.methods:
        args.methods = [BASELINE, *args.methods]
    return args


def main() -> None:
    args = parse_args()
    if args.replot:
        plot(json.loads(args.out.read_text()), args.out.with_suffix(".png"))
        return
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "replot")}
    payload: dict[str, Any] = {"settings": settings, "environment": environment(args.device), "cases": []}
    if "step" in args.parts or "memory" in args.parts:
        for shape in args.shapes:
            for density in args.densities:
                payload["cases"].append(measure_layer(shape, density, args))
                print_layer(payload["cases"][-1])
    if "update" in args.parts:
        payload["update"] = []
        for density in args.densities:
            payload["update"].append(measure_update(density, args))
            print_update(payload["update"][-1])
    if "stack" in args.parts:
        payload["stack"] = measure_stack(args)
    write_result(args.out, payload)
    plot(payload, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
