"""The adapter layer: one dense product on a base weight that holds the adapter's values while they are needed.

The base weight is rewritten from the packed values at every forward that is not inside an open scope (one ``forward``
or ``generate`` of the PEFT model), because no trace of a write to a parameter can be relied on: fused optimisers and
``.data`` copies leave none. That costs a scatter of the masked entries and makes a stale weight impossible.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...kernels import packed_delta_linear, packed_linear, rewritten_linear
from ..base_weight import float_dtype, merged_copy, pristine_state, quantization, undo_packing, weight_shape
from ..pending import PendingStarts
from ..sharding import check_not_partitioned
from .config import PrincipalSparseConfig
from .packed import PackedDelta
from .plan import MaskPlan, build_plan, no_values
from .scope import WriteScope
from .sharded import ShardedBase
from .storing import StoredAdapters, Vetted


class PrincipalSparseLinear(StoredAdapters, ShardedBase, BaseTunerLayer):
    """Sparse fine-tuning of an ``nn.Linear``, a ``Conv1D`` or a layer that bitsandbytes quantised."""

    if TYPE_CHECKING:  # what the mixin, which carries no types, brings
        active_adapters: list[str]
        merged: bool
        disable_adapters: bool

        def get_base_layer(self) -> nn.Module: ...
        def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None: ...

    adapter_layer_names: tuple[str, ...] = ("princsparse_delta",)
    other_param_names: tuple[str, ...] = ("configs",)

    def __init__(
        self, base_layer: nn.Module, name: str, scope: WriteScope, merged_dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.merged_dtype = merged_dtype  # of a merged copy of int8 codes, which do not tell
        self.cast_input_dtype_enabled = True  # PEFT's helpers set it; inputs are never cast here
        self._pristine = pristine_state(base_layer)
        self._is_4bit = quantization(base_layer) == "4bit"
        self._quantized: tuple[nn.Module, ...] = ()  # the layer that a merge replaced; a tuple hides it from torch
        self.name, self.scope = name, scope
        self.transposed = isinstance(base_layer, Conv1D)
        self.princsparse_delta = nn.ModuleDict({})  # PackedDelta, by adapter
        self.configs: dict[str, PrincipalSparseConfig] = {}
        self.written: str | None = None  # the adapter whose values the base weight holds
        self._fresh: tuple[int, str] | None = None  # the scope in which it was last written, and the adapter
        self._pending: dict[str, PendingStarts] = {}
        self._vetted: Vetted = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    @property
    def in_features(self) -> int:
        return weight_shape(self.get_base_layer())[1]

    @property
    def out_features(self) -> int:
        return weight_shape(self.get_base_layer())[0]

    @property
    def stored_shape(self) -> tuple[int, int]:
        d_out, d_in = weight_shape(self.get_base_layer())
        return (d_in, d_out) if self.transposed else (d_out, d_in)

    @property
    def device(self) -> torch.device:
        weight = self.get_base_layer().weight
        assert isinstance(weight, Tensor)
        return weight.device

    @property
    def quantized(self) -> bool:
        """Whether the base weight cannot be written now: the update is then a product of its own."""
        return quantization(self.get_base_layer()) is not None

    # -- adapters -------------------------------------------------------------------------------------------------

    def update_layer(
        self,
        adapter: str,
        config: PrincipalSparseConfig,
        plan: MaskPlan | None,
        pending: PendingStarts | None,
        *,
        inference_mode: bool = False,
    ) -> None:
        """Add an adapter with its mask, or one whose mask and values are still to come (``plan`` is None)."""
        if self.written == adapter:
            self.restore()
        dtype = torch.promote_types(float_dtype(self.get_base_layer()), torch.float32)
        delta = PackedDelta(self, adapter, config.precision, dtype)
        self.princsparse_delta[adapter] = delta
        self.configs[adapter] = config
        self._pending.pop(adapter, None)
        if plan is not None:
            self.restore()
            delta.install(plan)
        if pending is not None:
            self._pending[adapter] = pending
            if plan is None:
                pending.unstarted.add(self.name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def known_plan(self, config: PrincipalSparseConfig) -> MaskPlan | None:
        """The mask of another adapter of this layer that the same options made."""
        for adapter, other in self.configs.items():
            same = other.mask == config.mask and other.mask_options() == config.mask_options()
            same = same and other.packing == config.packing
            plan = self.delta(adapter).plan
            if same and plan is not None and plan.evaluated:
                return dataclasses.replace(plan)
        return None

    def new_plan(self, config: PrincipalSparseConfig, *, compare_with_exact: bool) -> MaskPlan:
        """Evaluate a config's mask on the base's own weight."""
        self.restore()
        return build_plan(self.get_base_layer(), config, self.name, compare_with_exact=compare_with_exact)

    def ensure_started(self, adapter: str) -> None:
        """Compute a postponed mask. Raises ``ValueError`` where a saved adapter filled other layers but not this."""
        pending = self._pending.get(adapter)
        if pending is None or self.name not in pending.unstarted:
            return
        pending.check_complete()
        config = self.configs[adapter]
        plan = self.known_plan(config) or self.new_plan(config, compare_with_exact=False)
        self.restore()
        self.delta(adapter).install(plan)
        pending.unstarted.discard(self.name)

    def delta(self, adapter: str) -> PackedDelta:
        delta = self.princsparse_delta[adapter]
        assert isinstance(delta, PackedDelta)
        return delta

    def packed(self) -> Iterator[PackedDelta]:
        for adapter in self.princsparse_delta:
            yield self.delta(adapter)

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name in self.merged_adapters:
            raise ValueError(
                f"Cannot delete adapter(s) {[adapter_name]!r} while they are merged. Please unmerge them first."
            )
        if self.written == adapter_name:
            self.restore()
        super().delete_adapter(adapter_name)
        self._pending.pop(adapter_name, None)

    # -- the base weight --------------------------------------------------------------------------------------------

    def realise(self, adapter: str) -> None:
        """Make the base weight hold the values of ``adapter`` as they are now.

        Raises:
            RuntimeError: the weight is no longer what a split master lives in, or its parameter was written by a
                foreign optimiser.
            ValueError: a layer that a saved adapter did not fill.
        """
        key = (self.scope.number, adapter)
        if self._fresh == key and self.written == adapter and self.scope.is_open:
            return
        if self._pending:
            self.ensure_started(adapter)
        delta = self.delta(adapter)
        delta.bind()
        delta.check_untouched()
        matrix = self.stored_matrix()
        if matrix.is_meta:
            raise RuntimeError(no_values(self.name))
        if delta.precision != "fp32" and matrix.dtype != torch.bfloat16:
            raise RuntimeError(
                f"{self.name}: precision={delta.precision!r} keeps the trained values in a bfloat16 weight, which is "
                f"{matrix.dtype} now. Cast the model back to bfloat16; its values are unchanged."
            )
        if self.written != adapter:
            self.restore()
            delta.enter(matrix)
            self.written = adapter
        delta.write(matrix)
        self._fresh = key if self.scope.is_open else None

    def restore(self) -> None:
        """Give the base weight its own bytes back."""
        if self.written is not None:
            self.delta(self.written).leave(self.stored_matrix())
            self.written = self._fresh = None

    def gather_original(self, delta: PackedDelta) -> Tensor:
        """The base's own values at the entries of an adapter that is not written."""
        self.restore()
        return delta.layout.gather(self.stored_matrix())

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The dense update in the stored weight's orientation, fp32 (fp64 for an fp64 base); zero off the mask."""
        self.ensure_started(adapter)
        delta = self.delta(adapter)
        layout, values = delta.layout, delta.values()
        if delta.precision != "fp32":
            values = values.float() - layout.compress(delta.original()).float()
        dense = torch.zeros(layout.shape, dtype=values.dtype, device=values.device)
        layout.scatter_(dense, layout.expand(values))
        return dense

    def enable_adapters(self, enabled: bool) -> None:
        if not enabled and not self.merged:
            self.restore()
        super().enable_adapters(enabled)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Leave one adapter's values in the base weight: the weight that the layer computes with anyway.

        A quantised layer is replaced by a float copy that holds them. Raises ``ValueError`` for a second adapter (two
        masks' values cannot both be the weight's), and with ``safe_merge`` for values that are not finite; the weight
        is then as it was.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) or [] if n in self.princsparse_delta]
        if not names:
            return
        if len({*self.merged_adapters, *names}) > 1:
            raise ValueError(
                f"{self.name}: adapters {', '.join([*self.merged_adapters, *names])} cannot be merged together: each "
                "sets the entries it trained to its own values. Merge one, or merge_and_unload it first."
            )
        if safe_merge:
            self.ensure_started(names[0])
            if not bool(self.delta(names[0]).values().isfinite().all()):
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {names[0]} seems to be broken ({self.name}: NaN "
                    "or infinity). The base weight was left as it was."
                )
        if self.quantized:
            self._merge_into_copy(names[0])
        else:
            self.realise(names[0])
        self.merged_adapters = [names[0]]

    def _merge_into_copy(self, adapter: str) -> None:
        """Replace a quantised layer by a float copy that holds the sum, rounded once."""
        self.ensure_started(adapter)
        base = self.get_base_layer()
        floats = merged_copy(base, self.get_delta_weight(adapter), float_dtype(base, self.merged_dtype))
        self._quantized, self.base_layer = (base,), floats

    def unmerge(self) -> None:
        """Take the merged adapter out of the base weight; its bytes are then the original ones."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.merged_adapters = []
        self.restore()
        if self._quantized:
            self.base_layer, self._quantized = self._quantized[0].to(self.device).train(self.training), ()

    # -- running ------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is not None:
            self._check_names(x, adapter_names)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self._without_adapter(x)
        if adapter_names is not None:
            return self._mixed_batch_forward(x, adapter_names)
        if self.merged:
            return self._base(x, *args, **kwargs)
        adapter = self._active()
        return self._without_adapter(x) if adapter is None else self._with_adapter(x, adapter)

    def _without_adapter(self, x: Tensor) -> Tensor:
        """The base's own output, also for a backward that comes after an adapter was written into its weight."""
        self.restore()
        base: Any = self.get_base_layer()
        unwritten = self.quantized or self.sharded
        if unwritten or not torch.is_grad_enabled() or not x.requires_grad or base.weight.requires_grad:
            return self._base(x)
        return rewritten_linear(
            x, base.weight, base.bias, transposed=self.transposed, before_backward=self._restore_for_backward
        )

    def _restore_for_backward(self) -> None:
        if self.merged:
            raise RuntimeError(
                f"{self.name}: the forward ran without an adapter, but now {self.merged_adapters[0]!r} is merged. Call "
                "unmerge_adapter() before backward(). Nothing was changed."
            )
        self.restore()

    def _with_adapter(self, x: Tensor, adapter: str, *, named: bool = False) -> Tensor:
        if self.quantized:
            return self._beside_base(x, adapter)
        if self.sharded:
            return self._on_gathered_base(x, adapter)
        self.realise(adapter)
        delta = self.delta(adapter)
        if not torch.is_grad_enabled() or not (x.requires_grad or delta.weight.requires_grad):
            return self._base(x)
        base = self.get_base_layer()
        assert isinstance(base.weight, Tensor)
        return packed_linear(
            x,
            delta.weight,
            base.weight,
            base.bias if isinstance(base.bias, Tensor) else None,
            delta.layout,
            transposed=self.transposed,
            before_backward=partial(self._before_backward, adapter, delta, named),
        )

    def _beside_base(self, x: Tensor, adapter: str) -> Tensor:
        """``base(x) + dW x``: what a quantised base allows. Zero updates leave the base's output as it is."""
        self.ensure_started(adapter)
        delta = self.delta(adapter)
        check_not_partitioned(self.name, "the packed values", delta.weight)
        delta.bind()
        result = self._base(x)
        return result + packed_delta_linear(x, delta.weight, delta.layout).to(result.dtype)

    def _check_names(self, x: Tensor, adapter_names: list[str]) -> None:
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )

    def _mixed_batch_forward(self, x: Tensor, adapter_names: list[str]) -> Tensor:
        """Each sample with the adapter that it names; ``"__base__"`` and adapters without a mask here: the base's own.

        The weight is rewritten for every adapter of the batch.
        """
        result: Tensor | None = None
        for name in dict.fromkeys(adapter_names):
            rows = torch.tensor([i for i, other in enumerate(adapter_names) if other == name], device=x.device)
            part = x.index_select(0, rows)
            if name in self.princsparse_delta:
                out = self._with_adapter(part, name, named=True)
            else:
                out = self._without_adapter(part)
            result = out.new_empty((x.shape[0], *out.shape[1:])) if result is None else result
            result = result.index_copy(0, rows, out)
        assert result is not None
        return result

    def _base(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._is_4bit and torch.is_grad_enabled():
            undo_packing(self.get_base_layer(), self._pristine)
        out: Tensor = self.base_layer(x, *args, **kwargs)
        return out

    def _active(self) -> str | None:
        names = [name for name in self.active_adapters if name in self.princsparse_delta]
        if len(names) > 1:
            raise ValueError(
                f"{self.name}: adapters {', '.join(names)} are active together; a layer computes with the values of "
                "one. Activate one with set_adapter()."
            )
        return names[0] if names else None

    def _before_backward(self, adapter: str, delta: PackedDelta, named: bool) -> None:
        """Put the forward's values back where a disabled adapter or another forward took them out.

        A batch that names its adapters runs with adapters that are not active.
        """
        active = self.active_adapters
        other = self.merged_adapters and self.merged_adapters != [adapter]
        gone = adapter not in self.princsparse_delta or self.delta(adapter) is not delta
        if gone or (adapter not in active and not named) or other:
            now = f"adapter {self.merged_adapters[0]!r} is merged" if other else f"the active adapters are {active}"
            raise RuntimeError(
                f"{self.name}: the forward ran with adapter {adapter!r}, but now {now}. The weights of the forward are "
                "needed for its backward: run backward() before switching, deleting or merging adapters, or activate "
                f"{adapter!r} again. Nothing was changed."
            )
        if not self.merged and (self.written != adapter):
            self.realise(adapter)
