"""What is watched of a model in training: for each 2-D layer that can move, its update since a start.

The *effective weight* is the matrix that the layer multiplies with: the base weight, plus the update of the active
adapters (of the merged ones where some are merged, of none while adapters are disabled). An observer keeps what it
needs to give dW = W_now - W_start, tensors of the size of a weight on the CPU:

| layer | kept of the start | form |
|---|---|---|
| plain LoRA, off-principal LoRA | its factors, nothing where their product was zero | factors |
| masked sparse fine-tuning | its packed update, nothing where that was zero | dense |
| a linear layer that trains itself | its weight, in its own dtype | dense |
| any other PEFT layer on a linear base | its adapters, nothing where they left the base as it is | dense |

What a method adds beside the base's product (LoRA, DoRA) is taken unrounded; what it writes into the weight before the
product (sparse fine-tuning, SHiRA, full fine-tuning) is taken as the rounded weight holds it.
"""

from __future__ import annotations

import copy
import re
from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..tuners.base_weight import float_dtype, float_weight
from ..tuners.offprincipal_lora.layer import OffPrincipalLinear
from ..tuners.principal_sparse.layer import PrincipalSparseLinear
from .effective_weights import DenseUpdate, FactoredUpdate, Update, factored_difference

Since = Literal["start", "base"]


class LayerObserver(ABC):
    """The update of one layer. Reads the model and changes nothing in it."""

    kind: str  # for reports

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def start(self) -> Tensor:
        """The effective weight (d_out, d_in) at the start, in a dtype that holds it exactly. Not to be written to."""

    @abstractmethod
    def update(self) -> Update:
        """The effective weight now minus :meth:`start`."""


class FactorObserver(LayerObserver):
    """LoRA: ``sum of s B A`` over the live adapters."""

    kind = "factors"

    def __init__(self, name: str, layer: Any, since: Since) -> None:
        super().__init__(name)
        self.layer = layer
        factors = self._factors()
        is_zero = not bool((FactoredUpdate(*factors).energies(*_empty_bases(factors))[0] > 0).item())
        self._start = None if since == "base" or is_zero else (_kept(factors[0]), _kept(factors[1]))

    def _factors(self) -> tuple[Tensor, Tensor]:
        """(d_out, R) and (R, d_in), fp32 at least, scaling included."""
        pairs = [self._pair(name) for name in live_adapters(self.layer, self.layer.lora_A)]
        if not pairs:
            d_out, d_in = _shape(self.layer)
            device = next(iter(self.layer.lora_A.parameters())).device
            return torch.zeros(d_out, 0, device=device), torch.zeros(0, d_in, device=device)
        return torch.cat([left for left, _ in pairs], 1), torch.cat([right for _, right in pairs], 0)

    def _pair(self, adapter: str) -> tuple[Tensor, Tensor]:
        layer = self.layer
        if isinstance(layer, OffPrincipalLinear):
            left, right = layer.effective_factors(adapter)
            return left.detach(), right.detach()
        A, B = layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach()
        wide = torch.promote_types(A.dtype, torch.float32)
        return B.to(wide) * float(layer.scaling[adapter]), A.to(wide)

    def start(self) -> Tensor:
        base = base_weight(self.layer)
        if self._start is None:
            return base
        left, right = (factor.to(base.device) for factor in self._start)
        return base.to(left.dtype) + left @ right

    def update(self) -> Update:
        left, right = self._factors()
        start = self._start and (self._start[0].to(left.device), self._start[1].to(left.device))
        return factored_difference((left, right), start)


