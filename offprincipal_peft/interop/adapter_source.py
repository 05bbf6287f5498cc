"""An off-principal adapter, from a folder or a live model, checked and taken apart into layers and other tensors."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import PeftType, get_peft_model_state_dict
from peft.utils.other import get_pattern_key
from torch import Tensor

from ..tuners.offprincipal_lora.config import PEFT_TYPE_NAME, OffPrincipalLoraConfig
from ..tuners.offprincipal_lora.fold import folded_factors
from ..tuners.offprincipal_lora.state import stored_starts
from ..tuners.principal_sparse.config import PEFT_TYPE_NAME as SPARSE
from .folders import ExportError, read_config, read_tensors

PREFIX = "base_model.model."
PARTS = ("lora_A", "lora_B", "lora_start_A", "lora_start_B", "lora_basis_U", "lora_basis_V")
# The names that embeddings and output layers have in transformers' models: saved whole where a vocabulary was resized.
EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "word_embeddings", "embed_in", "embed_out", "tok_embeddings", "shared")


@dataclass(frozen=True)
class AdapterSource:
    """What an adapter's export is made of.

    ``layers``: layer name -> part ("lora_A", …) -> tensor, on the CPU. ``others``: modules saved whole, trained tokens
    and embeddings, by their saved keys. ``folder`` is None for a live model.
    """

    config: OffPrincipalLoraConfig
    layers: dict[str, dict[str, Tensor]]
    others: dict[str, Tensor]
    folder: Path | None

    @property
    def is_plain(self) -> bool:
        """Whether the update is the scaled product of the raw factors, as in LoRA."""
        return self.config.init_factors != "both" and self.config.projection == "none"

    @property
    def has_exact_targets(self) -> bool:
        """Whether the config's ``target_modules`` name the adapted layers to any PEFT, without a model at hand."""
        targets = self.config.target_modules
        return _names_layers(targets) and all(check_target_module_exists(self.config, name) for name in self.layers)

    def rank(self, layer: str) -> int:
        return int(_pattern_value(self.config.rank_pattern, layer, self.config.r))

    def scaling(self, layer: str) -> float:
        alpha, r = _pattern_value(self.config.alpha_pattern, layer, self.config.lora_alpha), self.rank(layer)
        return float(alpha / r**0.5 if self.config.use_rslora else alpha / r)

    def factors(self, layer: str) -> tuple[Tensor, Tensor]:
        """``left`` (d_out, R), ``right`` (R, d_in) with dW = left @ right, scaling included, as the forward has it."""
        parts = self.layers[layer]
        subtracts = self.config.init_factors == "both"
        left, right = folded_factors(
            parts["lora_B"],
            parts["lora_A"],
            B0=parts["lora_start_B"] if subtracts else None,
            A0=parts["lora_start_A"] if subtracts else None,
            U=parts.get("lora_basis_U"),
            V=parts.get("lora_basis_V"),
            train_factors=self.config.train_factors,
        )
        return left * self.scaling(layer), right


def open_adapter(adapter: PeftModel | Path, adapter_name: str) -> AdapterSource:
    """Read and check a live adapter, or the one in exactly this folder.

    Raises :class:`ExportError` for anything but a whole off-principal adapter.
    """
    if isinstance(adapter, Path):
        folder = adapter
        values = read_config(folder)
        _check_type(values["peft_type"], str(folder))
        config = _config(values, str(folder))
        return _taken_apart(config, read_tensors(folder), folder, str(folder))
    config, tensors = _live(adapter, adapter_name)
    return _taken_apart(config, tensors, None, f"adapter {adapter_name!r}")


