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

from ...geometry.mask_storage import fingerprint
from ...kernels import packed_linear
from ..pending import PendingStarts
from .config import PrincipalSparseConfig
from .packed import PackedDelta
from .plan import MaskPlan, build_plan, other_base, read_plan
from .scope import WriteScope


class PrincipalSparseLinear(nn.Module, BaseTunerLayer):
    """Sparse fine-tuning of an ``nn.Linear`` or ``Conv1D``."""

    if TYPE_CHECKING:  # what the mixin, which carries no types, brings
        active_adapters: list[str]
        merged: bool
        disable_adapters: bool

        def get_base_layer(self) -> nn.Module: ...
        def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None: ...

    adapter_layer_names: tuple[str, ...] = ("princsparse_delta",)
    other_param_names: tuple[str, ...] = ("configs",)

    def __init__(self, base_layer: nn.Module, name: str, scope: WriteScope) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name, self.scope = name, scope
        self.transposed = isinstance(base_layer, Conv1D)
        self.princsparse_delta = nn.ModuleDict({})  # PackedDelta, by adapter
        self.configs: dict[str, PrincipalSparseConfig] = {}
        self.written: str | None = None  # the adapter whose values the base weight holds
        self._fresh: tuple[int, str] | None = None  # the scope in which it was last written, and the adapter
        self._pending: dict[str, PendingStarts] = {}
        self._vetted: dict[str, tuple[Tensor, MaskPlan, Tensor]] = {}  # checked, about to be loaded
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    @property
    def in_features(self) -> int:
        return int(self.stored_matrix().shape[0 if self.transposed else 1])

    @property
    def out_features(self) -> int:
        return int(self.stored_matrix().shape[1 if self.transposed else 0])

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
        matrix = self.stored_matrix()
        dtype = torch.promote_types(matrix.dtype, torch.float32)
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
            if same and plan is not None:
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
            raise ValueError(f"Cannot delete adapter {adapter_name!r} while it is merged. Please unmerge it first.")
        if self.written == adapter_name:
            self.restore()
        super().delete_adapter(adapter_name)
        self._pending.pop(adapter_name, None)

    # -- the base weight --------------------------------------------------------------------------------------------

    def stored_matrix(self) -> Tensor:
        """The base weight's data as it is stored: (d_out, d_in), or (d_in, d_out) for ``Conv1D``."""
        weight = self.get_base_layer().weight
        assert isinstance(weight, Tensor)
        return weight.data

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

        Raises ``ValueError`` for a second adapter (two masks' values cannot both be the weight's), and with
        ``safe_merge`` for values that are not finite; the weight is then as it was.
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
                    f"NaNs or infinities detected in the values of {self.name}: adapter {names[0]} seems to be "
                    "broken. The base weight was left as it was."
                )
        self.realise(names[0])
        self.merged_adapters = [names[0]]

    def unmerge(self) -> None:
        """Take the merged adapter out of the base weight; its bytes are then the original ones."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.merged_adapters = []
        self.restore()

    # -- running ------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError("batches that mix adapters are not supported: a layer holds one adapter's weights at once")
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            self.restore()
            return self._base(x, *args, **kwargs)
        if self.merged:
            return self._base(x, *args, **kwargs)
        adapter = self._active()
        if adapter is None:
            self.restore()
            return self._base(x, *args, **kwargs)
        self.realise(adapter)
        delta = self.delta(adapter)
        if not torch.is_grad_enabled() or not (x.requires_grad or delta.weight.requires_grad):
            return self._base(x, *args, **kwargs)
        base = self.get_base_layer()
        assert isinstance(base.weight, Tensor)
        return packed_linear(
            x,
            delta.weight,
            base.weight,
            base.bias if isinstance(base.bias, Tensor) else None,
            delta.layout,
            transposed=self.transposed,
            before_backward=partial(self._before_backward, adapter, delta),
        )

    def _base(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
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

    def _before_backward(self, adapter: str, delta: PackedDelta) -> None:
        """Put the forward's values back where a disabled adapter or another forward took them out."""
        active = self.active_adapters
        other = self.merged_adapters and self.merged_adapters != [adapter]
        gone = adapter not in self.princsparse_delta or self.delta(adapter) is not delta
        if gone or adapter not in active or other:
            now = f"adapter {self.merged_adapters[0]!r} is merged" if other else f"the active adapters are {active}"
            raise RuntimeError(
                f"{self.name}: the forward ran with adapter {adapter!r}, but now {now}. The weights of the forward are "
                "needed for its backward: run backward() before switching, deleting or merging adapters, or activate "
                f"{adapter!r} again. Nothing was changed."
            )
        if not self.merged and (self.written != adapter):
            self.realise(adapter)

    # -- moving and storing --------------------------------------------------------------------------------------------

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """To the base's device, but not to its dtype."""
        device = device if device is not None else self.stored_matrix().device
        if adapter_name in self.princsparse_delta:
            delta = self.delta(adapter_name)
            if not delta.weight.is_meta and device.type != "meta":
                delta.to(device)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """The base's tensors are saved as the base's own, unless an adapter is merged into them."""
        for name, pending in self._pending.items():
            if not pending.keys_only:
                self.ensure_started(name)
        if not self.merged:
            self.restore()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def vet(self, adapter: str, stored: dict[str, Tensor], identity: Tensor | None = None) -> tuple[MaskPlan, Tensor]:
        """Check a saved adapter's tensors for this layer and remember the result for the load that follows.

        Raises ``ValueError`` for a merged layer and whatever :func:`.plan.read_plan` refuses.
        """
        known = self._vetted.get(adapter)
        if identity is None and known is not None and known[0] is stored.get("entries"):
            return known[1], known[2]
        self._check_unmerged()
        self.restore()
        if identity is None and not self.stored_matrix().is_meta:
            identity = fingerprint(self.stored_matrix())
        plan, values = read_plan(
            stored,
            self.stored_matrix(),
            identity,
            self.configs[adapter],
            self.delta(adapter).stored_dtype,
            transposed=self.transposed,
            where=f"{self.name}, adapter {adapter!r}",
        )
        self._vetted[adapter] = (stored["entries"], plan, values)
        return plan, values

    def forget_vetted(self) -> None:
        self._vetted.clear()

    def _check_unmerged(self) -> None:
        if self.merged:
            raise ValueError(
                f"{self.name}: adapter {self.merged_adapters[0]!r} is merged; loading values now would make the base "
                "impossible to restore. Call unmerge_adapter() first."
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Check everything that is about to be loaded into this layer before any of it is written."""
        incoming = state_dict.get(f"{prefix}base_layer.weight")
        identity = None
        if incoming is not None:
            self._check_unmerged()
            self.restore()
            incoming = incoming.to(self.stored_matrix().dtype)
            identity = fingerprint(incoming)
        loads = {}
        for adapter in self.princsparse_delta:
            start = f"{prefix}princsparse_delta.{adapter}."
            stored = {k[len(start) :]: v for k, v in state_dict.items() if k.startswith(start)}
            plan = self.delta(adapter).plan
            if stored:
                loads[adapter] = self.vet(adapter, stored, identity)
            elif identity is not None and plan is not None and not torch.equal(plan.base, identity):
                raise ValueError(other_base(f"{self.name}, adapter {adapter!r}"))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if incoming is not None:
            self.stored_matrix().copy_(incoming)
        for adapter, (plan, values) in loads.items():
            self.restore()
            self.delta(adapter).install(plan, values)
            pending = self._pending.pop(adapter, None)
            if pending is not None:
                pending.unstarted.discard(self.name)
                pending.filled.add(self.name)
        self.forget_vetted()
