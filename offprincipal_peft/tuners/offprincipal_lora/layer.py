"""The adapter layer: PEFT's LoRA linear with starts that are subtracted, projected factors and an exact unmerge.

The factors are projected, never the activations: a step pays O(k r d) once instead of O(k d) per token, the
guarantee holds for whatever optimiser wrote the raw factors, and while a model generates the projected factors are
computed once (:class:`FactorScope`).
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn
from torch.nn import functional as F

from ...geometry.numerics import full_precision
from ..base_weight import pristine_state, quantization, undo_packing
from ..pending import PendingStarts
from ..sharding import managed_by_fsdp, sharded_like
from .config import OffPrincipalLoraConfig
from .fold import folded_factors
from .inits import Bases, LayerStart, StartRequest, compute_start
from .merging import ExactMerge
from .state import (
    AdapterGeometry,
    FactorScope,
    FrozenFactor,
    check_gathered,
    check_loaded,
    stored_starts,
    weight_of,
)


class OffPrincipalVariant(LoraVariant):
    """PEFT's hook into a LoRA layer's forward; the work is done by :class:`OffPrincipalLinear`."""

    @staticmethod
    def init(module: OffPrincipalLinear, adapter_name: str, **kwargs: Any) -> None:
        module.install(adapter_name, kwargs["request"], kwargs.get("start"), kwargs.get("pending"))

    @staticmethod
    def forward(module: OffPrincipalLinear, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """``x`` (..., d_in) in the adapter's dtype, ``result`` (..., d_out) from the base layer."""
        x = module.lora_dropout[active_adapter](x)
        if module.is_plain(active_adapter):
            update = module.lora_B[active_adapter](module.lora_A[active_adapter](x))
            return result + update * module.scaling[active_adapter]
        left, right = module.folded_for_forward(active_adapter)
        return result + F.linear(F.linear(x, right), left)


