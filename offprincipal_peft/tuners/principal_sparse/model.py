"""The tuner: plans every layer's mask before the model is touched, then wraps the layers."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from ...geometry.masks import MatchReport, OverlapReport, needs_spectrum
from ..base_weight import finish_merge, model_dtype, quantization
from ..pending import PendingStarts, built_empty
from ..sharding import is_dtensor
from ..targets import check_supported, matched_targets, targets_filled_in
from ..transformers_loading import expect_nothing, expect_values
from .config import PrincipalSparseConfig
from .layer import PrincipalSparseLinear
from .mixed import named_batch
from .plan import MaskPlan, build_plan
from .scope import WriteScope
from .weighted import add_weighted

METHOD = "principal-masked sparse fine-tuning"


@dataclass(frozen=True)
class MaskReport:
    """What one layer trains."""

    trained: int  # entries
    total: int
    notes: tuple[MatchReport | OverlapReport, ...]  # of magnitude-matched pairs and randomised scores

    @property
    def density(self) -> float:
        return self.trained / self.total


class PrincipalSparseModel(BaseTuner):
    """Applies :class:`PrincipalSparseConfig` to the linear layers of a model.

    While an adapter is active the base weights hold its values on the mask; disabling, unmerging, deleting and
    unloading give them their own bytes back, and ``state_dict()`` always has the base's own.
    """

    active_adapters: list[str]

    prefix = "princsparse_"
    tuner_layer_cls = PrincipalSparseLinear
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    # -- injection ----------------------------------------------------------------------------------------------

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """As in PEFT, but every check and every mask is done before the first layer is replaced.

        Raises:
            ValueError: a target that matches nothing or cannot be adapted, a weight that another module shares, a
                mask that is empty or full on a layer; the model is then unchanged.
        """
        if "scope" not in self.__dict__:
            self.scope = WriteScope()
            self._plans: dict[str, MaskPlan] = {}
            self._given_plans: dict[str, MaskPlan] | None = None
            self._pending: dict[str, PendingStarts] = {}
        try:
            with targets_filled_in(self, adapter_name) as config:
                self._prepare_adapter_config(config, self.get_model_config(model))
                self._plan(config, adapter_name, model, low_cpu_mem_usage, state_dict)
                super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        finally:
            self._plans = {}

    def _plan(
        self,
        config: PrincipalSparseConfig,
        adapter_name: str,
        model: nn.Module,
        low_cpu_mem_usage: bool,
        state_dict: dict[str, Tensor] | None,
    ) -> None:
        """Every check and every mask, and ``target_modules`` as the layers found."""
        targets = matched_targets(self, config, model, state_dict)
        values_follow = config._values_may_follow or low_cpu_mem_usage or built_empty()
        _check_targets(config, targets, model, needs_values=not values_follow)
        self._pending.pop(adapter_name, None)
        if values_follow:
            self._pending[adapter_name] = PendingStarts(adapter_name, set(targets))
            expect_values(model, adapter_name)
        given = self._given_plans
        self._plans = _plans(config, targets, known_only=values_follow) if given is None else dict(given)

    def inject_with_plans(self, adapter_name: str, plans: dict[str, MaskPlan]) -> None:
        """Inject an adapter whose masks are known, for every layer that its config targets."""
        self._given_plans = plans
        try:
            self.inject_adapter(self.model, adapter_name)
        finally:
            self._given_plans = None

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "linear",
        **svd_options: Any,
    ) -> None:
        """Add an adapter whose update is the weighted sum of other adapters' updates, on the union of their masks.

        Args:
            adapters: names of the adapters to combine; they may differ in their mask expressions and target modules.
            weights: one finite number for each, negative ones too.
            adapter_name: of the new adapter, which is frozen.
            combination_type: ``"linear"`` (``"cat"`` is the same sum).
            svd_options: PEFT's options of other kinds (``svd_rank``, ``density``, ...), which a sum does not use.

        The sum is formed in fp32 and stored in the adapters' precision. A module that one of them trained whole
        (``modules_to_save``) is copied.

        Raises:
            ValueError: an unknown or taken name, another kind of combination, configs that differ in more than the
                mask, or masks that leave nothing frozen together.
        """
        add_weighted(self, adapters, weights, adapter_name, combination_type)

    def _create_and_replace(
        self,
        config: PrincipalSparseConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **unused: Any,
    ) -> None:
        plan, pending = self._plans.pop(current_key, None), self._pending.get(adapter_name)
        if plan is None and pending is None:
            raise KeyError(f"no mask was planned for {current_key}, which PEFT targets; {len(self._plans)} others were")
        frozen_config = copy.copy(config)  # the layer's own: the user's may change
        if isinstance(target, PrincipalSparseLinear):
            target.update_layer(adapter_name, frozen_config, plan, pending, inference_mode=config.inference_mode)
            return
        layer = PrincipalSparseLinear(target, current_key, self.scope, model_dtype(self.model))
        layer._active_adapter = adapter_name  # type: ignore[assignment]
        layer.update_layer(adapter_name, frozen_config, plan, pending, inference_mode=config.inference_mode)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Packed values have the dtype of their precision, whatever is asked for here.

        PEFT calls this when an adapter was created and again when its values were loaded, so it is also where an
        incomplete load is noticed.
        """
        if adapter_name in self._pending:
            self._pending[adapter_name].check_complete()

    def delete_adapter(self, adapter_name: str) -> None:
        """As in PEFT; a merged adapter is refused before any layer is touched."""
        if any(adapter_name in layer.merged_adapters for layer in self._layers()):
            raise ValueError(
                f"Cannot delete adapter(s) {[adapter_name]!r} while they are merged. Please unmerge them first."
            )
        super().delete_adapter(adapter_name)
        self._pending.pop(adapter_name, None)

    # -- loading ----------------------------------------------------------------------------------------------------

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Also checks every layer's tensors, so that nothing is written where one of them is refused."""
        layers = {k: m for k, m in model.named_modules() if isinstance(m, PrincipalSparseLinear)}
        layers = {k: m for k, m in layers.items() if adapter_name in m.princsparse_delta}
        pending = [m._pending[adapter_name] for m in layers.values() if adapter_name in m._pending]
        for each in pending:
            each.keys_only = True
        try:
            remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        finally:
            for each in pending:
                each.keys_only = False
        _vet(layers, adapter_name, remapped)
        for module in model.modules():
            expect_nothing(module)
        return remapped

    # -- running ------------------------------------------------------------------------------------------------------

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        mixed = nullcontext() if names is None else named_batch(self.model, names, kwargs.get("num_beams"))
        with self.scope.open(), mixed:
            yield

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        """``unload()`` returns the base model with the bytes it had."""
        if not merge:
            for layer in self._layers():
                if layer.merged:
                    layer.unmerge()
                layer.restore()
        else:
            for layer in self._layers():
                if not layer.merged:  # the merge may name another adapter than the active one, whose values are there
                    layer.restore()
        base: nn.Module = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        finish_merge(base)
        return base

    def _layers(self) -> Iterator[PrincipalSparseLinear]:
        return (m for m in self.model.modules() if isinstance(m, PrincipalSparseLinear))

    @property
    def mask_reports(self) -> dict[str, dict[str, MaskReport]]:
        """What each adapter trains in each layer: adapter -> layer name -> report. Empty while values are to come."""
        reports: dict[str, dict[str, MaskReport]] = {name: {} for name in self.peft_config}
        for layer in self._layers():
            for delta in layer.packed():
                if delta.plan is not None:
                    total = layer.in_features * layer.out_features
                    reports[delta.adapter][layer.name] = MaskReport(delta.count, total, tuple(delta.plan.reports))
        return reports


