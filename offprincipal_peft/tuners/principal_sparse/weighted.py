"""A new adapter from a weighted sum of others: exact, on the union of their masks."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..combining import check_saved_modules, check_weights, copy_saved_modules, exact_targets
from .config import PrincipalSparseConfig
from .layer import PrincipalSparseLinear
from .plan import MaskPlan, plan_mask

if TYPE_CHECKING:
    from .model import PrincipalSparseModel

SUMS = ("linear", "cat")  # the same sum: there are no factors to concatenate


def add_weighted(tuner: PrincipalSparseModel, adapters: list[str], weights: list[float], name: str, kind: str) -> None:
    """Add adapter ``name``; see :meth:`~.model.PrincipalSparseModel.add_weighted_adapter`."""
    if kind not in SUMS:
        raise ValueError(
            f"combination_type={kind!r} decomposes or prunes low-rank updates; sparse updates are summed exactly on "
            "the union of their masks with combination_type='linear'."
        )
    check_weights(tuner.peft_config, adapters, weights, name)
    check_saved_modules(tuner.model, adapters)
    configs = [tuner.peft_config[adapter] for adapter in adapters]
    config = _config(configs)
    shares: dict[str, float] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        shares[adapter] = shares.get(adapter, 0.0) + weight  # one adapter may be named twice
    plans, sums = {}, {}
    for key, layer in tuner.model.named_modules():
        if isinstance(layer, PrincipalSparseLinear):
            present = {a: w for a, w in shares.items() if a in layer.princsparse_delta}
            if present:
                plans[key], sums[key] = _combined(layer, present, config)
    targets = exact_targets(list(plans), configs)
    tuner.peft_config[name] = dataclasses.replace(config, **targets)
    try:
        tuner.inject_with_plans(name, plans)
    except BaseException:  # interrupted or out of memory: no layer keeps half of it
        tuner.delete_adapter(name)
        raise
    for key, total in sums.items():
        layer = tuner.model.get_submodule(key)
        assert isinstance(layer, PrincipalSparseLinear)
        set_update(layer, name, total)
        layer.delta(name).weight.requires_grad_(False)
    copy_saved_modules(tuner.model, adapters, name)


def _config(configs: list[PrincipalSparseConfig]) -> PrincipalSparseConfig:
    """The config that describes the union of the masks. Raises ``ValueError`` where none does."""
    first = configs[0]
    for other in configs[1:]:
        if other.mask_options() != first.mask_options() or other.precision != first.precision:
            raise ValueError(
                "adapters are combined on the union of their masks, which a config can name only where they differ in "
                f"nothing but the mask expression; these have {_differing(first, other)}. Merge one of them into the "
                "model's weights instead (merge_and_unload)."
            )
    masks = list(dict.fromkeys(config.mask for config in configs))
    expression = masks[0] if len(masks) == 1 else " | ".join(f"({mask})" for mask in masks)
    return dataclasses.replace(first, mask=expression)


def _differing(first: PrincipalSparseConfig, other: PrincipalSparseConfig) -> str:
    names = [*(field.name for field in dataclasses.fields(first.mask_options())), "precision"]
    pairs = [(n, getattr(first, n, None), getattr(other, n, None)) for n in names]
    return ", ".join(f"{n}={a!r} and {b!r}" for n, a, b in pairs if a != b)


@torch.no_grad()
def _combined(
    layer: PrincipalSparseLinear, present: dict[str, float], config: PrincipalSparseConfig
) -> tuple[MaskPlan, Tensor]:
    """The plan of the union, and the dense sum of the updates in the stored weight's orientation."""
    total: Tensor | None = None
    units: Tensor | None = None
    for adapter, weight in present.items():
        update = layer.get_delta_weight(adapter).mul_(weight)
        plan = layer.delta(adapter).plan
        assert plan is not None
        own = plan.layout.units()
        total = update if total is None else total.add_(update)
        units = own if units is None else units | own
    assert total is not None and units is not None
    if bool(units.all()):
        raise ValueError(
            f"{layer.name}: the masks of adapters {', '.join(present)} cover every entry together, which is full "
            "fine-tuning and no mask. Merge one of them into the model's weights instead (merge_and_unload)."
        )
    if layer.transposed and units.dim() == 2:
        units = units.T  # a plan is made from units in (d_out, d_in) orientation
    plan = next(p for a in present if (p := layer.delta(a).plan) is not None)
    union = plan_mask(units, layer.stored_shape, config, plan.base, transposed=layer.transposed)
    return dataclasses.replace(union, evaluated=False), total


@torch.no_grad()
def set_update(layer: PrincipalSparseLinear, adapter: str, dense: Tensor) -> None:
    """Give an adapter the masked entries of a dense update, in the stored weight's orientation."""
    layer.restore()
    delta = layer.delta(adapter)
    plan = delta.plan
    assert plan is not None
    values = delta.layout.gather(dense.contiguous())
    if delta.precision != "fp32":
        values = delta.layout.gather(layer.stored_matrix()).float() + values.float()
    delta.install(plan, delta.layout.compress(values).to(delta.stored_dtype))
