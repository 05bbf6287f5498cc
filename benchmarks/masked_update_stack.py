"""A stack of decoder-shaped linear layers with random weights, for ``masked_update.py --parts stack``.

Layers have the shapes of a published model's projections; attention itself, embeddings and the head are left out,
so that what is measured is what the methods differ in. Methods are built and freed one after the other.
"""

from __future__ import annotations

import argparse
import gc
from typing import Any

import torch
from _common import median
from _masked_methods import ANY_DENSITY, BASELINE, METHODS, cost_of, density_of, training_step, weight_bytes
from adapter_step import timed
from torch import Tensor, nn
from torch.nn import functional as F

# hidden size, intermediate size, width of keys and values, layers
STACKS = {
    "1.5b": (1536, 8960, 256, 28),  # Qwen2.5-1.5B
    "8b": (4096, 14336, 1024, 32),  # Llama-3-8B
    "tiny": (512, 1024, 256, 2),
}


def _linear(d_out: int, d_in: int, device: str) -> nn.Linear:
    layer = nn.utils.skip_init(nn.Linear, d_in, d_out, bias=False, device=device, dtype=torch.bfloat16)
    assert isinstance(layer, nn.Linear)
    nn.init.normal_(layer.weight, std=0.02)
    return layer


class Decoder(nn.Module):
    """The seven projections of a decoder layer, joined by the cheapest things that use all of them."""

    def __init__(self, hidden: int, intermediate: int, kv: int, device: str) -> None:
        super().__init__()
        self.q, self.o = _linear(hidden, hidden, device), _linear(hidden, hidden, device)
        self.k, self.v = _linear(kv, hidden, device), _linear(kv, hidden, device)
        self.gate, self.up = _linear(intermediate, hidden, device), _linear(intermediate, hidden, device)
        self.down = _linear(hidden, intermediate, device)

    def forward(self, x: Tensor) -> Tensor:  # (tokens, hidden)
        inner = F.rms_norm(x, x.shape[-1:])
        pairs = self.k(inner) * self.v(inner)  # (tokens, kv)
        x = x + self.o(self.q(inner) + pairs.repeat(1, x.shape[-1] // pairs.shape[-1]))
        inner = F.rms_norm(x, x.shape[-1:])
        out: Tensor = x + self.down(F.silu(self.gate(inner)) * self.up(inner))
        return out


class Stack(nn.Module):
    def __init__(self, name: str, device: str) -> None:
        super().__init__()
        hidden, intermediate, kv, layers = STACKS[name]
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Decoder(hidden, intermediate, kv, device) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def _run(name: str, method: str, density: float, args: argparse.Namespace) -> dict[str, Any]:
    hidden, tokens = STACKS[name][0], args.stack_tokens
    adapted = METHODS[method](Stack(name, args.device), density)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, hidden, generator=generator).to(args.device, torch.bfloat16).requires_grad_()
    upstream = torch.randn(tokens, hidden, generator=generator).to(args.device, torch.bfloat16)
    step = training_step(adapted, x, upstream)
    for _ in range(args.warmup):
        step()
    seconds = [timed(step, args.device) for _ in range(args.stack_rounds)]
    cost = cost_of(adapted, step, args.device)
    # Weights, state and one step; the inputs are too small to matter.
    peak = weight_bytes(adapted) + cost["state_bytes"] + cost["transient_bytes"]
    if args.device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    return {
        "median_s": median(seconds),
        "min_s": min(seconds),
        "max_s": max(seconds),
        "tokens_per_s": tokens / median(seconds),
        "peak_bytes": peak,
        "entries": adapted.entries,
        "density": density_of(adapted),
        **cost,
    }


def _freed(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def measure_stack(args: argparse.Namespace) -> dict[str, Any]:
    """Every method at every density; a method whose cost does not depend on the density runs once."""
    cases: list[dict[str, Any]] = []
    fixed: dict[str, dict[str, Any]] = {}
    for density in args.stack_densities:
        rows: dict[str, dict[str, Any]] = {}
        for method in args.methods:
            if method == "three products":  # of one layer: the stack's layers are not a chain
                continue
            row = fixed.get(method)
            if row is None:
                try:
                    row = _run(args.stack, method, density / 100, args)
                except torch.OutOfMemoryError:
                    row = {"error": "out of memory"}
                _freed(args.device)
                if method in ANY_DENSITY:
                    fixed[method] = row
            rows[method] = dict(row)
            print(f"  stack {args.stack} {density} % {method:20s} {_line(row)}", flush=True)
        baseline = rows.get(BASELINE, {}).get("median_s")
        for row in rows.values():
            if baseline is not None and "median_s" in row:
                row["ratio"] = row["median_s"] / baseline  # of medians: the methods did not fit side by side
        cases.append({"density": density, "methods": rows})
    return {"stack": args.stack, "tokens": args.stack_tokens, "rounds": args.stack_rounds, "cases": cases}


def _line(row: dict[str, Any]) -> str:
    if "error" in row:
        return str(row["error"])
    return (
        f"{row['median_s'] * 1e3:9.1f} ms {row['tokens_per_s']:9.0f} tokens/s  peak {row['peak_bytes'] / 2**30:7.2f} "
        f"GiB  density {row['density']:.4f}"
    )
