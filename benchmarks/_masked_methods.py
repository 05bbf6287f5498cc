"""The methods that ``masked_update.py`` compares, and what each keeps and allocates.

A method takes a module of bias-free ``nn.Linear`` layers, adapts all of them, and returns the model with the update
that follows a backward. Every one of them trains with the same AdamW settings and no weight decay.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, ShiraConfig, SupertuningConfig, get_peft_model
from torch import Tensor, nn

from offprincipal_peft import MaskedAdamW, PrincipalSparseConfig
from offprincipal_peft.kernels.layout import row_block
from offprincipal_peft.rlvr.memory import reachable_tensors, storages

BASELINE = "dense bf16"
LR = 1e-5


@dataclass
class Adapted:
    """A model ready to train. ``update`` runs after a backward, and leaves no gradient behind."""

    model: nn.Module
    base: list[nn.Parameter]  # the base weights
    optimizer: torch.optim.Optimizer | None
    update: Callable[[], None]
    entries: int  # numbers trained


def linears(base: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in base.named_modules() if isinstance(module, nn.Linear)}


def _fused(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0, fused=True)


def _stepping(
    model: nn.Module,
    base: list[nn.Parameter],
    make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] = _fused,
) -> Adapted:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(parameters)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Adapted(model, base, optimizer, update, sum(p.numel() for p in parameters))


def dense_bf16(base: nn.Module, density: float) -> Adapted:
    return _stepping(base.requires_grad_(True), list(base.parameters()))


def dense_master(base: nn.Module, density: float) -> Adapted:
    """The usual mixed precision: bf16 weights, fp32 master copy and moments, gradients widened one by one."""
    weights = list(base.requires_grad_(True).parameters())
    masters = [nn.Parameter(w.detach().float()) for w in weights]
    optimizer = _fused(masters)

    def update() -> None:
        for weight, master in zip(weights, masters, strict=True):
            assert weight.grad is not None
            master.grad = weight.grad.float()
            weight.grad = None
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for weight, master in zip(weights, masters, strict=True):
            weight.data.copy_(master.data)

    return Adapted(base, weights, optimizer, update, sum(w.numel() for w in weights))


def floor(base: nn.Module, density: float) -> Adapted:
    """What no adapter can avoid: the forward and the input gradient of the frozen layer."""
    return Adapted(base.requires_grad_(False), list(base.parameters()), None, lambda: None, 0)


class _ThreeProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight = weight
        return torch.nn.functional.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,), grad = ctx.saved_tensors, grads[0]
        rows = row_block((ctx.weight.shape[0], ctx.weight.shape[1]))
        for first in range(0, ctx.weight.shape[0], rows):
            grad[:, first : first + rows].T @ x
        return grad @ ctx.weight, None


class _Products(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        for linear in linears(self.base).values():
            x = _ThreeProducts.apply(x, linear.weight)
        return x


def products(base: nn.Module, density: float) -> Adapted:
    """What no unstructured mask can avoid: the weight gradient's product too, in blocks of which nothing is kept."""
    base.requires_grad_(False)
    return Adapted(_Products(base), list(base.parameters()), None, lambda: None, 0)


def ours(structure: str, *, split: bool = False) -> Callable[[nn.Module, float], Adapted]:
    def build(base: nn.Module, density: float) -> Adapted:
        weights = list(base.parameters())
        options: dict[str, Any] = {
            "mask": "random",
            "random_density": density,
            "structure": structure,
            "target_modules": list(linears(base)),
        }
        if split:
            options["precision"] = "split"
        model: Any = get_peft_model(base, PrincipalSparseConfig(**options))
        if split:
            return _stepping(model, weights, lambda p: MaskedAdamW(p, lr=LR, weight_decay=0.0, moments="bf16"))
        return _stepping(model, weights)

    return build


def _random_mask(base_layer: nn.Linear, r: int, **kwargs: Any) -> Tensor:
    """PEFT's random mask, drawn where the weight is: on the CPU a large model takes tens of minutes."""
    weight = base_layer.weight
    mask = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    mask[torch.randperm(weight.numel(), device=weight.device)[: r * sum(weight.shape)]] = True
    return mask.view(weight.shape)