class SparseObserver(LayerObserver):
    """Masked sparse fine-tuning: the entries that the base weight holds, minus its original ones."""

    kind = "sparse"

    def __init__(self, name: str, layer: PrincipalSparseLinear, since: Since) -> None:
        super().__init__(name)
        self.layer = layer
        now = self._packed()
        keep = since == "start" and now is not None and bool(now[1].count_nonzero())
        self._start = (now[0], _kept(now[1])) if keep and now is not None else None

    def _packed(self) -> tuple[str, Tensor] | None:
        """The live adapter and its packed update (slots,), as rounded into the weight; None without one."""
        names = live_adapters(self.layer, self.layer.princsparse_delta)
        if not names:
            return None
        self.layer.ensure_started(names[0])
        delta = self.layer.delta(names[0])
        if self.layer.quantized:  # added beside the base's product, unrounded
            return names[0], delta.weight.detach().to(delta.kept_dtype)
        # where the weight holds another adapter, this puts the base's bytes back; the next forward writes as always
        original, matrix = delta.original(), self.layer.stored_matrix()
        wide = torch.promote_types(matrix.dtype, torch.float32)
        if delta.precision == "fp32":
            now = (original.to(wide) + delta.weight.detach()).to(matrix.dtype)
        elif delta.precision == "split":
            held = delta.layout.gather(matrix) if delta.is_written else delta.stash
            assert held is not None
            now = held
        else:
            now = delta.weight.detach()
        return names[0], now.to(wide) - original.to(wide)

    def _dense(self, packed: tuple[str, Tensor] | None) -> Tensor:
        wide = torch.promote_types(float_dtype(self.layer.get_base_layer()), torch.float32)
        dense = torch.zeros(self.layer.stored_shape, dtype=wide, device=self.layer.device)
        if packed is not None:
            adapter, values = packed
            self.layer.delta(adapter).layout.scatter_(dense, values.to(dense))
        return dense.T if self.layer.transposed else dense

    def start(self) -> Tensor:
        layer = self.layer
        if layer.quantized:
            matrix = float_weight(layer.get_base_layer())
            return matrix if self._start is None else matrix + self._dense(self._start)
        matrix = layer.stored_matrix()
        if layer.written is not None:  # the base's own entries are in the stash
            delta = layer.delta(layer.written)
            assert delta.stash is not None
            matrix = matrix.clone()
            delta.layout.scatter_(matrix, delta.stash.to(matrix.dtype))
        base = matrix.T if layer.transposed else matrix
        return base if self._start is None else base + self._dense(self._start)

    def update(self) -> Update:
        now = self._dense(self._packed())
        return DenseUpdate(now if self._start is None else now - self._dense(self._start))


class WeightObserver(LayerObserver):
    """A linear layer whose own weight trains."""

    kind = "weight"

    def __init__(self, name: str, layer: nn.Module) -> None:
        super().__init__(name)
        self.layer = layer
        self._start = _kept(_oriented(layer))

    def start(self) -> Tensor:
        return self._start.to(_oriented(self.layer).device)

    def update(self) -> Update:
        now = _oriented(self.layer)
        wide = torch.promote_types(now.dtype, torch.float32)
        return DenseUpdate(now.to(wide) - self._start.to(now.device, wide))


class MergedObserver(LayerObserver):
    """Any PEFT layer that can merge: a copy of it is merged in fp64, read and thrown away."""

    kind = "merged copy"

    def __init__(self, name: str, layer: Any, since: Since) -> None:
        super().__init__(name)
        self.layer = layer
        now = effective_weight(layer)
        moves = layer.merged or layer.get_base_layer().weight.requires_grad
        is_base = not moves and torch.equal(now, base_weight(layer).to(now.dtype))
        shared = {} if moves else {id(layer.base_layer): layer.base_layer}
        self._start = None if since == "base" or is_base else copy.deepcopy(layer, shared)

    def start(self) -> Tensor:
        if self._start is None:
            return base_weight(self.layer)
        start = self._start
        if self.layer.merged and not start.merged:  # the base that the two share holds more than the base now
            start = copy.copy(start)
            start._modules = {**start._modules, "base_layer": _unmerged(self.layer).base_layer}
        return effective_weight(start)

    def update(self) -> Update:
        now, start = effective_weight(self.layer), self.start()
        wide = torch.promote_types(torch.promote_types(now.dtype, start.dtype), torch.float32)
        return DenseUpdate(now.to(wide) - start.to(now.device, wide))


