"""The optimiser of a trial: one that transformers' Trainer makes, or one of PEFT's own for low-rank factors."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from ..tuners import PrincipalSparseConfig
from .config import TrialConfig

DEFAULT = "adamw_torch"
# A trial's name -> PEFT's function, and its options with the values that hold where none are given.
PEFTS: dict[str, tuple[str, dict[str, float]]] = {
    "peft-riemannian": ("create_riemannian_optimizer", {"reg": 1e-2}),
    "peft-loraplus": ("create_loraplus_optimizer", {"loraplus_lr_ratio": 16.0}),
}


def needs_masked_adamw(peft_config: Any) -> bool:
    """Whether only :class:`~offprincipal_peft.MaskedAdamW` can train what ``peft_config`` makes."""
    return isinstance(peft_config, PrincipalSparseConfig) and peft_config.precision != "fp32"


def check_optimizer(config: TrialConfig, peft_config: Any) -> None:
    """Refuses an optimiser that does not exist or cannot train the trial's method.

    Raises:
        ValueError: with the trial's label and what would be right.
    """
    name, options = config.optimizer, config.optimizer_options
    if needs_masked_adamw(peft_config) and (name != DEFAULT or options):
        raise ValueError(
            f"{config.label}: optimizer={name!r}, optimizer_options={options!r}: precision={peft_config.precision!r} "
            f"trains with MaskedAdamW alone; leave the optimiser at {DEFAULT!r}, or take precision='fp32'"
        )
    if name not in PEFTS:
        _check_trainers(config)
        return
    known = PEFTS[name][1]
    for option, value in options.items():
        if option not in known:
            raise ValueError(
                f"{config.label}: optimizer={name!r} has no option {option!r}; it takes {', '.join(known)}"
            )
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise ValueError(f"{config.label}: optimizer_options: {option}={value!r}: it is a number above 0")
    if not isinstance(peft_config, LoraConfig) or getattr(peft_config, "train_factors", "both") != "both":
        raise ValueError(
            f"{config.label}: optimizer={name!r} is for methods that train both LoRA factors, which {config.method!r} "
            f"does not; leave the optimiser at {DEFAULT!r}"
        )


def _check_trainers(config: TrialConfig) -> None:
    from transformers.training_args import OptimizerNames

    known = [str(optimizer.value) for optimizer in OptimizerNames]
    if config.optimizer not in known:
        close = difflib.get_close_matches(config.optimizer, [*known, *PEFTS], n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(
            f"{config.label}: unknown optimizer {config.optimizer!r}{hint}; there are {', '.join(PEFTS)}, and "
            "transformers' OptimizerNames"
        )
    if config.optimizer_options:
        raise ValueError(
            f"{config.label}: optimizer_options={config.optimizer_options!r} are for {' and '.join(PEFTS)}; those of "
            f"{config.optimizer!r} go into trainer_options as {{'optim_args': 'name=value'}}"
        )


def build_optimizer(config: TrialConfig, model: nn.Module) -> torch.optim.Optimizer | None:
    """AdamW under PEFT's preconditioner or rates for the factors of ``model``; None where the Trainer makes its own.

    ``learning_rate`` is that of A under LoRA+, whose B takes ``loraplus_lr_ratio`` times as much.

    Source: Riemannian preconditioned LoRA (2402.02347), LoRA+ (2402.12354), both as PEFT has them.
    """
    if config.optimizer not in PEFTS:
        return None
    from peft import optimizers

    create, defaults = PEFTS[config.optimizer]
    options: dict[str, Any] = {**defaults, **config.optimizer_options}
    decay = "loraplus_weight_decay" if config.optimizer == "peft-loraplus" else "weight_decay"
    options[decay] = config.weight_decay
    made: torch.optim.Optimizer = getattr(optimizers, create)(
        model, torch.optim.AdamW, lr=config.learning_rate, **options
    )
    return made