def _live(model: Any, adapter_name: str) -> tuple[OffPrincipalLoraConfig, dict[str, Tensor]]:
    model = getattr(model, "_orig_mod", model)  # as torch.compile wraps it
    if not isinstance(model, PeftModel):
        raise ExportError(
            f"cannot export a {type(model).__module__}.{type(model).__qualname__}: give a PeftModel, or the folder "
            "that save_pretrained() wrote."
        )
    where = f"adapter {adapter_name!r}"
    if adapter_name not in model.peft_config:
        raise ExportError(f"the model has no {where}; its adapters are {', '.join(model.peft_config)}.")
    live = model.peft_config[adapter_name]
    _check_type(live.peft_type.value, where)
    values = live.to_dict()
    if live.base_model_name_or_path is None:
        values["base_model_name_or_path"] = getattr(model.get_base_model(), "name_or_path", None) or None
    if live.task_type is None and live.auto_mapping is None:  # so that PEFT's Auto classes find the base's class
        base = type(model.get_base_model())
        values["auto_mapping"] = {"base_model_class": base.__name__, "parent_library": base.__module__}
    try:
        tensors = get_peft_model_state_dict(model, adapter_name=adapter_name)
    except ValueError as error:  # values that were to be loaded and came in part
        raise ExportError(f"{where}: {error}") from error
    for key, value in tensors.items():
        if value.is_meta:
            raise ExportError(f"{where}: {key} is on the meta device and has no values; load the adapter first.")
        if type(value) not in (Tensor, torch.nn.Parameter):
            raise ExportError(
                f"{where}: {key} is a {type(value).__name__}, not a whole tensor; gather the adapter with "
                "save_pretrained() and export the folder."
            )
    return _config(values, where), {key: value.detach().cpu() for key, value in tensors.items()}


def _check_type(peft_type: str, where: str) -> None:
    if peft_type == PEFT_TYPE_NAME:
        return
    if peft_type == "LORA":
        raise ExportError(f"{where} is a plain PEFT LoRA already; use it as it is.")
    if peft_type == SPARSE:
        raise ExportError(
            f"{where} is a sparse adapter, whose update has full rank and no LoRA form; export it merged "
            "(export_merged, --as merged)."
        )
    if peft_type in PeftType.__members__:
        raise ExportError(f"{where} has peft_type {peft_type}; only off-principal adapters have a folded LoRA form.")
    raise ExportError(f"{where} has peft_type {peft_type!r}, which the installed PEFT does not know.")


def _config(values: dict[str, Any], where: str) -> OffPrincipalLoraConfig:
    known = {f.name for f in fields(OffPrincipalLoraConfig)}
    lost = sorted(key for key, value in values.items() if key not in known and value)
    if lost:
        raise ExportError(
            f"{where}: the config sets {', '.join(lost)}, which this version of the package and of PEFT does not know; "
            f"it was saved with PEFT {values.get('peft_version')}. Upgrade, or the export would leave it out."
        )
    try:
        return OffPrincipalLoraConfig(**{key: value for key, value in values.items() if key in known})
    except (TypeError, ValueError) as error:
        raise ExportError(f"{where}: the config is not valid: {error}") from error


# -- tensors ----------------------------------------------------------------------------------------------------------


def _taken_apart(
    config: OffPrincipalLoraConfig, tensors: dict[str, Tensor], folder: Path | None, where: str
) -> AdapterSource:
    layers: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, value in tensors.items():
        path, _, part = key.removesuffix(".weight").rpartition(".")
        if part in PARTS and key.endswith(".weight") and path.startswith(PREFIX):
            layers.setdefault(path.removeprefix(PREFIX), {})[part] = value
        elif _is_other(config, key):
            others[key] = value
        else:
            raise ExportError(f"{where}: the tensor {key} is no part of an off-principal adapter with this config.")
    if not layers:
        raise ExportError(f"{where} holds no layer's factors; the adapter is empty or cut short.")
    source = AdapterSource(config, layers, others, folder)
    for name, parts in layers.items():
        _check_layer(source, name, parts, f"{where}, {name}")
    if folder is not None:
        _check_targets(source, where)
    return source


