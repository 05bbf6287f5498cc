"""One adapted layer with values: filled, merged and dropped.

PEFT's methods merge themselves. This package's two merge so that they can be undone, which costs several weights of
memory that nothing here needs: their updates are added directly.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..geometry.mask_storage import fingerprint
from ..geometry.numerics import full_precision
from ..tuners.offprincipal_lora.layer import OffPrincipalLinear
from ..tuners.principal_sparse.layer import PrincipalSparseLinear
from ..tuners.principal_sparse.plan import read_plan
from .adapter_skeleton import ADAPTER, Unit

_CHUNK = 1 << 20  # entries that are worked on at once


@torch.no_grad()
def merge_unit(
    unit: Unit, base: Mapping[str, Tensor], stored: Mapping[str, Tensor], restart: Any = None
) -> dict[str, Tensor]:
    """The base's parameters with the adapter merged: name in the bare model -> tensor, in the dtypes of ``base``.

    ``base`` and ``stored``: values by the paths of ``unit``; those of ``base`` are used up. ``restart``: the config of
    a method that starts by changing the base weight. Raises what PEFT raises, ``NotImplementedError`` where nothing
    was merged.
    """
    module: Any = copy.deepcopy(unit.module)
    for path, value in base.items():
        parent, _, leaf = path.rpartition(".")
        module.get_submodule(parent)._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    if restart is not None and hasattr(module, "lora_alpha"):
        module.update_layer(ADAPTER, module.r[ADAPTER], module.lora_alpha[ADAPTER], config=restart)
    left = module.load_state_dict(dict(stored), strict=False, assign=True).unexpected_keys
    if left:
        raise ValueError(f"the adapter's {left[0]} has no place in {unit.name}.")
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point() and tensor.itemsize < 4:
            tensor.data = tensor.data.float()
    merged = dict(_merged(module, unit.name).named_parameters(remove_duplicate=False))
    return {name: merged[name[len(unit.name) + 1 :]].data for name in unit.base.values()}


def _merged(module: Any, name: str) -> nn.Module:
    if isinstance(module, OffPrincipalLinear):
        _add_product(module.base_matrix(), *module.effective_factors(ADAPTER))
    elif hasattr(module, "unload_and_optionally_merge_module"):
        plain: nn.Module = module.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
        return plain
    else:
        module.merge(safe_merge=False)
        if not module.merged:
            raise NotImplementedError(f"{type(module).__name__} of {name} merges nothing")
    plain = module.get_base_layer()
    return plain


@full_precision()
def _add_product(weight: Tensor, left: Tensor, right: Tensor) -> None:
    """In place ``weight + left @ right``, summed in fp64 and rounded once, as the layer's own merge does."""
    right = right.double()
    step = max(1, _CHUNK // weight.shape[1])
    for part, rows in zip(weight.split(step), left.split(step), strict=True):
        part.copy_(part.double() + rows.double() @ right)


@torch.no_grad()
def merge_sparse(unit: Unit, weight: Tensor, trained: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
    """``weight`` plus the update of a sparse layer, before any rounding: fp32, or fp64 for an fp64 weight.

    ``trained``: the same weight in the dtype that the adapter was trained on, by whose bytes it is known. An fp32 or
    fp64 ``weight`` is used up. Raises ``ValueError`` for a mask or values that do not fit.
    """
    layer = unit.module
    assert isinstance(layer, PrincipalSparseLinear)
    config = copy.copy(layer.configs[ADAPTER])
    config.packing = "dense"  # a bit for each entry takes less memory than positions while they are made
    place = f"princsparse_delta.{ADAPTER}."
    plan, values = read_plan(
        {path.removeprefix(place): value for path, value in stored.items()},
        (weight.shape[0], weight.shape[1]),
        weight.device,
        fingerprint(trained),
        config,
        layer.delta(ADAPTER).stored_dtype,
        transposed=layer.transposed,
        where=unit.name,
    )
    merged = weight.to(torch.promote_types(weight.dtype, torch.float32))
    done, mask = 0, plan.layout.mask().view(-1)  # every layout packs its entries in row-major order
    for entries, original, chosen in zip(*(x.view(-1).split(_CHUNK) for x in (merged, trained, mask)), strict=True):
        change = values[done : done + int(chosen.sum())]
        done += len(change)
        if config.precision != "fp32":
            change = change.float() - original[chosen].float()
        entries[chosen] += change.to(entries.dtype)
    return merged
