"""Forward + backward + optimiser step of one adapted linear layer, off-principal LoRA against PEFT's LoRA.

Every method sees the same base, the same inputs and the same AdamW; rounds are interleaved in a random order,
and each ratio is taken inside a round, so that a drift of the machine's speed cancels. Run:

    python benchmarks/adapter_step.py --out benchmarks/results/adapter_step.json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _common import environment, paired_ratio, write_result
from peft import LoraConfig, get_peft_model
from torch import nn

from offprincipal_peft import OffPrincipalLoraConfig

SHAPES = {"4096x4096": (4096, 4096), "4864x896": (4864, 896)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def methods(r: int, k: int) -> dict[str, Any]:
    common: dict[str, Any] = {"r": r, "lora_alpha": 2 * r, "target_modules": ["linear"]}
    random_start: dict[str, Any] = {
        "init_subspace": "random",
        "init_factors": "A",
    }  # the start does not change the cost of a step
    return {
        "peft-lora": LoraConfig(**common),
        "lora": OffPrincipalLoraConfig.preset("lora", **common),
        "rlmo (no projection)": OffPrincipalLoraConfig(**common, **random_start),
        "pissa (both starts)": OffPrincipalLoraConfig(**common, init_subspace="random", init_factors="both"),
        "offprincipal output": OffPrincipalLoraConfig(**common, **random_start, principal_rank=k, projection="output"),
        "offprincipal both": OffPrincipalLoraConfig(**common, **random_start, principal_rank=k, projection="both"),
    }


class OneLayer(nn.Module):
    def __init__(self, d_out: int, d_in: int, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.linear = nn.Linear(d_in, d_out, bias=False)
        generator = torch.Generator().manual_seed(0)
        self.linear.weight.data = (0.02 * torch.randn(d_out, d_in, generator=generator)).to(device, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(x)
        return out


def one_step(config: Any, shape: tuple[int, int], dtype: torch.dtype, tokens: int, device: str) -> Callable[[], None]:
    d_out, d_in = shape
    model = get_peft_model(OneLayer(d_out, d_in, dtype, device), config)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, d_in, generator=generator).to(device, dtype).requires_grad_()
    upstream = torch.randn(tokens, d_out, generator=generator).to(device, dtype)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def step() -> None:
        model(x).backward(upstream)
        optimizer.step()
        optimizer.zero_grad()
        x.grad = None

    return step


def timed(step: Callable[[], None], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def measure(shape: str, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    steps = {
        name: one_step(config, SHAPES[shape], DTYPES[dtype], args.tokens, args.device)
        for name, config in methods(args.rank, args.k).items()
    }
    names = list(steps)
    for name in names:
        for _ in range(args.warmup):
            steps[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    order = torch.Generator().manual_seed(0)
    for _ in range(args.rounds):
        for i in torch.randperm(len(names), generator=order).tolist():
            seconds[names[i]].append(timed(steps[names[i]], args.device))
    return {
        "shape": shape,
        "dtype": dtype,
        "methods": {
            name: {"median_s": sorted(s)[len(s) // 2], **paired_ratio(s, seconds["peft-lora"])}
            for name, s in seconds.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/adapter_step.json"))
    args = parser.parse_args()
    cases = []
    for shape in args.shapes:
        for dtype in args.dtypes:
            cases.append(measure(shape, dtype, args))
            print(f"{shape} {dtype}")
            for name, row in cases[-1]["methods"].items():
                low, high = row["interval"]
                print(f"  {name:24s} {row['median_s'] * 1e3:8.2f} ms  {row['ratio']:.3f} [{low:.3f}, {high:.3f}]")
    settings = {k: v for k, v in vars(args).items() if k != "out"}
    write_result(args.out, {"settings": settings, "environment": environment(args.device), "cases": cases})


if __name__ == "__main__":
    main()