def _kept(tensor: Tensor) -> Tensor:
    """A contiguous copy in the CPU's memory, whatever the tensor's device."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _empty_bases(factors: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    left, right = factors
    return left.new_zeros(left.shape[0], 0), right.new_zeros(right.shape[1], 0)


# -- reading PEFT's layers ------------------------------------------------------------------------------------------


def live_adapters(layer: Any, names: Any) -> list[str]:
    """The adapters among ``names`` whose update the layer computes with now."""
    if layer.disable_adapters:
        return []
    return [name for name in (layer.merged_adapters or layer.active_adapters) if name in names]


def _oriented(linear: Any) -> Tensor:
    """The weight as (d_out, d_in); ``Conv1D`` stores its transpose."""
    weight: Tensor = linear.weight.detach()
    return weight.T if isinstance(linear, Conv1D) else weight


def _shape(layer: Any) -> tuple[int, int]:
    base = layer.get_base_layer()
    if isinstance(base, Conv1D):
        return base.weight.shape[1], base.weight.shape[0]
    return base.out_features, base.in_features


def base_weight(layer: Any) -> Tensor:
    """A PEFT layer's base weight (d_out, d_in) without any adapter; a copy where it is merged or quantised."""
    if isinstance(layer, OffPrincipalLinear):
        return layer.original_weight().detach()
    base = (_unmerged(layer) if layer.merged else layer).get_base_layer()
    if base.weight.is_floating_point() and base.weight.ndim == 2:
        return _oriented(base)
    from peft.utils import resolve_quantization_backend

    weight: Tensor = resolve_quantization_backend(base).get_base_weight(base)
    return weight.detach()


def _unmerged(layer: Any) -> Any:
    twin = copy.deepcopy(layer)
    twin.unmerge()
    return twin


def effective_weight(layer: Any) -> Tensor:
    """What a PEFT layer multiplies with now, (d_out, d_in): PEFT's own merge, done to a copy of the one layer.

    The copy is widened to fp64 first: the forward of most methods adds to the product and rounds no weight, and a small
    update of a large weight would drown in the rounding of fp32.
    """
    live = live_adapters(layer, layer._get_available_adapters())
    if layer.disable_adapters or not live:
        return base_weight(layer)
    if layer.merged:
        return _oriented(layer.get_base_layer())
    twin = _copy(layer, None if _rounds_in_forward(layer) else torch.float64)
    twin.merge(adapter_names=live)
    return _oriented(twin.get_base_layer())


def _copy(layer: Any, dtype: torch.dtype | None) -> Any:
    """A copy of an unmerged layer to merge in; the base's parameters are copied once, into ``dtype`` where given."""
    base = layer.base_layer
    twin_base = copy.copy(base)
    twin_base._parameters = {
        name: None if p is None else nn.Parameter(p.detach().to(dtype=dtype, copy=True), requires_grad=False)
        for name, p in base._parameters.items()
    }
    twin_base._buffers = {name: None if b is None else b.detach().clone() for name, b in base._buffers.items()}
    twin = copy.deepcopy(layer, {id(base): twin_base})
    return twin if dtype is None else twin.to(dtype)


def _rounds_in_forward(layer: Any) -> bool:
    """SHiRA and Super-Tuning add to the weight in its own dtype in every forward (Supra's LoRA goes beside it)."""
    module = type(layer).__module__
    ranks = getattr(layer, "supertuning_rank", {})
    return module.startswith(("peft.tuners.shira.", "peft.tuners.supertuning.")) and not any(ranks.values())


def _is_factored(layer: Any) -> bool:
    """Plain LoRA or ours: the update of each adapter is scaling * B @ A with nothing else to it."""
    if isinstance(layer, OffPrincipalLinear):
        return True
    if not isinstance(layer, LoraLayer) or not isinstance(layer.lora_A, nn.ModuleDict):
        return False
    names = list(layer.lora_A)
    plain = all(type(layer.lora_A[n]) is nn.Linear and type(layer.lora_B[n]) is nn.Linear for n in names)
    return bool(names) and plain and not any(name in layer.lora_variant for name in names)


