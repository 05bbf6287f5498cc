"""Which modules a config targets and whether a method can adapt each: decided before the model is touched."""

from __future__ import annotations

import re
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

_SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def matched_targets(
    tuner: BaseTuner, config: Any, model: nn.Module, state_dict: dict[str, Tensor] | None
) -> dict[str, nn.Module]:
    """Modules that the config targets by their key, in model order; adapter internals excluded."""
    from_checkpoint = None
    if state_dict is not None:
        from_checkpoint = {key.rsplit("." + tuner.prefix, 1)[0].removeprefix("_orig_mod.") for key in state_dict}
    inside: list[str] = []
    seen: list[str] = []
    targets: dict[str, nn.Module] = {}
    for key, module in model.named_modules():
        if not key or any(key.startswith(prefix) for prefix in inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside.append(key + ".")
        seen.append(key)
        matched = (
            bool(tuner._check_target_module_exists(config, key))
            if from_checkpoint is None
            else key.removeprefix("_orig_mod.") in from_checkpoint
        )
        if matched:
            _check_parent(key, model)
            targets[key] = module
    if from_checkpoint is None:
        _check_every_entry_matches(config, seen, targets, model)
    return targets


def _check_parent(key: str, model: nn.Module) -> None:
    parent = model.get_submodule(key.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention | nn.TransformerEncoderLayer):
        raise ValueError(
            f"{key} lies in a torch.nn.{type(parent).__name__}, which reads its layers' weights directly and would "
            "bypass an adapter; list it in exclude_modules."
        )


def _check_every_entry_matches(config: Any, seen: list[str], targets: dict[str, nn.Module], model: nn.Module) -> None:
    linear = sorted({k.rsplit(".", 1)[-1] for k, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)})
    if isinstance(config.target_modules, list | set | tuple):
        for entry in sorted(config.target_modules):
            if not any(key == entry or key.endswith(f".{entry}") for key in seen):
                raise ValueError(
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
    if type(weight) is not nn.Parameter or weight.dtype not in _SUPPORTED_DTYPES or weight.dim() != 2:
        raise ValueError(
            f"{key} ({kind}) has a weight of type {type(weight).__name__}, dtype {weight.dtype} and shape "
            f"{tuple(weight.shape)}; {method} needs a plain 2-D parameter in float32, bfloat16, float16 or "
            "float64. Quantised and sharded bases are not supported by this method."
        )
    if needs_values and weight.is_meta:
        raise ValueError(
            f"{key} (weight {weight.shape[0]} x {weight.shape[1]}) is on the meta device and has no values to "
            "decompose; load the base model's weights first, or load a saved adapter with low_cpu_mem_usage=True."
        )


def oriented_weight(base: nn.Module) -> Tensor:
    weight = base.weight
    assert isinstance(weight, Tensor)
    return weight.detach().T if isinstance(base, Conv1D) else weight.detach()
