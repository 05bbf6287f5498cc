"""The methods that a comparison knows, each from the same rank, alpha, targets and dropout; and any PEFT config.

A method only says how to build its PEFT config. Whatever could favour it comes from the trial: see
:class:`~offprincipal_peft.rlvr.config.TrialConfig`.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, OSFConfig, PeftConfig, ShiraConfig, SupertuningConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from ..tuners import OffPrincipalLoraConfig, PrincipalSparseConfig
from .config import TrialConfig

CONFIG_SUFFIXES = (".json", ".yaml", ".yml")


class MethodError(ValueError):
    """A method that does not exist or cannot be built: what exists instead."""


@dataclass(frozen=True)
class Method:
    """
    Attributes:
        summary: one line for ``offprincipal methods``.
        config: builds the PEFT config of a trial; None for full fine-tuning.
        base_intact: whether disabling the adapter gives the pretrained model. Where it does not, a second copy of the
            model is the reference of the KL.
        learning_rates: the grid that a comparison tries where none is given; the best on validation is scored on test.
    """

    name: str
    family: str
    summary: str
    config: Callable[[TrialConfig], PeftConfig | None]
    base_intact: bool = True
    learning_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)


def _shared(trial: TrialConfig) -> dict[str, Any]:
    return {"target_modules": trial.target_modules, "task_type": "CAUSAL_LM"}


def _low_rank(trial: TrialConfig) -> dict[str, Any]:
    return {**_shared(trial), "r": trial.rank, "lora_alpha": trial.alpha, "lora_dropout": trial.dropout}


def _preset(name: str) -> Callable[[TrialConfig], PeftConfig]:
    def build(trial: TrialConfig) -> PeftConfig:
        options = {**_low_rank(trial), "seed": trial.seed, **trial.method_options}
        return OffPrincipalLoraConfig.preset(name, **options)

    return build


def _peft(cls: type[PeftConfig], shared: Callable[[TrialConfig], dict[str, Any]], **options: Any) -> Any:
    return lambda trial: cls(**{**shared(trial), **options, **trial.method_options})


def _sparse(mask: str) -> Callable[[TrialConfig], PeftConfig]:
    def build(trial: TrialConfig) -> PeftConfig:
        return PrincipalSparseConfig(**{**_shared(trial), "mask": mask, "seed": trial.seed, **trial.method_options})

    return build


def _shira(trial: TrialConfig) -> PeftConfig:
    return ShiraConfig(**{**_shared(trial), "r": trial.rank, "random_seed": trial.seed, **trial.method_options})


def _supertuning(trial: TrialConfig) -> PeftConfig:
    return SupertuningConfig(**{**_shared(trial), **trial.method_options})


OURS, PEFTS, SPARSE = "low-rank, starts and projections of this package", "PEFT's own", "sparse by a mask"
_TABLE = [
    Method("full", "full", "full fine-tuning of every parameter", lambda trial: None, base_intact=False),
    Method("lora", OURS, "LoRA: A random (Kaiming), B zero", _preset("lora")),
    Method(
        "dora", PEFTS, "PEFT's DoRA: LoRA on directions, magnitudes apart", _peft(LoraConfig, _low_rank, use_dora=True)
    ),
    Method("pissa", OURS, "PiSSA start (top-r, √σ), base untouched, ΔW = 0 at the start", _preset("pissa")),
    Method(
        "peft-pissa",
        PEFTS,
        "PEFT's PiSSA, which writes the residual into the base",
        _peft(LoraConfig, _low_rank, init_lora_weights="pissa"),
        base_intact=False,
    ),
    Method("milora", OURS, "MiLoRA start (bottom-r, √σ), base untouched", _preset("milora")),
    Method("mica", OURS, "MiCA: B frozen at the bottom left directions, A trained from zero", _preset("mica")),
    Method("rlpo", OURS, "RLPO: A starts at the top-r right directions, orthonormal rows", _preset("rlpo")),
    Method("rlmo", OURS, "RLMO: A starts at the bottom-r right directions, orthonormal rows", _preset("rlmo")),
    Method("olora-tail", OURS, "OLoRA-tail: both factors at the bottom directions, no σ", _preset("olora-tail")),
    Method("geora", OURS, "GeoRA: top-r of the weight under its geometric mask, √σ", _preset("geora")),
    Method("offprincipal", OURS, "bottom start, update confined off the top-k on both sides", _preset("offprincipal")),
    Method(
        "offprincipal-random",
        OURS,
        "random start at LoRA's scale, update confined off the top-k",
        _preset("offprincipal-random"),
    ),
    Method("peft-shira", PEFTS, "PEFT's SHiRA: as many random entries as LoRA has numbers", _shira),
    Method("peft-supertuning", PEFTS, "PEFT's Super-Tuning: the 1 % largest entries", _supertuning),
    Method(
        "osf", PEFTS, "PEFT's OSF: the lower half of the spectrum trains", _peft(OSFConfig, _shared), base_intact=False
    ),
    Method("principal", SPARSE, "entries with the largest rank-k part (50 %)", _sparse("principal")),
    Method("~principal", SPARSE, "the other entries (50 %)", _sparse("~principal")),
    Method("low", SPARSE, "entries of small magnitude (58.59 %)", _sparse("low")),
    Method("safe", SPARSE, "the paper's safe mask, low | ~principal", _sparse("safe")),
    Method("random(safe)", SPARSE, "random entries at safe's density", _sparse("random(safe)")),
    Method(
        "matched(principal)",
        SPARSE,
        "other entries with the magnitudes of thinned(principal)",
        _sparse("matched(principal)"),
    ),
    Method(
        "thinned(principal)",
        SPARSE,
        "principal entries, thinned to the magnitudes of matched(principal)",
        _sparse("thinned(principal)"),
    ),
]
# Orthonormal rows and √σ scales take larger steps than Kaiming's A; entries of the weight itself need small ones.
_RATES = {
    **dict.fromkeys(
        ("pissa", "peft-pissa", "milora", "rlpo", "rlmo", "olora-tail", "geora", "offprincipal"), (3e-5, 1e-4, 3e-4)
    ),
    **dict.fromkeys(("peft-shira", "peft-supertuning", "osf"), (1e-5, 3e-5, 1e-4)),
    **dict.fromkeys(("full", *(method.name for method in _TABLE if method.family == SPARSE)), (3e-6, 1e-5, 3e-5)),
}
METHODS = {m.name: dataclasses.replace(m, learning_rates=_RATES.get(m.name, m.learning_rates)) for m in _TABLE}


# What cannot train on a base that bitsandbytes quantised, and why. Tried on nf4, nf4-double and int8.
_NEEDS_FLOATS = {
    "full": "a quantised weight cannot train",
    "peft-pissa": "it writes floats into the base; 'pissa' has the same start and leaves the base alone",
    "peft-supertuning": "PEFT multiplies with the stored codes as if they were the weight",
    "osf": "PEFT decomposes the stored codes as if they were the weight",
}
_ALSO_NOT = {("dora", "int8"): "PEFT's DoRA loses the scales of int8 layers; nf4 works"}
_UNSEEN = ("dora", "peft-shira")  # train there, but their updates are merged to be seen, which needs floats


def find_method(name: str) -> Method:
    """The method called ``name``, or one made from a PEFT config file.

    Raises:
        MethodError: neither; with what exists.
    """
    if name in METHODS:
        return METHODS[name]
    if name.endswith(CONFIG_SUFFIXES) or Path(name).is_dir():
        return _from_file(Path(name))
    close = difflib.get_close_matches(name, METHODS, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise MethodError(
        f"unknown method {name!r}{hint}; there are {', '.join(METHODS)}, and any PEFT config as .json or .yaml"
    )


def build_config(trial: TrialConfig) -> PeftConfig | None:
    """The PEFT config of the trial, None for full fine-tuning.

    Raises:
        MethodError: options that the method does not have, or a base that it cannot train on; with the trial's label.
    """
    method = find_method(trial.method)
    if method.name == "full" and trial.method_options:
        raise MethodError(f"{trial.label}: full fine-tuning has no options, got {', '.join(trial.method_options)}")
    try:
        config = method.config(trial)
    except (TypeError, ValueError) as error:
        raise MethodError(f"{trial.label}: {error}") from error
    if trial.quantization != "none":
        _check_quantized(trial, method, config)
    return config


def _check_quantized(trial: TrialConfig, method: Method, config: PeftConfig | None) -> None:
    """Refuses what cannot train, or be measured as asked, on a quantised base; a config file's method is tried."""
    reason = _NEEDS_FLOATS.get(method.name) or _ALSO_NOT.get((method.name, trial.quantization))
    if reason is not None:
        raise MethodError(f"{trial.label}: not on a base with quantization={trial.quantization!r}: {reason}")
    if method.name in _UNSEEN and trial.geometry:
        raise MethodError(
            f"{trial.label}: the geometry of its update cannot be measured on a base with "
            f"quantization={trial.quantization!r}; geometry=false trains it without"
        )
    if isinstance(config, PrincipalSparseConfig) and config.precision != "fp32":
        raise MethodError(
            f"{trial.label}: precision={config.precision!r} keeps its values in the base's weights, which "
            f"quantization={trial.quantization!r} does not allow; precision='fp32' does not"
        )


