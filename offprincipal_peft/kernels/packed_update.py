"""Write packed values into a dense weight, in chunks, and the registry of what a packed parameter stands for.

Chunks keep the int64 indices, which torch's scatters insist on, and the fp32 sums small enough for the cache.
"""

from __future__ import annotations

import weakref
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from .layout import Layout

Precision = Literal["fp32", "split", "bf16", "bf16-stochastic"]


@torch.no_grad()
def write_sum_(matrix: Tensor, layout: Layout, original: Tensor, delta: Tensor) -> None:
    """In place ``matrix[entries] = round(original + delta)``, the sum in ``delta``'s dtype.

    Args:
        matrix: (rows, columns), contiguous, any floating dtype.
        layout: the entries.
        original: (slots,) in the matrix's dtype, the entries' values without the update.
        delta: (slots,) fp32 (or wider).

    Raises ``ValueError`` where sizes or dtypes do not belong together; nothing is written then.
    """
    _check(matrix, layout, original)
    if delta.shape != (layout.slots,):
        raise ValueError(f"the layout has {layout.slots} entries, but {tuple(delta.shape)} updates were given")
    wide, rounded = delta.new_empty(0), matrix.new_empty(0)
    for part, where in layout.chunks():
        size = part.stop - part.start
        if wide.numel() < size:  # fresh memory for each chunk would double the time
            wide, rounded = delta.new_empty(size), matrix.new_empty(size)
        total = wide[:size].copy_(original[part]).add_(delta[part])  # converted first: mixed sums are slow
        layout.scatter_chunk_(matrix, where, rounded[:size].copy_(total))


@torch.no_grad()
def write_values_(matrix: Tensor, layout: Layout, values: Tensor) -> None:
    """In place ``matrix[entries] = values`` for (slots,) values in the matrix's dtype, bit for bit.

    Raises ``ValueError`` as :func:`write_sum_` does.
    """
    _check(matrix, layout, values)
    layout.scatter_(matrix, values)


def _check(matrix: Tensor, layout: Layout, values: Tensor) -> None:
    if tuple(matrix.shape) != layout.shape:
        raise ValueError(f"the layout is of a {layout.shape} matrix, the weight is {tuple(matrix.shape)}")
    if not matrix.is_contiguous():
        raise ValueError(f"the {layout.shape} weight is not contiguous: its entries cannot be addressed by position")
    if values.shape != (layout.slots,):
        raise ValueError(f"the layout has {layout.slots} entries, but {tuple(values.shape)} values were given")
    if values.dtype != matrix.dtype:
        raise ValueError(f"the values are {values.dtype}, the weight is {matrix.dtype}")


class PackedMaster:
    """What an optimiser has to know of a packed parameter that is not simply an fp32 update.

    The owner of the parameter subclasses this and registers it; :class:`~.masked_adamw.MaskedAdamW` looks it up.
    """

    precision: Precision
    layout: Layout

    def original(self) -> Tensor:
        """The entries' values without the update, (slots,) in the weight's dtype. Weight decay pulls towards them."""
        raise NotImplementedError

    def current(self) -> Tensor:
        """For a split master: the contiguous weight matrix that holds the bf16 halves now, checked and ready."""
        raise NotImplementedError

    def stepped(self) -> None:
        """Told after an optimiser that knows this master has written the parameter."""


_MASTERS: WeakIdKeyDictionary = WeakIdKeyDictionary()
_hook: object | None = None


def register_master(parameter: nn.Parameter, master: PackedMaster) -> None:
    """Make ``master`` known for ``parameter``; from then on optimisers that do not know it are refused.

    The refusal is a hook that every ``torch.optim`` optimiser runs before its step.
    """
    global _hook
    _MASTERS[parameter] = weakref.ref(master)
    if _hook is None:
        _hook = register_optimizer_step_pre_hook(_refuse_foreign_optimizer)


def master_of(parameter: Tensor) -> PackedMaster | None:
    reference = _MASTERS.get(parameter)
    return None if reference is None else reference()


def _refuse_foreign_optimizer(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
    if getattr(optimizer, "knows_packed_masters", False):
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            master = master_of(parameter)
            if master is not None:
                kind = type(optimizer)
                raise RuntimeError(
                    f"{kind.__module__}.{kind.__qualname__} cannot train a parameter of precision "
                    f"{master.precision!r}: it holds {_holds(master.precision)}, which only "
                    "offprincipal_peft.MaskedAdamW updates correctly. Use MaskedAdamW(model.parameters(), ...), or "
                    "precision='fp32', which any optimiser trains. Nothing was changed."
                )


def _holds(precision: str) -> str:
    return "the low 16 bits of an fp32 value" if precision == "split" else "bf16 weights, not an update"