def _is_other(config: OffPrincipalLoraConfig, key: str) -> bool:
    if not key.startswith(PREFIX) or ".lora_" in key:
        return False
    dotted = f".{key.removeprefix(PREFIX)}"
    if config.trainable_token_indices and dotted.endswith(".trainable_tokens_delta"):
        return True
    return any(f".{name}." in dotted for name in (*(config.modules_to_save or ()), *EMBEDDINGS))


def _check_layer(source: AdapterSource, name: str, parts: dict[str, Tensor], where: str) -> None:
    """Every tensor that the config asks for, of the shape it asks for, and finite."""
    config, r = source.config, source.rank(name)
    starts = stored_starts(config)
    wanted = ["lora_A", "lora_B"]
    wanted += [part for part, kept in zip(("lora_start_A", "lora_start_B"), starts, strict=True) if kept]
    wanted += ["lora_basis_U"] * (config.projection in ("output", "both"))
    wanted += ["lora_basis_V"] * (config.projection in ("input", "both"))
    missing, extra = sorted(set(wanted) - set(parts)), sorted(set(parts) - set(wanted))
    if missing:
        raise ExportError(f"{where}: the adapter is incomplete, it lacks {', '.join(missing)}.")
    if extra:
        raise ExportError(f"{where}: there is {', '.join(extra)}, which an adapter with this config does not have.")
    d_in, d_out = parts["lora_A"].shape[-1], parts["lora_B"].shape[0]
    k = config.resolve_principal_rank((d_out, d_in))
    shapes = {
        **dict.fromkeys(("lora_A", "lora_start_A"), (r, d_in)),
        **dict.fromkeys(("lora_B", "lora_start_B"), (d_out, r)),
        "lora_basis_U": (d_out, k),
        "lora_basis_V": (d_in, k),
    }
    for part, value in parts.items():
        if tuple(value.shape) != shapes[part]:
            raise ExportError(
                f"{where}: {part} has shape {tuple(value.shape)}, but r = {r} and k = {k} of the config need "
                f"{shapes[part]}."
            )
        if not value.is_floating_point() or not bool(value.isfinite().all()):
            raise ExportError(f"{where}: {part} ({value.dtype}) holds NaN, infinity or no numbers; it is damaged.")


def _check_targets(source: AdapterSource, where: str) -> None:
    """A folder's layers against its config: what neither names would be missing or ignored wherever it is loaded."""
    config = source.config
    targets = config.target_modules
    if _names_layers(targets):
        for name in source.layers:
            if not check_target_module_exists(config, name):
                raise ExportError(f"{where}: there are tensors of {name}, which target_modules does not name.")
    whole = config.modules_to_save or []
    if isinstance(targets, set | list) and not (config.exclude_modules or config.layers_to_transform is not None):
        for entry in sorted(targets):
            found = any(name == entry or name.endswith(f".{entry}") for name in source.layers)
            if not found and not any(f".{name}." in f".{entry}." for name in whole):
                raise ExportError(f"{where}: the adapter is incomplete, it has no tensor for the target {entry}.")
    if whole and not any(f".{name}." in f".{key.removeprefix(PREFIX)}" for name in whole for key in source.others):
        raise ExportError(f"{where}: the adapter is incomplete, it lacks the modules to save ({', '.join(whole)}).")


def _names_layers(targets: Any) -> bool:
    return bool(targets) and targets != "all-linear"


def _pattern_value(patterns: dict[str, Any] | None, layer: str, default: Any) -> Any:
    patterns = patterns or {}
    return patterns.get(get_pattern_key(patterns.keys(), layer), default)


def lora_fields(config: OffPrincipalLoraConfig) -> dict[str, Any]:
    """The settings of an off-principal config that plain LoRA has too, as keyword arguments of ``LoraConfig``."""
    own = {"peft_type", "peft_version", "runtime_config"}
    return {f.name: getattr(config, f.name) for f in fields(LoraConfig) if f.name not in own}
