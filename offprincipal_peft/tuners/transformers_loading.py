"""``model.load_adapter`` of transformers: hand the values to PEFT's own loading function.

transformers writes an adapter's tensors one by one as attributes, after a ``state_dict()`` of the model. That would
start adapters that are about to be filled (decompositions), let an incomplete file pass with a log line, make frozen
bases trainable, and cannot fill a packed adapter, whose size the file decides. PEFT's function does all of it in one
``load_state_dict``, which this package's layers check. It takes over for one load of one model, by an attribute that
shadows transformers' static method and removes itself.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import torch
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

METHODS = ("OFFPRINCIPAL_LORA", "PRINCIPAL_SPARSE")  # a PeftType is a string
_ENTRY = "_load_pretrained_model"


def expect_values(model: nn.Module, adapter_name: str) -> None:
    """Make the next ``load_adapter`` of ``model`` load through PEFT, where it is a transformers model."""
    if isinstance(model, PreTrainedModel):
        model.__dict__[_ENTRY] = partial(_load, adapter_name)


def expect_nothing(model: nn.Module) -> None:
    vars(model).pop(_ENTRY, None)


def _load(
    adapter_name: str,
    *,
    model: Any,
    state_dict: dict[str, Tensor] | None,
    checkpoint_files: list[str] | None,
    expected_keys: list[str] | None = None,
    **unused: Any,
) -> tuple[Any, Any]:
    """In the place of ``PreTrainedModel._load_pretrained_model`` for one call."""
    expect_nothing(model)
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if config is None or config.peft_type not in METHODS:  # that adapter is gone, another one is being loaded
        return type(model)._load_pretrained_model(
            model=model,
            state_dict=state_dict,
            checkpoint_files=checkpoint_files,
            expected_keys=expected_keys,
            **unused,
        )
    if state_dict is None:
        state_dict = {}
        for file in checkpoint_files or []:
            state_dict |= load_file(file) if str(file).endswith(".safetensors") else torch.load(file, weights_only=True)
    plain = {key.removeprefix("base_model.model."): value for key, value in state_dict.items()}
    loaded = set_peft_model_state_dict(model, plain, adapter_name=adapter_name)
    ours = [key for key in loaded.missing_keys if f".{adapter_name}" in key]
    return _loading_info(missing_keys=set(ours), unexpected_keys=set(loaded.unexpected_keys)), None


def _loading_info(**known: Any) -> Any:
    from transformers.modeling_utils import LoadStateDictInfo

    empty: dict[str, Any] = {"error_msgs": [], "conversion_errors": {}}
    names = [field.name for field in dataclasses.fields(LoadStateDictInfo)]
    return LoadStateDictInfo(**{name: known.get(name, empty.get(name, set())) for name in names})
