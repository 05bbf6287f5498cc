"""Merging that can be undone: the sum rounded once, and a record from which the base's bytes come back."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from ...geometry.numerics import full_precision
from ...geometry.reversible_add import MergeRecord, Start, add_low_rank_, restore_
from ..base_weight import float_dtype, float_weight, merged_copy, quantization, weight_shape
from .state import AdapterGeometry, weight_of


class ExactMerge:
    """The merging part of an off-principal layer."""

    merged_adapters: list[str]
    _merge_record: MergeRecord | None
    _quantized: tuple[nn.Module, ...]  # the layer that a merge replaced; a tuple hides it from torch
    merged_dtype: torch.dtype  # of a merged copy of int8 codes, which do not tell

    if TYPE_CHECKING:
        base_layer: nn.Module
        fan_in_fan_out: bool
        merged: bool
        training: bool
        geometry: dict[str, AdapterGeometry]
        scaling: dict[str, float]
        lora_A: nn.ModuleDict
        lora_B: nn.ModuleDict

        @property
        def _name(self) -> str: ...
        def get_base_layer(self) -> Any: ...
        def ensure_started(self, adapter_name: str) -> None: ...
        def effective_factors(self, adapter_name: str) -> tuple[Tensor, Tensor]: ...
        def subtracted_starts(self, adapter_name: str) -> tuple[Tensor | None, Tensor | None]: ...

    def base_matrix(self) -> Tensor:
        """The base weight's data as (d_out, d_in), a view for ``Conv1D``."""
        weight = self.get_base_layer().weight.data
        return weight.T if self.fan_in_fan_out else weight

    def original_weight(self) -> Tensor:
        """The base weight (d_out, d_in) without any merged adapter; a copy while merged or quantised."""
        if self._quantized:
            return float_weight(self._quantized[0])
        if self._merge_record is None:
            return float_weight(self.get_base_layer())
        weight = self.base_matrix().clone()
        restore_(weight, self._merge_record)
        return weight

    @property
    def merge_record_nbytes(self) -> int:
        """Bytes held so that an unmerge restores the base exactly; 0 while not merged."""
        return 0 if self._merge_record is None else self._merge_record.nbytes

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write base + dW of the given (default: active) adapters into the base weight, summed before rounding.

        The update is added in fp32 (fp64 for fp32 bases) and rounded once, and a record is kept from which
        :meth:`unmerge` restores the base's bytes. A quantised layer is replaced by a float copy that holds the sum.
        With ``safe_merge`` a result with NaN or infinity raises ``ValueError`` and leaves the weight as it was.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) or [] if n in self.lora_A]
        if not names:
            return
        if self._quantized or quantization(self.get_base_layer()):
            self._merge_into_copy([*self.merged_adapters, *names], safe_merge)
            return
        before = list(self.merged_adapters)
        terms = self._merge_terms([*before, *names])
        weight = self.base_matrix()
        self._restore()
        try:
            record = add_low_rank_(weight, *terms)
            if safe_merge and not torch.isfinite(weight).all():
                restore_(weight, record)
                raise self._not_finite(names)
        except Exception:
            if before:
                self._merge_record = add_low_rank_(weight, *self._merge_terms(before))
            raise
        self._merge_record, self.merged_adapters = record, [*before, *names]

    @full_precision()
    def _merge_terms(self, names: list[str]) -> tuple[Tensor, Tensor, tuple[Start, ...]]:
        """The summed update of several adapters; frozen starts are passed on, so that a record need not copy them."""
        left, right, starts, rows = [], [], [], 0
        for name in names:
            geometry, scaling = self.geometry[name], float(self.scaling[name])
            config = geometry.request.config
            if geometry.difference and config.projection == "none" and config.train_factors == "both":
                self.ensure_started(name)
                B, A = weight_of(self.lora_B, name), weight_of(self.lora_A, name)
                B0, A0 = self.subtracted_starts(name)
                assert B0 is not None and A0 is not None
                wide = torch.promote_types(B.dtype, torch.float32)
                left.append((B.to(wide) - B0.to(wide)) * scaling)
                right.append(A.to(wide))
                starts.append(Start(slice(rows, rows + right[-1].shape[0]), B0, A0, scaling))
            else:
                for factors, factor in zip((left, right), self.effective_factors(name), strict=True):
                    factors.append(factor)
            rows += right[-1].shape[0]
        return torch.cat(left, dim=1), torch.cat(right, dim=0), tuple(starts)

    def unmerge(self) -> None:
        """Take all merged adapters out of the base weight; its bytes are then the original ones.

        In place, since a backward may still need this storage with the base's values.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._restore()
        self._hold_quantized()
        self.merged_adapters = []

    @full_precision()
    def _merge_into_copy(self, names: list[str], safe_merge: bool) -> None:
        """Replace a quantised layer by a float copy that holds the sum, rounded once; it cannot hold an update."""
        base: Any = self._quantized[0] if self._quantized else self.get_base_layer()
        dtype = float_dtype(base, self.merged_dtype)
        wide = torch.float64 if dtype == torch.float32 else torch.float32
        update = torch.zeros(weight_shape(base), dtype=wide, device=base.weight.device)
        for name in names:
            left, right = self.effective_factors(name)
            update += left.detach().to(wide) @ right.detach().to(wide)
        floats = merged_copy(base, update, dtype)
        if safe_merge and not torch.isfinite(floats.weight).all():
            raise self._not_finite(names)
        self._quantized, self.base_layer, self.merged_adapters = (base,), floats, names

    def _not_finite(self, names: list[str]) -> ValueError:
        return ValueError(
            f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken ({self._name}: "
            "NaN or infinity). The base weight was left as it was."
        )

    def _hold_quantized(self) -> None:
        if self._quantized:
            device = self.get_base_layer().weight.device
            self.base_layer, self._quantized = self._quantized[0].to(device).train(self.training), ()

    def _restore(self) -> None:
        if self._merge_record is not None:
            try:
                restore_(self.base_matrix(), self._merge_record)
            except ValueError as error:
                raise ValueError(f"{self._name}: {error}") from error
            self._merge_record = None
