"""A mask in the form a layer needs: its layout on the stored weight, its file form, the weight it was made for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...geometry.mask_storage import fingerprint, pack_units, unpack_units
from ...geometry.masks import BLOCK, MatchReport, OverlapReport, build_mask
from ...kernels import Layout, layout_of
from ..base_weight import float_weight, identity
from .config import PrincipalSparseConfig

DENSE_ABOVE = 0.6  # density from which packing="auto" carries frozen entries along
_TRANSPOSED = {"element": "element", "block": "block", "row": "column", "column": "row"}


@dataclass
class MaskPlan:
    """A mask as a layer needs it."""

    layout: Layout  # of the weight as it is stored
    base: Tensor  # fingerprint of the base weight, uint8 (16,)
    reports: list[MatchReport | OverlapReport] = field(default_factory=list)
    transposed: bool = False  # the weight is stored (d_in, d_out)
    evaluated: bool = True  # whether it is what the config's expression names here; a sum of adapters may hold less

    def packed(self) -> Tensor:
        """The mask's units as they are saved, in (d_out, d_in) orientation; made when asked for, to hold no copy."""
        units = self.layout.units()
        return pack_units(units.T if self.transposed and units.dim() == 2 else units).cpu()


def plan_mask(
    units: Tensor,
    shape: tuple[int, int],
    config: PrincipalSparseConfig,
    base: Tensor,
    *,
    transposed: bool,
    reports: list[Any] | None = None,
) -> MaskPlan:
    """The plan for units of a (d_out, d_in) mask on a weight stored as ``shape``, (d_in, d_out) where ``transposed``.

    ``base`` is the identity of the weight that the mask was made for.
    """
    stored_structure: str = config.structure
    stored_units = units
    if transposed:
        stored_structure = _TRANSPOSED[config.structure]
        stored_units = units.T.contiguous() if units.dim() == 2 else units
    dense = config.packing == "dense" or (config.packing == "auto" and float(units.float().mean()) > DENSE_ABOVE)
    layout = layout_of(stored_units, shape, stored_structure, side=BLOCK, dense=dense)
    return MaskPlan(layout, base.cpu(), reports or [], transposed)


def unit_shape(shape: tuple[int, int], structure: str) -> tuple[int, ...]:
    """The shape of a mask's units on a (d_out, d_in) weight."""
    if structure == "row":
        return (shape[0],)
    if structure == "column":
        return (shape[1],)
    return shape if structure == "element" else (-(-shape[0] // BLOCK), -(-shape[1] // BLOCK))


def build_plan(
    base: nn.Module, config: PrincipalSparseConfig, name: str, *, compare_with_exact: bool = True
) -> MaskPlan:
    """Evaluate a config's mask on a base layer that carries no adapter."""
    transposed, logical = isinstance(base, Conv1D), float_weight(base)
    mask = build_mask(logical, config.mask, config.mask_options(compare_with_exact=compare_with_exact), name=name)
    d_out, d_in = logical.shape
    shape = (d_in, d_out) if transposed else (d_out, d_in)
    return plan_mask(mask.units, shape, config, identity(base), transposed=transposed, reports=list(mask.reports))


def read_plan(
    stored: dict[str, Tensor],
    stored_shape: tuple[int, int],
    device: torch.device,
    base: Tensor,
    config: PrincipalSparseConfig,
    values_dtype: torch.dtype,
    *,
    transposed: bool,
    where: str,
    hint: str = "",
) -> tuple[MaskPlan, Tensor]:
    """The mask and values of a saved adapter. Raises ``ValueError`` for whatever does not belong together.

    Args:
        stored: the tensors of one layer, see :meth:`.packed.PackedDelta.stored`.
        stored_shape: of the base weight as it is stored.
        device: of the base weight.
        base: its identity.
        config: of the adapter.
        values_dtype: of the values this adapter stores.
        transposed: whether the weight is stored (d_in, d_out).
        where: layer and adapter, for messages.
        hint: what a base with other bytes might be, for the message.
    """
    key = "master" if config.precision == "split" else "weight"
    missing = sorted({key, "entries", "base"} - set(stored))
    if missing:
        raise ValueError(
            f"{where}: the saved adapter is incomplete, it lacks {', '.join(missing)} (found "
            f"{', '.join(sorted(stored))}). Masks travel with an adapter and are never regenerated."
        )
    if not torch.equal(stored["base"].cpu(), base):
        raise ValueError(other_base(where, hint))
    shape = (stored_shape[1], stored_shape[0]) if transposed else stored_shape
    try:
        units = unpack_units(stored["entries"], unit_shape(shape, config.structure))
    except ValueError as error:
        weight_is = f"weight {shape[0]} x {shape[1]}, structure {config.structure!r}"
        raise ValueError(f"{where} ({weight_is}): {error}.") from error
    plan = plan_mask(units.to(device), stored_shape, config, stored["base"], transposed=transposed)
    values = stored[key]
    if values.shape != (plan.layout.count,) or values.dtype != values_dtype:
        raise ValueError(
            f"{where}: the mask names {plan.layout.count} entries, for which {values_dtype} values are needed, but the "
            f"saved adapter holds {values.dtype} values of shape {tuple(values.shape)}."
        )
    return plan, values


def other_base(where: str, hint: str = "") -> str:
    return (
        f"{where}: the mask was made for a base weight with other bytes. An adapter belongs to the exact weights "
        "it was trained on: load the same base model in the same dtype and quantisation, without merged adapters. "
        f"{hint}Nothing was changed."
    )


def trained_dtype(weight: Tensor, mark: Tensor) -> torch.dtype | None:
    """The dtype in which a plain weight, as it is stored, has the identity ``mark``."""
    for dtype in dict.fromkeys((weight.dtype, torch.bfloat16, torch.float16, torch.float32)):
        if torch.equal(fingerprint(weight.to(dtype)), mark.cpu()):
            return dtype
    return None


def no_values(where: str) -> str:
    return (
        f"{where}: the base weight has no values (meta device, where accelerate's offloading keeps it), but "
        "this method keeps its values in it. Load the model onto one device."
    )
