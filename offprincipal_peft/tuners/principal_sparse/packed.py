"""The packed parameter of one adapter on one layer: its values, its mask, the base's original entries, its file form.

What the parameter holds depends on the precision: the update (fp32), the low halves of the trained values (split, as
raw bits in a bf16 tensor, since a parameter must be floating) or the trained values themselves (the bf16 ablations).
The stash is the other side of the base weight: the original entries while the weight carries this adapter; of a split
master also the trained bf16 halves while it does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...geometry.precision import join_master, split_master
from ...kernels import Layout, write_sum_, write_values_
from ...kernels.packed_update import PackedMaster, Precision, register_master
from ..sharding import inside_ddp, own_part, sharded_like, whole
from .plan import MaskPlan
from .sharded import is_move_to_meta, meta_error

if TYPE_CHECKING:
    from .layer import PrincipalSparseLinear

_CUDA_CHECKS = 64  # forwards per comparison on a GPU, where each would wait for the device
_SAMPLE = 256  # low halves that are compared to notice a write by someone who does not know what they are


class PackedDelta(nn.Module, PackedMaster):
    """One adapter's packed values on one layer. Created empty and filled by :meth:`install`."""

    def __init__(self, owner: PrincipalSparseLinear, adapter: str, precision: Precision, dtype: torch.dtype) -> None:
        super().__init__()
        self.owner, self.adapter, self.precision = (owner,), adapter, precision  # a tuple hides it from nn.Module
        self.plan: MaskPlan | None = None
        self.stash: Tensor | None = None
        self.sample: Tensor | None = None
        self.forwards = 0
        self.in_buckets = False  # whether DDP averages the gradient; for good, since gradients are accumulated
        self.kept_dtype = dtype if precision == "fp32" else torch.bfloat16  # a trainer may cast the parameter itself
        self.weight = nn.Parameter(torch.empty(0, dtype=self.kept_dtype))
        self.bind()

    # -- the optimiser's side -----------------------------------------------------------------------------------

    @property
    def layout(self) -> Layout:  # type: ignore[override]
        assert self.plan is not None
        return self.plan.layout

    def bind(self) -> None:
        """Make this module known for its parameter, which is lost where a model or a parameter was copied.

        An fp32 update that someone cast (TRL does, to bf16, on quantised bases) becomes fp32 again: in bf16 it would
        stop at 2^-9 of its size under small steps.
        """
        if self.precision == "fp32" and self.weight.dtype != self.kept_dtype:
            self.weight.data = self.weight.data.to(self.kept_dtype)
        if self.precision != "fp32":
            register_master(self.weight, self)
            # Gradients keep their precision though the parameter is bf16, but in DDP's buckets, which have its dtype.
            self.in_buckets = self.in_buckets or inside_ddp()
            self.weight.grad_dtype = self.weight.dtype if self.in_buckets else torch.float32

    def original(self) -> Tensor:
        if not self.is_written:
            return self.owner[0].gather_original(self)
        assert self.stash is not None
        return self.stash

    def current(self) -> Tensor:
        layer = self.owner[0]
        if layer.merged:
            raise RuntimeError(
                f"{layer.name}: adapter {self.adapter!r} is merged; a step would change the merged weight. Call "
                "unmerge_adapter() before training on."
            )
        layer.realise(self.adapter)
        return layer.stored_matrix()

    def stepped(self) -> None:
        self.sample = self._sample()

    # -- values -------------------------------------------------------------------------------------------------

    @property
    def is_written(self) -> bool:
        """Whether the base weight holds this adapter's values now."""
        return self.owner[0].written == self.adapter

    @property
    def count(self) -> int:
        return 0 if self.plan is None else self.plan.layout.count

    @property
    def stored_dtype(self) -> torch.dtype:
        """Of the values in a saved adapter."""
        return torch.float32 if self.precision == "split" else self.kept_dtype

    @torch.no_grad()
    def install(self, plan: MaskPlan, values: Tensor | None = None) -> None:
        """Take a mask, and values ((count,), see :meth:`values`) or the zero update. The base must be unwritten.

        The parameter object stays where its size and device do, so that an optimiser that holds it stays right.
        """
        self.owner[0].check_own_weight()
        device, slots = self.owner[0].device, plan.layout.slots
        plan.layout = plan.layout.to(device)
        self.plan, self.stash = plan, None
        if values is not None:
            values = self._expanded(values.to(device))
        if self.weight.shape != (slots,) or self.weight.device != device:
            fresh = torch.zeros(slots, dtype=self.kept_dtype, device=device)
            self.weight = nn.Parameter(fresh, requires_grad=self.weight.requires_grad)
        self.bind()
        if self.precision == "split":
            high, low = split_master(self._originals().float() if values is None else values)
            self.stash = high
            self.weight.data.copy_(low.view(torch.bfloat16))
        elif values is not None:
            self.weight.data.copy_(values)
        elif self.precision == "fp32":
            self.weight.data.zero_()
        else:
            self.weight.data.copy_(self._originals())
        self.stepped()

    def _originals(self) -> Tensor:
        return self.layout.gather(self.owner[0].stored_matrix())

    def _expanded(self, values: Tensor) -> Tensor:
        """Saved values (count,) in the layout's slots; a slot that is not trained holds the base's own value."""
        layout = self.layout
        if layout.slots == layout.count:
            return values
        if self.precision == "fp32":
            return layout.expand(values)
        expanded, mask = layout.expand(values), layout.units().view(-1)
        return torch.where(mask, expanded, self._originals().to(values.dtype))

    def values(self) -> Tensor:
        """What is saved, (count,): the fp32 update, the fp32 trained values (split) or the bf16 trained values."""
        if self.precision != "split":
            return self.layout.compress(whole(self.weight.detach())).to(self.stored_dtype)
        high = self.layout.gather(self.owner[0].stored_matrix()) if self.is_written else self.stash
        assert high is not None
        return self.layout.compress(
            join_master(high.to(torch.bfloat16), self._low())
        )  # a model that was cast meanwhile holds them wider

    @torch.no_grad()
    def write(self, matrix: Tensor) -> None:
        """Write the current values into the base weight; called with the stash of a split master in hand."""
        if self.precision == "split":
            return  # the weight is where the values live
        assert self.stash is not None
        if self.precision == "fp32":
            write_sum_(matrix, self.layout, self.stash, self.weight.detach().to(self.kept_dtype))
        else:
            write_values_(matrix, self.layout, self.weight.detach())

    @torch.no_grad()
    def enter(self, matrix: Tensor) -> None:
        """Before the first write: keep the original entries (a split master exchanges them for its values)."""
        if self.precision == "split":
            assert self.stash is not None
            original = self.layout.gather(matrix)
            write_values_(matrix, self.layout, self.stash)
            self.stash = original
        else:
            self.stash = self.layout.gather(matrix)

    @torch.no_grad()
    def leave(self, matrix: Tensor) -> None:
        """Put the original entries back, bit for bit."""
        assert self.stash is not None
        # bf16 though the model may have been cast since: these are values that bf16 held
        values = self.layout.gather(matrix).to(torch.bfloat16) if self.precision == "split" else None
        write_values_(matrix, self.layout, self.stash)
        self.stash = values

    # -- writes by others -----------------------------------------------------------------------------------------

    def _low(self) -> Tensor:
        return self.weight.detach().view(torch.int16)

    def _sample(self) -> Tensor | None:
        if self.precision != "split":
            return None
        return self._low()[:: max(1, self.weight.numel() // _SAMPLE)].clone()

    def check_untouched(self) -> None:
        """Notice low halves that were written by someone who does not hold the other half.

        A copy of another adapter's parameter with the same mask (how TRL fills its reference) is completed with that
        adapter's high halves. Anything else raises ``RuntimeError``.
        """
        self.forwards += 1
        if self.precision != "split" or (self.weight.is_cuda and self.forwards % _CUDA_CHECKS != 1):
            return
        sample = self._sample()
        if sample is None or self.sample is None or torch.equal(sample, self.sample):
            return
        layer = self.owner[0]
        for other in layer.packed():
            same = other is not self and other.precision == "split" and other.count == self.count
            if same and torch.equal(other._low(), self._low()) and torch.equal(other.entries(), self.entries()):
                layer.restore()
                assert self.plan is not None
                self.install(self.plan, other.values())
                return
        raise RuntimeError(
            f"{layer.name}: the parameter of adapter {self.adapter!r} was written from outside. With "
            "precision='split' it holds the low 16 bits of fp32 values, which only MaskedAdamW and load_state_dict "
            "may write; train with offprincipal_peft.MaskedAdamW, or use precision='fp32'."
        )

    # -- moving and storing -----------------------------------------------------------------------------------------

    def entries(self) -> Tensor:
        assert self.plan is not None
        return self.plan.packed()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedDelta:
        """Move with the model, but keep the dtype; the stash follows the base weight's dtype, as its entries do.

        Raises ``RuntimeError`` for a move of values to the meta device, which accelerate's FSDP makes on one setting.
        """
        if self.plan is not None and is_move_to_meta(fn, self.weight):
            raise meta_error(self.owner[0].name, self.adapter)
        values, grad = self.weight.data, self.weight.grad
        try:
            super()._apply(fn, recurse)
        except NotImplementedError:
            if not values.is_meta:
                raise
            return self  # moved before its values are there, as PEFT does on an int8 base: they come with a device
        if self.weight.dtype != values.dtype:
            self.weight.data = values.to(self.weight.device)
            self.weight.grad = None if grad is None else grad.to(self.weight.device)
        if self.stash is not None:
            self.stash = self.stash.to(self.weight.device) if self._stash_is_bits else fn(self.stash)
        if self.sample is not None:
            self.sample = self.sample.to(self.weight.device)
        if self.plan is not None and not self.weight.is_meta:
            self.plan.layout = self.plan.layout.to(self.weight.device)
        self.bind()
        return self

    @property
    def _stash_is_bits(self) -> bool:
        return self.precision == "split" and not self.is_written

    @property
    def base(self) -> Tensor | None:
        """The identity of the weight that the mask was made for. torch's checkpoints look every saved key up here."""
        return None if self.plan is None else self.plan.base

    @property
    def master(self) -> Tensor:
        """The fp32 values of a split master, under the name that they are saved by."""
        return self.values()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for key, value in self.stored().items():
            destination[prefix + key] = value if keep_vars else value.detach()

    def stored(self) -> dict[str, Tensor]:
        """The adapter's tensors as they are saved; empty ones while values are still to come."""
        key = "master" if self.precision == "split" else "weight"
        if self.plan is None:
            empty = torch.empty(0)
            return {key: empty, "entries": empty, "base": empty}
        whole = self.plan.layout.slots == self.plan.layout.count and self.weight.dtype == self.stored_dtype
        value = self.weight if whole else self.values()
        return {key: value, "entries": self.plan.packed(), "base": self.plan.base}

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str], *rest: Any
    ) -> None:
        """The layer has checked and installed what there is (see its ``_load_from_state_dict``), but for shards."""
        if self.owner[0].sharded and prefix + "weight" in state_dict:
            for hook in self._load_state_dict_pre_hooks.values():  # FSDP's own, after which the parameter is sharded
                hook(state_dict, prefix, metadata, strict, missing, *rest)
            values = self.layout.expand(whole(state_dict[prefix + "weight"]).to(self.kept_dtype))
            own_part(self.weight.detach()).copy_(own_part(sharded_like(values, self.weight)))
        keys = ("master" if self.precision == "split" else "weight", "entries", "base")
        missing += [prefix + key for key in keys if prefix + key not in state_dict]
        if strict:
            rest[0].extend(k for k in state_dict if k.startswith(prefix) and k[len(prefix) :] not in keys)
