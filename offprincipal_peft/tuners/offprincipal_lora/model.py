"""The tuner: plans and computes every layer's start before the model is touched, then injects the layers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from peft import LoraModel
from peft.tuners.lora import LoraLayer
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..base_weight import finish_merge, float_dtype, float_weight, model_dtype, weight_shape
from ..pending import PendingStarts, built_empty
from ..targets import check_supported, matched_targets, targets_filled_in
from ..transformers_loading import expect_nothing, expect_values
from .config import OffPrincipalLoraConfig
from .inits import LayerStart, StartRequest, check_request, compute_start, needs_decomposition
from .layer import OffPrincipalLinear
from .state import FactorScope
from .weighted import Combination, add_weighted

METHOD = "off-principal LoRA"


class OffPrincipalLoraModel(LoraModel):
    """Applies :class:`OffPrincipalLoraConfig` to the linear layers of a model.

    The base model's weights are read once, to compute starts and bases, and never written except by an explicit
    merge, which an unmerge undoes bit for bit.
    """

    tuner_layer_cls = OffPrincipalLinear

    # -- injection --------------------------------------------------------------------------------------------

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """As in PEFT, but every check and every start is done before the first layer is replaced.

        Raises:
            ValueError: a target, ``rank_pattern`` or ``alpha_pattern`` entry that matches nothing, a target class or
                weight that cannot be adapted, an r or k that a layer cannot hold; the model is then unchanged.
        """
        if "scope" not in self.__dict__:
            self.scope = FactorScope()
            self._requests: dict[str, StartRequest] = {}
            self._starts: dict[str, LayerStart] = {}
            self._pending: dict[str, PendingStarts] = {}
        try:
            with targets_filled_in(self, adapter_name) as config:
                self._prepare_adapter_config(config, self.get_model_config(model))
                self._plan(config, adapter_name, model, low_cpu_mem_usage, state_dict)
                super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        finally:
            self._requests, self._starts = {}, {}

    def _plan(
        self,
        config: OffPrincipalLoraConfig,
        adapter_name: str,
        model: nn.Module,
        low_cpu_mem_usage: bool,
        state_dict: dict[str, Tensor] | None,
    ) -> None:
        """Every check and every start, and ``target_modules`` as the layers found."""
        targets = matched_targets(self, config, model, state_dict)
        frozen_config = copy.copy(config)  # requests outlive this call, the user's config may change
        self._requests = {key: _request(frozen_config, key, module) for key, module in targets.items()}
        for request in self._requests.values():
            check_request(request)
        self._pending.pop(adapter_name, None)
        values_follow = config._values_may_follow or low_cpu_mem_usage or built_empty()
        if values_follow:
            self._pending[adapter_name] = PendingStarts(adapter_name, set(targets))
            expect_values(model, adapter_name)
        for key, module in targets.items():
            start = self._start(self._requests[key], module, only_if_cheap=values_follow)
            if start is not None:
                self._starts[key] = start

    def _start(self, request: StartRequest, module: nn.Module, *, only_if_cheap: bool) -> LayerStart | None:
        """The start of one layer: another adapter's where it has the same one, else computed.

        ``only_if_cheap`` returns ``None`` instead of decomposing a weight.
        """
        if not isinstance(module, OffPrincipalLinear):
            return None if only_if_cheap else compute_start(float_weight(module), request)
        start, known = module.known_start(request)
        if start is not None:
            return start
        if only_if_cheap and needs_decomposition(request, known):
            return None
        return compute_start(module.original_weight(), request, known)

    def _create_and_replace(
        self,
        lora_config: OffPrincipalLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **unused: Any,
    ) -> None:
        request = self._requests[current_key]
        pending = self._pending.get(adapter_name)
        kwargs = {
            "target_name": current_key,
            "request": request,
            "start": self._starts.pop(current_key, None),
            "pending": pending,
        }
        alpha = _pattern_value(lora_config.alpha_pattern, current_key, lora_config.lora_alpha)
        if isinstance(target, OffPrincipalLinear):
            target.update_layer(adapter_name, request.r, alpha, config=lora_config, **kwargs)
            return
        lora_config = copy.copy(lora_config)  # the layer's own: another layer, another model may differ
        lora_config.fan_in_fan_out = isinstance(target, Conv1D)
        layer = OffPrincipalLinear(
            target,
            adapter_name,
            config=lora_config,
            r=request.r,
            lora_alpha=alpha,
            is_target_conv_1d_layer=isinstance(target, Conv1D),
            **kwargs,
        )
        layer.scope, layer.merged_dtype = self.scope, model_dtype(self.model)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Adapters are created in fp32; without ``autocast_adapter_dtype`` they take the base weight's dtype.

        PEFT calls this when an adapter was created and again when its values were loaded, so it is also where an
        incomplete load is noticed. Bases always stay in fp32.
        """
        if adapter_name in self._pending:
            self._pending[adapter_name].check_complete()
        if autocast_adapter_dtype:
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
            return
        for module in self.model.modules():
            if not isinstance(module, OffPrincipalLinear) or adapter_name not in module.lora_A:
                continue
            dtype = float_dtype(module.get_base_layer(), model_dtype(self.model))
            for container in (module.lora_A, module.lora_B, module.lora_start_A, module.lora_start_B):
                if adapter_name in container:
                    container[adapter_name].to(dtype)

    def delete_adapter(self, adapter_name: str) -> None:
        """As in PEFT; a merged adapter is refused before any layer is touched."""
        layers = (m for m in self.model.modules() if isinstance(m, OffPrincipalLinear))
        if any(adapter_name in layer.merged_adapters for layer in layers):
            raise ValueError(
                f"Cannot delete adapter(s) {[adapter_name]!r} while they are merged. Please unmerge them first."
            )
        super().delete_adapter(adapter_name)
        self._pending.pop(adapter_name, None)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT reads the model's keys through ``state_dict()``, which must not start layers about to be loaded."""
        layers = [m for m in model.modules() if isinstance(m, OffPrincipalLinear)]
        pending = [layer._pending[adapter_name] for layer in layers if adapter_name in layer._pending]
        for each in pending:
            each.keys_only = True
        try:
            return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        finally:
            for each in pending:
                each.keys_only = False
            for module in model.modules():
                expect_nothing(module)

    # -- running ----------------------------------------------------------------------------------------------

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        layers: list[nn.Module] = []
        if kwargs.get("adapter_names") is not None:
            layers = [m for m in self.modules() if isinstance(m, LoraLayer | AuxiliaryTrainingWrapper)]
        hooks = [set(layer._forward_pre_hooks) for layer in layers]
        try:
            with self.scope.open(), super()._enable_peft_forward_hooks(*args, **kwargs):
                yield
        finally:  # PEFT leaves its hooks behind when the batch fails, and the next forward runs with those names
            for layer, known in zip(layers, hooks, strict=True):
                for hook in set(layer._forward_pre_hooks) - known:
                    del layer._forward_pre_hooks[hook]
                    layer._forward_pre_hooks_with_kwargs.pop(hook, None)

    def reuse_projected_factors(self) -> Any:
        """A context manager within which the caller promises that no adapter parameter changes.

        Under ``torch.no_grad()`` or ``inference_mode`` the projected factors are then computed once instead of once
        per forward. ``generate`` opens it by itself; it is for hand-written decoding loops.
        """
        return self.scope.open()

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        """``unload()`` returns the base model with the bytes it had: what is merged is taken out first."""
        if not merge:
            for module in self.model.modules():
                if isinstance(module, OffPrincipalLinear) and module.merged:
                    module.unmerge()
        base: nn.Module = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        finish_merge(base)
        return base

    # -- LoRA operations that combine raw factors -------------------------------------------------------------

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: Literal["total", "frequency"] = "total",
    ) -> None:
        """Add an adapter whose update is a weighted sum of other adapters' updates, as PEFT does for LoRA.

        Args:
            adapters: names of the adapters to combine.
            weights: one finite number for each, negative ones too.
            adapter_name: of the new adapter.
            combination_type: ``"cat"`` (exact; its rank is the sum of theirs), ``"svd"`` (the best approximation of
                ``svd_rank``), or, for adapters without a projection, PEFT's ``"ties_svd"``, ``"dare_linear_svd"``,
                ``"dare_ties_svd"`` and ``"magnitude_prune_svd"`` of the dense updates.
            svd_rank: of the kinds with an SVD; by default the largest rank among the adapters.
            svd_clamp: a quantile to which the resulting factors are clamped, as in PEFT.
            svd_full_matrices: accepted for PEFT's signature; the result does not depend on it.
            svd_driver: accepted for PEFT's signature; only factors of the rank's size are decomposed.
            density: fraction of entries that the ``ties``, ``dare`` and ``magnitude_prune`` kinds keep.
            majority_sign_method: of the ``ties`` kinds.

        The new adapter is frozen, has no start to subtract and scaling 1. Where all the adapters are projected off the
        same directions it is too. A module that one of them trained whole (``modules_to_save``) is copied.

        Raises:
            ValueError: an unknown or taken name, a combination of raw factors (``"linear"`` and its kin, which would
                not be the combination of the updates), or one that would leave the off-principal subspace.
        """
        how = Combination(combination_type, svd_rank, svd_clamp, density, majority_sign_method)
        add_weighted(self, adapters, weights, adapter_name, how)

    def subtract_mutated_init(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Refused: no base weight was mutated, so there is nothing to convert."""
        raise ValueError(
            "path_initial_model_for_weight_conversion undoes inits that change the base weight; off-principal "
            "adapters never do, and save_pretrained without it already stores the whole update."
        )

    @classmethod
    def _convert_state_dict_for_initial_model(cls, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return cls.subtract_mutated_init(*args, **kwargs)


# -- planning: what each targeted layer asks for ------------------------------------------------------------------


def _request(config: OffPrincipalLoraConfig, key: str, module: nn.Module) -> StartRequest:
    base = module.get_base_layer() if isinstance(module, OffPrincipalLinear) else module
    reads_weight = config.init_subspace in ("top", "bottom", "null") or config.projection != "none"
    check_supported(key, base, METHOD, needs_values=reads_weight and not config._values_may_follow)
    shape = weight_shape(base)
    r = _pattern_value(config.rank_pattern, key, config.r)
    alpha = _pattern_value(config.alpha_pattern, key, config.lora_alpha)
    scaling = alpha / r**0.5 if config.use_rslora else alpha / r
    return StartRequest(key, shape, r, config.resolve_principal_rank(shape), scaling, config)


def _pattern_value(patterns: dict[str, Any] | None, key: str, default: Any) -> Any:
    patterns = patterns or {}
    return patterns.get(get_pattern_key(patterns.keys(), key), default)