def _from_file(path: Path) -> Method:
    """A config file's own fields win; rank, alpha, dropout and targets that it leaves out are the trial's."""
    fields = _read_config(path)
    kind = fields.pop("peft_type", None)
    fields.pop("inference_mode", None)  # true in every saved adapter: nothing would train
    known = {str(getattr(name, "value", name)): cls for name, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if kind not in known:
        raise MethodError(f"{path}: peft_type is {kind!r}; it is one of {', '.join(sorted(known))}")
    cls = known[kind]
    options = {field.name for field in dataclasses.fields(cls)}
    unknown = [name for name in fields if name not in options]
    if unknown:
        close = difflib.get_close_matches(unknown[0], options, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise MethodError(f"{path}: {cls.__name__} has no field {unknown[0]!r}{hint}")

    def build(trial: TrialConfig) -> PeftConfig:
        shared = {name: value for name, value in _low_rank(trial).items() if name in options}
        return cls(**{**shared, **fields, **trial.method_options})

    return Method(path.name, "a config file", f"{cls.__name__} from {path.name}", build, base_intact=False)


def _read_config(path: Path) -> dict[str, Any]:
    import yaml

    path = path / "adapter_config.json" if path.is_dir() else path
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise MethodError(f"{path}: {error.strerror or error}") from None
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise MethodError(f"{path}: neither JSON nor YAML ({error})") from None
    if not isinstance(value, dict):
        raise MethodError(f"{path}: a {type(value).__name__}, not the fields of a PEFT config")
    return value
