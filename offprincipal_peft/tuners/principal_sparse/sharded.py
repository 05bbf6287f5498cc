"""A sparse layer under FSDP2: the gathered weight is read and never written, because what is written there is dropped.

The values are the ones that an unsharded layer writes into its weight, formed in a copy for each product
(:func:`~offprincipal_peft.kernels.summed_linear.summed_linear`). Masks are whole on every rank, packed values sharded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...kernels.summed_linear import summed_linear
from ..sharding import check_not_partitioned, is_dtensor, managed_by_fsdp, own_part
from .plan import other_base

if TYPE_CHECKING:
    from .packed import PackedDelta


class ShardedBase(nn.Module):
    """The part of a sparse layer that knows of weights that others hold."""

    name: str
    transposed: bool
    written: str | None

    if TYPE_CHECKING:
        princsparse_delta: nn.ModuleDict

        def get_base_layer(self) -> nn.Module: ...
        def delta(self, adapter: str) -> PackedDelta: ...
        def ensure_started(self, adapter: str) -> None: ...

    @property
    def sharded(self) -> bool:
        """Whether FSDP owns the base weight, gathered at this moment or not."""
        base = self.get_base_layer()
        return managed_by_fsdp(base) or is_dtensor(base.weight)  # type: ignore[arg-type]

    def stored_matrix(self) -> Tensor:
        """The base weight's data as it is stored: (d_out, d_in), or (d_in, d_out) for ``Conv1D``."""
        self.check_own_weight()
        weight = self.get_base_layer().weight
        assert isinstance(weight, Tensor)
        return weight.data

    def check_own_weight(self) -> None:
        """Raises ``RuntimeError`` where the base weight cannot be written: sharded by FSDP or partitioned by ZeRO-3."""
        weight: Any = self.get_base_layer().weight
        check_not_partitioned(self.name, "the base weight", weight)
        if not self.sharded:
            return
        if self.written is not None:
            raise RuntimeError(
                f"{self.name}: the base weight held the values of adapter {self.written!r} when FSDP sharded it. Call "
                "model.base_model.disable_adapter_layers() and enable_adapter_layers() before fully_shard, which gives "
                "the base its own bytes back."
            )
        raise RuntimeError(
            f"{self.name}: the base weight is sharded by FSDP; merging, computing masks and adding adapters need it "
            "whole. Do that before fully_shard, or save the adapter (docs/distributed.md) and load it in a process "
            "that holds the whole model."
        )

    def _on_gathered_base(self, x: Tensor, adapter: str) -> Tensor:
        """The layer's output where FSDP gathered the weight for this forward."""
        if self.written is not None:
            self.check_own_weight()
        delta, base = self.delta(adapter), self.get_base_layer()
        weight = base.weight
        assert isinstance(weight, Tensor)
        if delta.precision != "fp32":
            raise RuntimeError(
                f"{self.name}: precision={delta.precision!r} keeps the trained values in the base weight, of which "
                "FSDP leaves each rank a part that it may not write. Use precision='fp32', whose packed values FSDP "
                "shards, or train under DDP."
            )
        if is_dtensor(weight) or is_dtensor(delta.weight):
            raise RuntimeError(
                f"{self.name}: its tensors are sharded in units of their own and were not gathered for the layer's "
                "forward. Give fully_shard whole blocks (a decoder layer), not the linear layers in them; with "
                "accelerate: fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP."
            )
        self.ensure_started(adapter)
        bias = base.bias if isinstance(base.bias, Tensor) else None
        return summed_linear(x, delta.weight, weight, bias, delta.layout, transposed=self.transposed)

    def _check_sharded_load(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Raises ``ValueError`` for another base or mask than the sharded layer has; nothing is written then."""
        weight: Any = self.get_base_layer().weight
        incoming = state_dict.get(f"{prefix}base_layer.weight")
        if incoming is not None and not torch.equal(own_part(incoming), own_part(weight)):
            raise ValueError(other_base(self.name))
        for adapter in self.princsparse_delta:
            start = f"{prefix}princsparse_delta.{adapter}."
            stored = {k[len(start) :]: v for k, v in state_dict.items() if k.startswith(start)}
            if stored:
                self.check_same_mask(adapter, stored)

    def check_same_mask(self, adapter: str, stored: dict[str, Tensor]) -> None:
        """Raises ``ValueError`` unless a saved adapter's tensors are values for the mask that this layer has."""
        plan, where = self.delta(adapter).plan, f"{self.name}, adapter {adapter!r}"
        missing = sorted({"weight", "entries", "base"} - set(stored))
        if missing:
            raise ValueError(f"{where}: the saved adapter is incomplete, it lacks {', '.join(missing)}.")
        if plan is None or not torch.equal(stored["entries"].cpu(), plan.packed()):
            raise ValueError(
                f"{where}: the layer is sharded and takes values for the mask that it has; these are of another one. "
                "Load the adapter before fully_shard. Nothing was changed."
            )
        if not torch.equal(stored["base"].cpu(), plan.base):
            raise ValueError(other_base(where))
        if tuple(stored["weight"].shape) != (plan.layout.count,):
            raise ValueError(
                f"{where}: the mask names {plan.layout.count} entries, the saved values have the shape "
                f"{tuple(stored['weight'].shape)}. Into a sharded layer with packing='dense' (which 'auto' chooses for "
                "masks above 60 %) set_peft_model_state_dict loads values, set_model_state_dict does not."
            )


def meta_error(name: str, adapter: str) -> RuntimeError:
    return RuntimeError(
        f"{name}: moving adapter {adapter!r} to the meta device would lose its mask and values, and the ranks that "
        "received a model without values would have made other masks. With accelerate and FSDP set "
        "fsdp_cpu_ram_efficient_loading: false, so that every rank loads the model."
    )


def is_move_to_meta(fn: Any, values: Tensor) -> bool:
    """Whether a function that ``nn.Module._apply`` was given takes tensors to the meta device."""
    if values.is_meta or is_dtensor(values):
        return False
    probe: Tensor = fn(torch.empty(0, dtype=values.dtype, device=values.device))
    return probe.is_meta