def _vet(layers: dict[str, PrincipalSparseLinear], adapter_name: str, state_dict: dict[str, Tensor]) -> None:
    """Check the tensors of every layer (key in ``state_dict`` -> layer) of an adapter; nothing is written.

    Raises ``ValueError`` where some layers have tensors and others none, and whatever a layer refuses.
    """
    stored: dict[str, dict[str, Tensor]] = defaultdict(dict)
    infix = f".princsparse_delta.{adapter_name}."
    for key, value in state_dict.items():
        path, found, name = key.rpartition(infix)
        if found:
            stored[path][name] = value
    missing = sorted(set(layers) - set(stored))
    if stored and missing:
        raise ValueError(
            f"the saved adapter has no values for {len(missing)} of the {len(layers)} layers that adapter "
            f"{adapter_name!r} targets (first: {missing[0]}); it is truncated or was made for another model. "
            "Nothing was changed."
        )
    try:
        for path, layer in layers.items():
            if path in stored:
                layer.vet(adapter_name, stored[path])
    except Exception:
        for layer in layers.values():
            layer.forget_vetted()
        raise


# -- planning: which entries, before the model is touched -----------------------------------------------------------


def _plans(config: PrincipalSparseConfig, targets: dict[str, nn.Module], *, known_only: bool) -> dict[str, MaskPlan]:
    """Every layer's mask: another adapter's where it has the same one, else evaluated on the base's own weight.

    ``known_only`` leaves out what would have to be evaluated.
    """
    plans: dict[str, MaskPlan] = {}
    compared: set[tuple[int, ...]] = set()
    for key, module in targets.items():
        known = module.known_plan(config) if isinstance(module, PrincipalSparseLinear) else None
        if known is None and known_only:
            continue
        if known is None:
            base = module
            if isinstance(module, PrincipalSparseLinear):
                if module.merged:
                    raise ValueError(f"{key}: adapter {module.merged_adapters[0]!r} is merged; unmerge it first.")
                module.restore()
                base = module.get_base_layer()
            assert isinstance(base.weight, Tensor)
            first_of_shape = tuple(base.weight.shape) not in compared and needs_spectrum(config.mask)
            known = build_plan(base, config, key, compare_with_exact=first_of_shape)
            compared.add(tuple(base.weight.shape))
        plans[key] = known
    return plans


