"""What an off-principal layer keeps beside PEFT's LoRA state: frozen tensors, the folding scope, pending values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..sharding import check_not_partitioned, is_dtensor
from .config import OffPrincipalLoraConfig
from .inits import StartRequest


class FrozenFactor(nn.Module):
    """A frozen ``weight`` parameter, so that it is saved and copied by name like any adapter weight.

    With ``keep_precision`` it stays in its dtype when a model is cast down: a basis rounded to bf16 is no longer
    orthonormal (1.6e-3), which would be the leak of everything projected with it.
    """

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, *, keep_precision: bool) -> None:
        super().__init__()
        self.keep_precision = keep_precision
        self.weight = nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)

    def register_parameter(self, name: str, param: Any) -> None:
        """Frozen also where a loader puts its own parameter in this one's place."""
        super().register_parameter(name, None if param is None else param.requires_grad_(False))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenFactor:
        before = self.weight.data
        super()._apply(fn, recurse)
        if self.keep_precision and self.weight.dtype != before.dtype:
            self.weight = nn.Parameter(before.to(self.weight.device), requires_grad=False)
        return self


class FactorScope:
    """While open, no parameter changes: folded factors may be reused. One is shared by the layers of a model.

    It is opened around one ``generate`` or ``forward`` of the PEFT model only. A longer-lived cache would need to
    notice every write to a parameter, and fused optimisers and ``.data`` copies leave no trace to notice.
    """

    def __init__(self) -> None:
        self.depth = 0
        self.folded: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}

    @contextmanager
    def open(self) -> Iterator[None]:
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1
            if self.depth == 0:
                self.folded.clear()

    @property
    def usable(self) -> bool:
        return self.depth > 0 and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


@dataclass(frozen=True)
class AdapterGeometry:
    """What a layer knows of one of its adapters besides the tensors."""

    request: StartRequest

    @property
    def difference(self) -> bool:
        """Whether both factors start away from zero, so that the starts' product has to be taken out."""
        return self.request.config.init_factors == "both"


def stored_starts(config: OffPrincipalLoraConfig) -> tuple[bool, bool]:
    """Which starts (A, B) are kept: those that the update subtracts and those that cost a decomposition.

    A factor that does not train is its own record.
    """
    costly = config.init_subspace in ("top", "bottom", "null")
    kept = []
    for factor, other in (("A", "B"), ("B", "A")):
        started = config.init_factors in (factor, "both")
        is_own_record = config.train_factors == other and config.init_factors != "both"
        kept.append(started and not is_own_record and (costly or config.init_factors == "both"))
    return kept[0], kept[1]


def weight_of(container: nn.ModuleDict, adapter_name: str) -> Tensor:
    """A factor's weight, brought in where accelerate keeps it elsewhere between calls of its module."""
    module: Any = container[adapter_name]
    hook = getattr(module, "_hf_hook", None)
    if hook is not None and module.weight.is_meta:
        hook.pre_forward(module)
        weight: Tensor = module.weight
        hook.post_forward(module, None)
        return weight
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def check_gathered(where: str, *factors: Tensor) -> None:
    """Raises ``RuntimeError`` for factors that are not whole: ZeRO-3's, and FSDP2's outside of a forward."""
    for factor in factors:
        check_not_partitioned(where, "the adapter's factors", factor)
        if is_dtensor(factor):
            raise RuntimeError(
                f"{where}: the adapter's factors are sharded and were not gathered, which FSDP does for the forward of "
                "the unit that fully_shard was given (give it whole blocks, not the layers in them). Merge, export and "
                "inspect the update in a process that loads the saved adapter on a whole model (docs/distributed.md)."
            )


def check_loaded(
    expected: dict[str, tuple[int, ...]], present: set[str], state_dict: dict[str, Any], request: StartRequest
) -> None:
    missing = sorted(set(expected) - present)
    if missing:
        raise ValueError(
            f"{request.where}: the saved adapter is incomplete, it lacks {', '.join(missing)}. Starts and bases are "
            "part of an adapter and are never recomputed for loaded factors."
        )
    for key in sorted(present):
        found = tuple(state_dict[key].shape)
        if found != expected[key]:
            raise ValueError(
                f"{request.where}: the saved adapter has {key} of shape {found}, but this layer with r = {request.r} "
                f"and k = {request.k} needs {expected[key]}. The folder was made for a base with other shapes or "
                "with another config."
            )
