"""Moving a sparse layer, saving it, and filling it from a file that is checked before anything is written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...geometry.mask_storage import fingerprint
from ..base_weight import identity, quantization, undo_packing
from ..pending import PendingStarts
from .config import PrincipalSparseConfig
from .packed import PackedDelta
from .plan import MaskPlan, no_values, other_base, read_plan, trained_dtype

Vetted = dict[str, tuple[Tensor, MaskPlan, Tensor]]


class StoredAdapters(nn.Module):
    """The part of a sparse layer that moves, saves and loads."""

    name: str
    transposed: bool
    princsparse_delta: nn.ModuleDict
    configs: dict[str, PrincipalSparseConfig]
    merged_adapters: list[str]
    _pending: dict[str, PendingStarts]
    _vetted: Vetted  # checked, about to be loaded
    _pristine: Any  # see base_weight.pristine_state

    if TYPE_CHECKING:
        merged: bool

        @property
        def device(self) -> torch.device: ...
        @property
        def sharded(self) -> bool: ...
        def check_same_mask(self, adapter: str, stored: dict[str, Tensor]) -> None: ...
        def _check_sharded_load(self, state_dict: dict[str, Any], prefix: str) -> None: ...
        @property
        def stored_shape(self) -> tuple[int, int]: ...
        def get_base_layer(self) -> nn.Module: ...
        def stored_matrix(self) -> Tensor: ...
        def delta(self, adapter: str) -> PackedDelta: ...
        def restore(self) -> None: ...
        def ensure_started(self, adapter: str) -> None: ...

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """To the base's device, but not to its dtype."""
        device = device if device is not None else self.device
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
        undo_packing(self.get_base_layer(), self._pristine)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def vet(self, adapter: str, stored: dict[str, Tensor], base: Tensor | None = None) -> tuple[MaskPlan, Tensor]:
        """Check a saved adapter's tensors for this layer and remember the result for the load that follows.

        Raises ``ValueError`` for a merged layer and whatever :func:`.plan.read_plan` refuses.
        """
        if self.sharded:
            self.check_same_mask(adapter, stored)
            plan = self.delta(adapter).plan
            assert plan is not None
            return plan, stored["weight"]
        known = self._vetted.get(adapter)
        if base is None and known is not None and known[0] is stored.get("entries"):
            return known[1], known[2]
        self._check_unmerged()
        self.restore()
        if self.device.type == "meta":
            raise ValueError(no_values(self.name))
        if base is None:
            base = identity(self.get_base_layer())
        plan, values = read_plan(
            stored,
            self.stored_shape,
            self.device,
            base,
            self.configs[adapter],
            self.delta(adapter).stored_dtype,
            transposed=self.transposed,
            where=f"{self.name}, adapter {adapter!r}",
            hint=self._dtype_hint(stored.get("base"), base),
        )
        self._vetted[adapter] = (stored["entries"], plan, values)
        return plan, values

    def _dtype_hint(self, mark: Tensor | None, base: Tensor) -> str:
        """What to do where the base's weight in another dtype is the one that the mask was made for."""
        if mark is None or torch.equal(mark.cpu(), base) or quantization(self.get_base_layer()):
            return ""
        weight = self.stored_matrix()
        dtype = trained_dtype(weight, mark)
        return "" if dtype is None else f"This one is {weight.dtype}; it was trained on it in {dtype}: load it so. "

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
        if self.sharded:
            self._check_sharded_load(state_dict, prefix)
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
            return  # the values are written by the adapter's own module
        incoming = state_dict.get(f"{prefix}base_layer.weight")
        base = None
        if incoming is not None:
            self._check_unmerged()
            self.restore()
            if quantization(self.get_base_layer()):
                self._check_same_codes(incoming)
                incoming = None
            else:
                incoming = incoming.to(self.stored_matrix().dtype)
                base = fingerprint(incoming)
        loads = {}
        for adapter in self.princsparse_delta:
            start = f"{prefix}princsparse_delta.{adapter}."
            stored = {k[len(start) :]: v for k, v in state_dict.items() if k.startswith(start)}
            plan = self.delta(adapter).plan
            if stored:
                loads[adapter] = self.vet(adapter, stored, base)
            elif base is not None and plan is not None and not torch.equal(plan.base, base):
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

    def _check_same_codes(self, incoming: Tensor) -> None:
        held = self.get_base_layer().weight
        assert isinstance(held, Tensor)
        if incoming.shape != held.shape or not torch.equal(incoming.to(held.device), held.data):
            raise ValueError(
                f"{self.name}: the state dict brings other weights for a quantised base layer, for which no mask was "
                "made. Load those weights into a model without adapters, then add or load the adapter."
            )
