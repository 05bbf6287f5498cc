"""The two methods' configs as PEFT's tests write them.

PEFT's tests set a boolean, ``init_lora_weights=False`` (LoRA) or ``init_weights=False`` (the others), where they need
an adapter that changes the output from the beginning. Neither method has such a start: zero at the start is what they
promise. The stand-ins take the boolean and note it, and `moved_starts` adds noise to the adapter right after its
layers were created, as one large training step would: to the factors that train, or to the packed update. The noise is
drawn from torch's global generator, as PEFT's own initialisations are, so that a test which reseeds before it loads
sees other values unless they were really loaded.

Everything else is the real config. What is read from a saved adapter is built from the real class.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offprincipal_peft import OffPrincipalLoraConfig, PrincipalSparseConfig
from offprincipal_peft.tuners.offprincipal_lora.layer import OffPrincipalLinear
from offprincipal_peft.tuners.offprincipal_lora.model import OffPrincipalLoraModel
from offprincipal_peft.tuners.principal_sparse.layer import PrincipalSparseLinear
from offprincipal_peft.tuners.principal_sparse.model import PrincipalSparseModel

# Where a test says no more than LoraConfig(target_modules=...): LoRA's r and alpha, and of the starts the one that
# fits layers of any size (r may exceed a side) and still is not LoRA's: both factors start away from zero, so that the
# update is a difference and the starts are kept.
DEFAULTS = {"r": 8, "lora_alpha": 8, "init_subspace": "kaiming", "init_scale": "native", "init_factors": "both"}


class OffPrincipal(OffPrincipalLoraConfig):
    """``OffPrincipalLoraConfig`` with other defaults."""

    moved = False

    def __init__(self, init_lora_weights: Any = True, **options: Any) -> None:
        self.moved = init_lora_weights is False
        if not self.moved:
            options["init_lora_weights"] = init_lora_weights  # the config has its own opinion about the others
        super().__init__(**DEFAULTS | options)


class OffPrincipalLora(OffPrincipal):
    """Off-principal LoRA with LoRA's own start, which keeps no frozen tensors."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"init_factors": "A"} | options)


class Sparse(PrincipalSparseConfig):
    """``PrincipalSparseConfig``."""

    moved = False

    def __init__(self, init_weights: bool = True, **options: Any) -> None:
        self.moved = init_weights is False
        super().__init__(**options)


def _like_lora(weight: Tensor) -> Tensor:
    """What ``init_lora_weights=False`` leaves in a LoRA factor: the draw of a fresh ``nn.Linear``."""
    return nn.init.kaiming_uniform_(torch.empty_like(weight), a=5**0.5)


@torch.no_grad()
def move(host: nn.Module, adapter: str) -> None:
    """Take an adapter that was just created away from its start."""
    for layer in host.modules():
        if isinstance(layer, OffPrincipalLinear) and adapter in layer.lora_A:
            trained = layer.geometry[adapter].request.config.train_factors
            for factor, container in (("A", layer.lora_A), ("B", layer.lora_B)):
                weight = container[adapter].weight
                if trained in (factor, "both") and not weight.is_meta:
                    weight.add_(_like_lora(weight))
        elif isinstance(layer, PrincipalSparseLinear) and adapter in layer.princsparse_delta:
            delta = layer.delta(adapter)
            if not delta.weight.is_meta:
                noise = torch.rand(delta.count) - 0.5
                delta.weight.copy_(delta.layout.expand(noise.to(delta.weight.dtype)))


@contextmanager
def moved_starts() -> Iterator[None]:
    """Within it, adapters of a stand-in that asked for it are created away from their start."""
    with pytest.MonkeyPatch.context() as patch:
        for tuner in (OffPrincipalLoraModel, PrincipalSparseModel):
            patch.setattr(tuner, "inject_adapter", _moving(tuner.inject_adapter))
        yield


def _moving(inject: Any) -> Any:
    def inject_adapter(self: Any, model: nn.Module, adapter_name: str, *args: Any, **options: Any) -> None:
        inject(self, model, adapter_name, *args, **options)
        if getattr(self.peft_config[adapter_name], "moved", False):
            move(model, adapter_name)

    return inject_adapter
