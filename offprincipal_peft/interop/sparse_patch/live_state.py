"""The weights of a model in training as its merged checkpoint would hold them, one layer at a time.

Adapters are merged into their layer, read, and taken out again. This package's two methods give the base's bytes back
by themselves; of any other PEFT method the base's parameters are put aside and written back, so that training goes on
from the bytes it had.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ...tuners.base_weight import quantization
from ...tuners.offprincipal_lora.layer import OffPrincipalLinear
from ...tuners.principal_sparse.layer import PrincipalSparseLinear
from .file import PatchError


class LiveTensor(NamedTuple):
    """One tensor of the merged state. ``trained``: whether training can change it; ``value`` is the model's own."""

    name: str
    value: Tensor
    trained: bool
    layer: nn.Module | None  # the adapter layer that it belongs to


class LiveState:
    """What a saved, merged checkpoint of a model would hold.

    Raises :class:`PatchError` where that cannot be told layer by layer: a model that is saved under other names than it
    trains under, an adapter on one of two tied weights, prompt learning, sharded or offloaded weights, layers that
    stay quantised.
    """

    def __init__(self, model: nn.Module) -> None:
        self.adapted = model if isinstance(model, PeftModel) else None
        if self.adapted is not None and self.adapted.active_peft_config.is_prompt_learning:
            raise PatchError(
                f"{self.adapted.active_peft_config.peft_type} changes no weight: there is nothing to send."
            )
        self.model: nn.Module = self.adapted.get_base_model() if self.adapted is not None else model
        self.tied = set(getattr(self.model, "all_tied_weights_keys", None) or {})
        self._check()

    def tensors(self) -> Iterator[LiveTensor]:
        """Every tensor, each with its value until the next one is asked for. The model must not run meanwhile."""
        seen: set[int] = set()
        for item in self._walk(self.model, ""):
            # A tied weight is saved under its first name alone. A merged copy is gone before the next tensor, and its
            # id may come again.
            if item.name in self.tied or id(item.value) in seen:
                continue
            if item.layer is None:
                seen.add(id(item.value))
            yield item._replace(value=item.value.detach())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {item.name: tuple(item.value.shape) for item in self.tensors()}

    def _walk(self, module: nn.Module, prefix: str, *, merge: bool = True) -> Iterator[LiveTensor]:
        """All tensors; without ``merge`` those of adapted layers are the base's own, quantised ones packed."""
        if isinstance(module, AuxiliaryTrainingWrapper):
            yield from self._wrapped(module, prefix, merge)
            return
        if isinstance(module, BaseTunerLayer):
            with _merged(module, prefix) if merge else nullcontext(module.get_base_layer()) as plain:
                for item in _own(plain, prefix, everything=True):
                    yield item._replace(trained=True, layer=module)
            return
        yield from _own(module, prefix)
        for name, child in module.named_children():
            yield from self._walk(child, f"{prefix}.{name}" if prefix else name, merge=merge)

    def _wrapped(self, module: Any, prefix: str, merge: bool) -> Iterator[LiveTensor]:
        """``modules_to_save``: the trained copy stands for the original."""
        copies = getattr(module, "modules_to_save", None)
        if copies is None:
            raise PatchError(f"{prefix} trains single tokens, whose rows are merged at the end only; merge them first.")
        active = [name for name in module.active_adapters if name in copies]
        yield from self._walk(copies[active[0]] if active else module.original_module, prefix, merge=merge)

    def _check(self) -> None:
        parameters = dict(self.model.named_parameters())
        for name, parameter in parameters.items():
            if parameter.is_meta:
                raise PatchError(f"{name} has no values here (a meta tensor): the model is offloaded.")
            if type(parameter.data).__name__ == "DTensor" or hasattr(parameter, "ds_id"):
                raise PatchError(
                    f"{name} is sharded over processes and a patch needs whole weights. Save a checkpoint of each step "
                    "and use make_patch, or train with DDP."
                )
        layers = {name: module for name, module in self.model.named_modules() if isinstance(module, BaseTunerLayer)}
        for name, module in self.model.named_modules():
            inside = any(name.startswith(f"{layer}.") for layer in layers)
            if not inside and not isinstance(module, BaseTunerLayer) and quantization(module) is not None:
                raise PatchError(
                    f"{name} is quantised and has no adapter, so that its checkpoint would stay quantised. Adapt every "
                    "quantised layer, or train on a float base."
                )
        shared = {*self.tied, *(getattr(self.model, "all_tied_weights_keys", None) or {}).values()}
        for name in layers:
            if f"{name}.weight" in shared:
                raise PatchError(f"{name} shares its weight with another layer; an adapter on one of them unties them.")
        self._check_names()

    def _check_names(self) -> None:
        """transformers saves some models (experts, above all) under other names and in other shapes."""
        from transformers import PreTrainedModel

        if not isinstance(self.model, PreTrainedModel):
            return
        from transformers.core_model_loading import revert_weight_conversion

        names = {
            item.name: torch.empty(item.value.shape, dtype=item.value.dtype, device="meta")
            for item in self._walk(self.model, "", merge=False)
        }
        saved = revert_weight_conversion(self.model, dict(names))
        if set(saved) != set(names):
            other = next(iter(set(names) - set(saved)))
            raise PatchError(
                f"{type(self.model).__name__} is saved under other names than it trains under ({other}); make patches "
                "from saved checkpoints (make_patch)."
            )


def _own(module: nn.Module, prefix: str, *, everything: bool = False) -> Iterator[LiveTensor]:
    """The parameters and saved buffers of one module (``everything``: and of its children)."""
    for name, parameter in module.named_parameters(recurse=everything):
        yield LiveTensor(f"{prefix}.{name}" if prefix else name, parameter, parameter.requires_grad, None)
    for path, child in module.named_modules() if everything else [("", module)]:
        for name, buffer in child.named_buffers(recurse=False):
            if name not in child._non_persistent_buffers_set:
                full = ".".join(part for part in (prefix, path, name) if part)
                yield LiveTensor(full, buffer, True, None)


@contextmanager
def _merged(layer: Any, name: str) -> Iterator[nn.Module]:
    """The layer's plain module with its active adapters in its weights, for the time of the block."""
    if layer.merged or layer.disable_adapters:
        yield layer.get_base_layer()
        return
    own = isinstance(layer, (OffPrincipalLinear, PrincipalSparseLinear))
    kept: dict[nn.Parameter, Tensor] = {}
    if not own:
        kept = {p: p.data.clone() for p in layer.get_base_layer().parameters()}
    with torch.no_grad():
        try:
            layer.merge()
        except (ValueError, NotImplementedError, RuntimeError) as error:
            raise PatchError(f"{name}: its adapter cannot be merged ({error}).") from error
        try:
            yield layer.get_base_layer()
        finally:
            if layer.merged:
                layer.unmerge()
            for parameter, value in kept.items():
                parameter.data.copy_(value)