def shira(base: nn.Module, density: float) -> Adapted:
    """SHiRA trains r * (d_in + d_out) entries: the nearest r for each shape, one adapter a shape, all active."""
    weights = list(base.parameters())
    groups: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for name, linear in linears(base).items():
        groups[tuple(linear.weight.shape)].append(name)
    model: Any = None
    names = []
    for (d_out, d_in), targets in groups.items():
        r = max(1, round(density * d_out * d_in / (d_out + d_in)))
        config = ShiraConfig(r=r, target_modules=targets)
        config.mask_fn = _random_mask
        names.append("default" if model is None else f"of_{d_out}x{d_in}")
        if model is None:
            model = get_peft_model(base, config)
        else:
            model.add_adapter(names[-1], config)
    if len(names) > 1:
        model.base_model.set_adapter(names)
    return _stepping(model, weights)


def supertuning(base: nn.Module, density: float) -> Adapted:
    weights = list(base.parameters())
    config = SupertuningConfig(sparsity=1 - density, target_modules=list(linears(base)))
    return _stepping(get_peft_model(base, config), weights)


def lora(base: nn.Module, density: float) -> Adapted:
    weights = list(base.parameters())
    config = LoraConfig(r=16, lora_alpha=32, target_modules=list(linears(base)))
    return _stepping(get_peft_model(base, config), weights)


METHODS: dict[str, Callable[[nn.Module, float], Adapted]] = {
    BASELINE: dense_bf16,
    "dense fp32 master": dense_master,
    "ours element": ours("element"),
    "ours element split": ours("element", split=True),
    "ours row": ours("row"),
    "ours column": ours("column"),
    "ours block": ours("block"),
    "PEFT SHiRA": shira,
    "PEFT Super-Tuning": supertuning,
    "PEFT LoRA r16": lora,
    "floor": floor,
    "three products": products,
}
# Their cost does not depend on the density, and neither does what they train.
ANY_DENSITY = (BASELINE, "dense fp32 master", "PEFT LoRA r16", "floor", "three products")


def training_step(adapted: Adapted, x: Tensor, upstream: Tensor) -> Callable[[], None]:
    """Forward, backward from a fixed upstream gradient (input gradient included), update."""

    def step() -> None:
        adapted.model(x).backward(upstream)
        adapted.update()
        x.grad = None

    return step


def weight_bytes(adapted: Adapted) -> int:
    return sum(storages(adapted.base).values())


def state_bytes(adapted: Adapted) -> int:
    """What stays between steps beyond the base weights: moments, parameters, indices, kept originals, masks."""
    everything = storages(reachable_tensors([adapted.model, adapted.optimizer]))
    return sum(size for pointer, size in everything.items() if pointer not in storages(adapted.base))


def transient_peak(step: Callable[[], None], device: str) -> int:
    """Largest number of bytes that one step holds beyond what is resident before it.

    On the CPU from the profiler's allocation events: scratch that a library allocates past torch is not seen.
    Raises ``RuntimeError`` where a step leaves more behind than it found: what it freed instead was not seen either.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        resident = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - resident
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        step()
    assert profile.kineto_results is not None
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    if held > 0.01 * peak + 65_536:
        raise RuntimeError(f"{held} of {peak} bytes were still held after the step: its peak cannot be told")
    return peak


def cost_of(adapted: Adapted, step: Callable[[], None], device: str) -> dict[str, Any]:
    """Memory of a warmed-up method, in bytes and in units of the base weights' bytes."""
    unit, state, peak = weight_bytes(adapted), state_bytes(adapted), transient_peak(step, device)
    return {
        "state_bytes": state,
        "state": state / unit,
        "state_bytes_per_entry": state / adapted.entries if adapted.entries else None,
        "transient_bytes": peak,
        "transient": peak / unit,
    }


def density_of(adapted: Adapted) -> float:
    """Trained numbers over the base's."""
    return adapted.entries / math.fsum(w.numel() for w in adapted.base)
