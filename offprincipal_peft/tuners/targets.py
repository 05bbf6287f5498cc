"""Which modules a config targets and whether a method can adapt each: decided before the model is touched."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils.error import NoMatchingPeftModuleError
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from .base_weight import is_quantized_yet, quantization, weight_shape
from .sharding import check_not_partitioned, is_dtensor, managed_by_fsdp

# What PEFT's task models train and save whole, after adapters were added; "all-linear" must leave it to them.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
_SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@contextmanager
def targets_filled_in(tuner: BaseTuner, adapter_name: str) -> Iterator[Any]:
    """The config of an adapter about to be injected; PEFT writes the layers it finds into its ``target_modules``.

    The object stays the caller's, which PEFT's task models add to afterwards. One that was used before is copied, with
    the targets that were asked for: "all-linear" of a Llama are not those of a GPT-2. An injection that fails leaves it
    as it was.
    """
    config: Any = tuner.peft_config[adapter_name]
    asked, found = getattr(config, "_targets", (None, None))
    if found is not None and config.target_modules == found:
        config = copy.copy(config)
        config.target_modules = asked
        tuner.peft_config[adapter_name] = config
    asked = config.target_modules
    try:
        yield config
    except BaseException:
        config.target_modules = asked
        raise
    config._targets = (asked, config.target_modules)


def matched_targets(
    tuner: BaseTuner, config: Any, model: nn.Module, state_dict: dict[str, Tensor] | None
) -> dict[str, nn.Module]:
    """Modules that the config targets by their key, in model order; adapter internals excluded.

    ``"all-linear"`` in the config is replaced by the layers that it stands for.
    """
    all_linear = config.target_modules == "all-linear"
    _maybe_include_all_linear_layers(config, model)
    if all_linear:
        heads = _HEADS.get(config.task_type, ())
        config.target_modules = {t for t in config.target_modules if not any(part in heads for part in t.split("."))}
    from_checkpoint = None
    if state_dict is not None:
        from_checkpoint = {key.rsplit("." + tuner.prefix, 1)[0].removeprefix("_orig_mod.") for key in state_dict}
    inside: list[str] = []
    seen: list[str] = []
    targets: dict[str, nn.Module] = {}
    parents = dict(model.named_modules())
    for key, module in parents.items():
        if not key or any(key.startswith(prefix) for prefix in inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside.append(key + ".")
        seen.append(key)
        if from_checkpoint is not None:  # PEFT then names the layers of a compiled model without its prefix
            key = key.removeprefix("_orig_mod.")
        matched = (
            bool(tuner._check_target_module_exists(config, key)) if from_checkpoint is None else key in from_checkpoint
        )
        if matched:
            _check_parent(parents, key)
            _check_head(config, key)
            targets[key] = module
    if from_checkpoint is None:
        _check_every_entry_matches(config, seen, targets, model)
    if all_linear:
        _tell_of_experts(model)
    return targets


def _tell_of_experts(model: nn.Module) -> None:
    """Experts that a model keeps in one three-dimensional parameter are no linear layers, and most of its weights."""
    experts = {
        f"{name}.{key}": parameter.numel()
        for name, module in model.named_modules()
        if not isinstance(module, _ConvNd)
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and min(parameter.shape) > 1  # not a position embedding (1, n, d)
    }
    if experts:
        share = sum(experts.values()) / sum(p.numel() for p in model.parameters())
        warnings.warn(
            f"target_modules='all-linear' adapts no experts: {len(experts)} parameters (first: {next(iter(experts))}), "
            f"{share:.0%} of the model's weights, hold many matrices each and stay frozen.",
            stacklevel=2,
        )


def _check_parent(modules: dict[str, nn.Module], key: str) -> None:
    parent = modules.get(key.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention | nn.TransformerEncoderLayer):
        raise ValueError(
            f"{key} lies in a torch.nn.{type(parent).__name__}, which reads its layers' weights directly and would "
            "bypass an adapter; list it in exclude_modules."
        )


def _check_head(config: Any, key: str) -> None:
    """PEFT would notice after adapters were added, and name neither."""
    if config.task_type in ("TOKEN_CLS", "QUESTION_ANS") and key.rsplit(".", 1)[-1] in _HEADS[config.task_type]:
        raise ValueError(
            f"{key} is trained and saved whole for task_type={config.task_type!r} and cannot carry an adapter as well; "
            "leave it out of target_modules."
        )


def _check_every_entry_matches(config: Any, seen: list[str], targets: dict[str, nn.Module], model: nn.Module) -> None:
    linear = sorted({k.rsplit(".", 1)[-1] for k, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)})
    if isinstance(config.target_modules, list | set | tuple):
        for entry in sorted(config.target_modules):
            if not any(key == entry or key.endswith(f".{entry}") for key in seen):
                raise NoMatchingPeftModuleError(
                    f"target_modules entry {entry!r} matches no module of the model; its linear layers are named "
                    f"{', '.join(linear)}."
                )
    for option in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, option, None) or {}:
            if not any(re.match(rf"(.*\.)?({pattern})$", key) for key in targets):
                names = sorted({key.rsplit(".", 1)[-1] for key in targets})
                raise ValueError(
                    f"{option} entry {pattern!r} matches none of the {len(targets)} targeted layers, whose names end "
                    f"in {', '.join(names)}."
                )


def check_supported(key: str, base: nn.Module, method: str, *, needs_values: bool) -> None:
    kind = f"{type(base).__module__}.{type(base).__qualname__}"
    if isinstance(base, BaseTunerLayer):
        raise ValueError(f"{key} already carries a {kind} adapter; unload that adapter first.")
    if not isinstance(base, nn.Linear | Conv1D):
        raise ValueError(
            f"{key} is a {kind}; {method} adapts torch.nn.Linear and transformers' Conv1D layers. Narrow "
            "target_modules or list it in exclude_modules."
        )
    weight = base.weight
    assert isinstance(weight, Tensor)
    check_not_partitioned(key, "the weight", weight, ValueError)
    if is_dtensor(weight) or managed_by_fsdp(base):
        raise ValueError(
            f"{key} is sharded already (FSDP). Add and load adapters first, while every rank holds the whole model; "
            "call fully_shard or accelerator.prepare afterwards."
        )
    if quantization(base):
        if needs_values and not is_quantized_yet(base):
            raise ValueError(
                f"{key} is a {kind} that holds no quantised values yet; bitsandbytes quantises when the model is moved "
                "to a device, which from_pretrained(quantization_config=...) does."
            )
    elif type(weight) is not nn.Parameter or weight.dtype not in _SUPPORTED_DTYPES or weight.dim() != 2:
        raise ValueError(
            f"{key} ({kind}) has a weight of type {type(weight).__name__}, dtype {weight.dtype} and shape "
            f"{tuple(weight.shape)}; {method} needs a plain 2-D parameter in float32, bfloat16, float16 or float64, or "
            "a bitsandbytes 4-bit or 8-bit layer. Other quantisations and sharded weights are not supported."
        )
    if needs_values and weight.is_meta:
        raise ValueError(
            f"{key} (weight {' x '.join(map(str, weight_shape(base)))}) is on the meta device and has no values to "
            "decompose; load the base model's weights first, or load a saved adapter with low_cpu_mem_usage=True."
        )