# -- finding the layers -----------------------------------------------------------------------------------------------


def observe_layers(
    model: nn.Module, pattern: str | None = None, since: Since = "start"
) -> tuple[list[LayerObserver], dict[str, str]]:
    """An observer for each layer whose weight can move, and the adapted layers that have none with the reason.

    ``pattern`` is a regular expression that is searched for in the layers' names, which are those of the model without
    PEFT's wrappers. Embeddings, norms and biases are not watched.

    Raises ``ValueError`` for a model without such a layer, a pattern that matches none, and sharded weights.
    """
    if since not in ("start", "base"):
        raise ValueError(f"since={since!r}: it is 'start' or 'base'")
    candidates = _candidates(model)
    if not candidates:
        raise ValueError(
            "no layer to observe: the model has no trainable nn.Linear or Conv1D and no PEFT layer with an active "
            "adapter on one. Was the callback given to the trainer that trains the model?"
        )
    chosen = {name: layer for name, layer in candidates.items() if pattern is None or re.search(pattern, name)}
    if not chosen:
        endings = sorted({name.rsplit(".", 1)[-1] for name in candidates})
        raise ValueError(
            f"layers={pattern!r} matches none of the {len(candidates)} layers that train, for instance "
            f"{next(iter(candidates))!r}; their names end in {', '.join(endings)}."
        )
    observers, left_out = [], {}
    for name, layer in chosen.items():
        _check_whole(name, layer)
        _check_since(name, layer, since)
        try:
            observers.append(_observer(name, layer, since))
        except Exception as error:  # whatever a PEFT layer raises that cannot merge
            left_out[name] = f"{type(layer).__module__}.{type(layer).__qualname__}: {error}"
    return observers, left_out


def _observer(name: str, layer: Any, since: Since) -> LayerObserver:
    if not isinstance(layer, BaseTunerLayer):
        return WeightObserver(name, layer)
    base = layer.get_base_layer()
    if isinstance(layer, PrincipalSparseLinear):
        return SparseObserver(name, layer, since)
    if not isinstance(base, nn.Linear | Conv1D):
        raise TypeError(f"its base is a {type(base).__name__}, not a linear layer")
    if _is_factored(layer) and not base.weight.requires_grad:
        return FactorObserver(name, layer, since)
    if not base.weight.is_floating_point():
        raise TypeError("its base is quantised")
    return MergedObserver(name, layer, since)


def _candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Layers by name, in the model's order: adapted ones as wholes, and linear layers that train by themselves."""
    inside: tuple[str, ...] = ()
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if path.startswith(inside) and inside:
            continue
        if isinstance(module, BaseTunerLayer):
            inside = (*inside, f"{path}.")
            names: Any = module._get_available_adapters()
            if set(names) & {*module.active_adapters, *module.merged_adapters}:
                found[_plain_name(path)] = module
        elif isinstance(module, nn.Linear | Conv1D) and module.weight.requires_grad:
            found[_plain_name(path)] = module
    return found


def _plain_name(path: str) -> str:
    path = path.replace("_orig_mod.", "").removeprefix("module.").removeprefix("base_model.model.")
    return re.sub(r"\.modules_to_save\.[^.]+$", "", path)


def _check_since(name: str, layer: Any, since: Since) -> None:
    base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    if since == "base" and any(p.requires_grad for p in base.parameters(recurse=False)):
        raise ValueError(
            f"since='base' measures from the weight without its adapters, but the weight of {name} trains itself; use "
            "since='start'."
        )


def _check_whole(name: str, layer: Any) -> None:
    base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    weight = getattr(base, "weight", None)
    if weight is not None and (type(weight.data).__name__ == "DTensor" or weight.numel() == 0):
        raise ValueError(
            f"{name}: its weight is sharded over several processes (FSDP or ZeRO-3), and the geometry of an update is "
            "read from whole weights. Train without sharding, or compare saved checkpoints afterwards."
        )
