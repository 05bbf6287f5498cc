"""What both methods check and carry over when adapters are combined into a new one."""

from __future__ import annotations

import math
from typing import Any

from peft.utils import AuxiliaryTrainingWrapper
from torch import nn


def check_weights(known: dict[str, Any], adapters: list[str], weights: list[float], name: str) -> None:
    """Raises ``ValueError`` for names that do not exist or are taken, and weights that do not belong to them."""
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"{len(adapters)} adapters and {len(weights)} weights were given; each adapter needs one.")
    for adapter in adapters:
        if adapter not in known:
            raise ValueError(f"Adapter {adapter} does not exist; the model has {', '.join(known)}.")
    if name in known:
        raise ValueError(f"Adapter {name!r} exists already; choose another name or delete_adapter({name!r}) first.")
    bad = [w for w in weights if isinstance(w, bool) or not isinstance(w, int | float) or not math.isfinite(w)]
    if bad:
        raise ValueError(f"weights must be finite numbers, got {bad[0]!r}.")


def exact_targets(layers: list[str], configs: list[Any]) -> dict[str, Any]:
    """Config fields that target ``layers`` by their full names and nothing else, whatever the combined configs said."""
    return {
        "target_modules": set(layers),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": list(dict.fromkeys(n for c in configs for n in c.modules_to_save or [])) or None,
    }


def check_saved_modules(model: nn.Module, adapters: list[str]) -> None:
    """Raises ``ValueError`` where two adapters trained the same module whole: there is no sum of those."""
    for key, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            owners = [adapter for adapter in adapters if adapter in _copies(module)]
            if len(owners) > 1:
                raise ValueError(
                    f"Cannot add weighted adapters if they target the same module with modules_to_save: {key} was "
                    f"trained by {', '.join(owners)}."
                )


def copy_saved_modules(model: nn.Module, adapters: list[str], name: str) -> None:
    """A module that one of the adapters trained whole goes on with that adapter's values."""
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            copies = _copies(module)
            trained = [adapter for adapter in adapters if adapter in copies]
            if trained and name in copies:
                copies[name].load_state_dict(copies[trained[0]].state_dict())


def _copies(module: Any) -> Any:
    return getattr(module, "modules_to_save", {})