def _check_targets(
    config: PrincipalSparseConfig, targets: dict[str, nn.Module], model: nn.Module, *, needs_values: bool
) -> None:
    owners: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.is_meta and not is_dtensor(parameter):
            owners[parameter.untyped_storage().data_ptr()].append(name.removeprefix("_orig_mod."))
    for key, module in targets.items():
        base = module.get_base_layer() if isinstance(module, PrincipalSparseLinear) else module
        check_supported(key, base, METHOD, needs_values=needs_values)
        weight = base.weight
        assert isinstance(weight, Tensor)
        if config.precision != "fp32" and quantization(base):
            raise ValueError(
                f"{key}: precision={config.precision!r} keeps the trained values in the base weight, which is "
                "quantised here and cannot hold them; use precision='fp32'."
            )
        if config.precision != "fp32" and weight.dtype != torch.bfloat16:
            raise ValueError(
                f"{key}: precision={config.precision!r} keeps the trained values in a bfloat16 weight, this one is "
                f"{weight.dtype}; load the model in bfloat16 or use precision='fp32'."
            )
        if weight.is_meta and hasattr(base, "_hf_hook"):
            raise ValueError(
                f"{key}: accelerate offloads its weight (device_map to 'cpu' or 'disk'), but {METHOD} keeps its values "
                "in the weight. Load the model onto one device, or use off-principal LoRA, which leaves it alone."
            )
        if weight.is_meta:
            continue
        if not weight.is_contiguous():
            raise ValueError(
                f"{key}: its weight of shape {tuple(weight.shape)} is stored with strides {weight.stride()}; entries "
                "are addressed by position in a contiguous weight. Replace it by weight.contiguous() first."
            )
        shared = [
            name
            for name in owners[weight.untyped_storage().data_ptr()]
            if not name.startswith(f"{key.removeprefix('_orig_mod.')}.")
        ]
        if shared:
            raise ValueError(
                f"{key}: its weight is shared with {', '.join(shared)} (tied weights): training its entries would "
                "change that module too. List it in exclude_modules, or untie the weights first."
            )