class OffPrincipalLinear(ExactMerge, LoraLinear):
    """LoRA linear for ``nn.Linear`` and ``Conv1D`` bases with off-principal geometry."""

    merged_adapters: list[str]
    frozen_peft_weight_names: dict[str, tuple[str, ...]]
    other_param_names = (
        *LoraLinear.other_param_names,
        "lora_start_A",
        "lora_start_B",
        "lora_basis_U",
        "lora_basis_V",
        "geometry",
    )

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, **kwargs)
        self.kwargs: dict[str, Any] = {}  # PEFT keeps the arguments, ours hold whole starts

    @property
    def lora_variants(self) -> dict[tuple[str, ...], type[LoraVariant] | None]:
        return {("init_subspace",): OffPrincipalVariant}

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._is_4bit and torch.is_grad_enabled():
            undo_packing(self.get_base_layer(), self._pristine)
        out: Tensor = super().forward(x, *args, **kwargs)
        return out

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        if not isinstance(config, OffPrincipalLoraConfig):
            raise ValueError(
                f"{self._name} carries off-principal layers, which take no {type(config).__name__} adapters: "
                "unload() first, or use OffPrincipalLoraConfig.preset('lora'), which is the same method as plain LoRA."
            )
        if not hasattr(self, "lora_basis_U"):
            self.lora_start_A = nn.ModuleDict({})  # (r, d_in) each
            self.lora_start_B = nn.ModuleDict({})  # (d_out, r)
            self.lora_basis_U = nn.ModuleDict({})  # (d_out, k)
            self.lora_basis_V = nn.ModuleDict({})  # (d_in, k)
            self.geometry: dict[str, AdapterGeometry] = {}
            self.scope = FactorScope()  # replaced by the model's own, which its layers share
            self._pending: dict[str, PendingStarts] = {}
            self._merge_record, self._quantized, self.merged_dtype = None, (), torch.float32
            self._pristine = pristine_state(self.get_base_layer())
            self._is_4bit = quantization(self.get_base_layer()) == "4bit"
            self.register_state_dict_post_hook(_save_starts_as_subtracted)
        super().update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)

    def install(
        self,
        adapter_name: str,
        request: StartRequest,
        start: LayerStart | None,
        pending: PendingStarts | None,
    ) -> None:
        """Create the frozen tensors of an adapter and write its start, or note that its values are still to come."""
        config = request.config
        self.geometry[adapter_name] = AdapterGeometry(request)
        has_A, has_B = stored_starts(config)
        (d_out, d_in), r, k = request.shape, request.r, request.k
        dtype = torch.promote_types(self.get_base_layer().weight.dtype, torch.float32)
        frozen = [(self.lora_start_A, has_A, (r, d_in), False), (self.lora_start_B, has_B, (d_out, r), False)]
        frozen += [
            (self.lora_basis_U, config.projection in ("output", "both"), (d_out, k), True),
            (self.lora_basis_V, config.projection in ("input", "both"), (d_in, k), True),
        ]
        for container, wanted, shape, keep_precision in frozen:
            if wanted:
                container[adapter_name] = FrozenFactor(shape, dtype, keep_precision=keep_precision)
        self.lora_A[adapter_name].to(dtype)
        self.lora_B[adapter_name].to(dtype)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        if config.train_factors != "both":
            names = dict(self.frozen_peft_weight_names)
            names[adapter_name] = ("lora_B",) if config.train_factors == "A" else ("lora_A",)
            self.frozen_peft_weight_names = names
        if start is not None:
            self._write_start(adapter_name, start)
        if pending is not None:
            self._pending[adapter_name] = pending
            if start is None:
                pending.unstarted.add(request.name)

    @torch.no_grad()
    def _write_start(self, adapter_name: str, start: LayerStart) -> None:
        for container, value in (
            (self.lora_A, start.A),
            (self.lora_B, start.B),
            (self.lora_start_A, start.A),
            (self.lora_start_B, start.B),
            (self.lora_basis_U, start.U),
            (self.lora_basis_V, start.V),
        ):
            if adapter_name in container and value is not None:
                weight_of(container, adapter_name).copy_(value)

    def ensure_started(self, adapter_name: str) -> None:
        """Compute a postponed start. Raises ``ValueError`` where a saved adapter filled other layers but not this."""
        pending = self._pending.get(adapter_name)
        request = self.geometry[adapter_name].request
        if pending is None or request.name not in pending.unstarted:
            return
        pending.check_complete()
        self._write_start(adapter_name, compute_start(self.original_weight(), request))
        pending.unstarted.discard(request.name)

    def known_start(self, request: StartRequest) -> tuple[LayerStart | None, Bases]:
        """What another adapter of this layer already holds: its whole start if the keys agree, and its bases."""
        bases: list[Tensor | None] = [None, None]
        start = None
        for name, other in self.geometry.items():
            self.ensure_started(name)
            for i, container in enumerate((self.lora_basis_U, self.lora_basis_V)):
                if name in container and other.request.k == request.k:
                    bases[i] = weight_of(container, name).detach().clone()
            if other.request.start_key == request.start_key and start is None:
                start = self._recorded_factors(name, other)
        known = Bases(*bases)
        projection = request.config.projection
        complete = (projection in ("none", "input") or known.U is not None) and (
            projection in ("none", "output") or known.V is not None
        )
        if start is None or not complete:
            return None, known
        U = known.U if projection in ("output", "both") else None
        V = known.V if projection in ("input", "both") else None
        return LayerStart(*start, U, V), known

    def _recorded_factors(self, name: str, geometry: AdapterGeometry) -> tuple[Tensor, Tensor] | None:
        """The starting A and B of adapter ``name``, or ``None`` where they were cheap and not kept."""
        factors = []
        for factor, container, live in (
            ("A", self.lora_start_A, self.lora_A),
            ("B", self.lora_start_B, self.lora_B),
        ):
            config = geometry.request.config
            if config.init_factors not in (factor, "both"):
                factors.append(torch.zeros_like(weight_of(live, name)))
            elif name in container:
                factors.append(weight_of(container, name).detach().clone())
            elif config.train_factors not in (factor, "both"):
                factors.append(weight_of(live, name).detach().clone())
            else:
                return None
        return factors[0], factors[1]

    # -- the update -------------------------------------------------------------------------------------------

    def is_plain(self, adapter_name: str) -> bool:
        """Whether the update is the product of the raw factors, as in LoRA.

        Not so where one of them was cast alone (TRL casts what trains on a quantised base): folding brings them to
        one dtype.
        """
        if self._pending:
            self.ensure_started(adapter_name)
        geometry = self.geometry[adapter_name]
        if geometry.difference or geometry.request.config.projection != "none":
            return False
        return weight_of(self.lora_A, adapter_name).dtype == weight_of(self.lora_B, adapter_name).dtype

    def effective_factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """``left`` (d_out, R), ``right`` (R, d_in) with ``dW = left @ right``; R is r, or 2r where both factors
        started away from zero and both train. fp32 (fp64 for fp64 factors), differentiable, scaling included."""
        left, right = self._fold(adapter_name)
        return left * self.scaling[adapter_name], right

    def folded_for_forward(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """:meth:`effective_factors` in the parameters' dtype, reused inside an open :class:`FactorScope`."""
        key = (id(self), adapter_name)
        if self.scope.usable and key in self.scope.folded:
            return self.scope.folded[key]
        left, right = self.effective_factors(adapter_name)
        dtype = weight_of(self.lora_A, adapter_name).dtype
        folded = (left.to(dtype), right.to(dtype))
        if self.scope.usable:
            self.scope.folded[key] = folded
        return folded

    def _fold(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        if self._pending:
            self.ensure_started(adapter_name)
        B, A = weight_of(self.lora_B, adapter_name), weight_of(self.lora_A, adapter_name)
        check_gathered(self._name, A, B)
        B0, A0 = self.subtracted_starts(adapter_name)
        return folded_factors(
            B,
            A,
            B0=B0,
            A0=A0,
            U=self._basis(self.lora_basis_U, adapter_name),
            V=self._basis(self.lora_basis_V, adapter_name),
            train_factors=self.geometry[adapter_name].request.config.train_factors,
        )

    def _basis(self, container: nn.ModuleDict, adapter_name: str) -> Tensor | None:
        if adapter_name not in container:
            return None
        basis = weight_of(container, adapter_name).detach()
        if basis.dtype not in (torch.float32, torch.float64):
            raise self._was_cast("basis", basis.dtype)
        return basis

    def _was_cast(self, what: str, dtype: torch.dtype) -> RuntimeError:
        if managed_by_fsdp(self):
            return RuntimeError(
                f"{self._name}: FSDP's mixed precision casts a {what} of the adapter to {dtype} for the forward: a "
                "rounded basis does not guarantee its projection, and a rounded difference loses small updates. Load "
                "the base model in bfloat16 and use no mixed precision (accelerate: mixed_precision: 'no'; "
                "TrainingArguments: bf16=False), which leaves the adapter in float32 (docs/distributed.md)."
            )
        return RuntimeError(
            f"{self._name}: a {what} of the adapter was cast to {dtype} by code that writes parameters' data (PEFT's "
            "cast_mixed_precision_params does), which is another start and another guarantee. Cast the model with "
            ".to(dtype) instead, and load the adapter again."
        )

    def subtracted_starts(self, adapter_name: str) -> tuple[Tensor | None, Tensor | None]:
        """B0 and A0 where the update subtracts their product, in the dtype and of the rank of the live factors.

        A trainer may cast those alone (TRL does on quantised bases), hotswapping may pad them with zeros: the start
        still cancels exactly.
        """
        if not self.geometry[adapter_name].difference:
            return None, None
        B, A = weight_of(self.lora_B, adapter_name), weight_of(self.lora_A, adapter_name)
        B0, A0 = (weight_of(kept, adapter_name).detach() for kept in (self.lora_start_B, self.lora_start_A))
        if B0.itemsize < B.itemsize:
            raise self._was_cast("start", B0.dtype)
        if B.itemsize < 4 and managed_by_fsdp(self) and quantization(self.get_base_layer()) is None:
            raise self._was_cast("factor", B.dtype)
        B0, A0 = B0.to(B.dtype), A0.to(A.dtype)
        padding = A.shape[0] - A0.shape[0]
        return (F.pad(B0, (0, padding)), F.pad(A0, (0, 0, 0, padding))) if padding else (B0, A0)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """dW of an adapter in the base weight's layout and the factors' dtype (computed in at least fp32)."""
        with full_precision():
            left, right = self.effective_factors(adapter)
            delta = (left @ right).to(weight_of(self.lora_B, adapter).dtype)
        return delta.T if self.fan_in_fan_out else delta

    @property
    def _name(self) -> str:
        return next(iter(self.geometry.values())).request.name if self.geometry else "a layer"

    # -- bookkeeping ------------------------------------------------------------------------------------------

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._pending.pop(adapter_name, None)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """To the base's device, but not to its dtype: starts and bases rounded to bf16 are other starts and bases."""
        device = device if device is not None else self.get_base_layer().weight.device
        for name in (*self.adapter_layer_names, *self.other_param_names):
            container = getattr(self, name, None)
            if not isinstance(container, nn.ModuleDict | nn.ParameterDict) or adapter_name not in container:
                continue
            if any(p.is_meta for p in container[adapter_name].parameters()):
                continue
            container[adapter_name].to(device)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, pending in self._pending.items():
            if not pending.keys_only:
                self.ensure_started(name)
        undo_packing(self.get_base_layer(), self._pristine)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Check that what is about to be loaded is whole and fits before any of it is written."""
        for name, geometry in self.geometry.items():
            expected = {
                f"{prefix}{part}.{name}.{key}": tuple(value.shape)
                for part in (
                    "lora_A",
                    "lora_B",
                    "lora_start_A",
                    "lora_start_B",
                    "lora_basis_U",
                    "lora_basis_V",
                )
                if name in getattr(self, part)
                for key, value in getattr(self, part)[name].named_parameters()
            }
            present = {key for key in expected if key in state_dict}
            if not present:
                continue
            if name in self.merged_adapters and prefix + f"lora_start_A.{name}.weight" in present:
                raise ValueError(
                    f"{geometry.request.where}: adapter {name!r} is merged, and loading new starts into it would make "
                    "the base impossible to restore. Call unmerge_adapter() first."
                )
            check_loaded(expected, present, state_dict, geometry.request)
            for key in present:
                parameter = self.get_parameter(key.removeprefix(prefix))
                state_dict[key] = sharded_like(state_dict[key], parameter)
            pending = self._pending.pop(name, None)
            if pending is not None:
                pending.unstarted.discard(geometry.request.name)
                pending.filled.add(geometry.request.name)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _save_starts_as_subtracted(layer: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    """The starts that the update subtracts are saved as it rounds them, or a reloaded update would be another one."""
    assert isinstance(layer, OffPrincipalLinear)
    for name, geometry in layer.geometry.items():
        for start, factor in (("lora_start_A", layer.lora_A), ("lora_start_B", layer.lora_B)):
            key = f"{prefix}{start}.{name}.weight"
            if geometry.difference and key in state_dict:
                state_dict[key] = state_dict[key].to(weight_of(factor, name).dtype)
