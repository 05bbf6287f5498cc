"""The methods' settings that PEFT's tests run over, on PEFT's tiny layers (10 x 20, 20 x 2, a Conv1D of 5 x 1).

LoRA's own cases of `test_custom_models` are added to these by `lora_cases`: with LoRA's start, which fits every shape.
PEFT trains with plain SGD and Adam on fp32 models, so the sparse method's bf16 precisions, which need bf16 weights and
MaskedAdamW, are no cases here; tests/tuners/test_sparse_*.py run its life cycle over them.
"""

from __future__ import annotations

import types
from typing import Any

import peft
import pytest

from conformance.stand_ins import OffPrincipal, Sparse
from offprincipal_peft.tuners.offprincipal_lora.presets import preset_axes

Case = tuple[str, str, type, dict[str, Any]]

BOTTOM = preset_axes("rlmo")
LORA_START = preset_axes("lora")
PISSA, MILORA, MICA, GEORA, TAIL = (preset_axes(name) for name in ("pissa", "milora", "mica", "geora", "olora-tail"))
OUTPUT = {"projection": "output", "principal_rank": 1}
PROJECTED = preset_axes("offprincipal") | {"principal_rank": 2}


def _off(name: str, model: str, targets: Any, *axes: dict[str, Any], **options: Any) -> Case:
    settings: dict[str, Any] = {"target_modules": targets}
    for each in axes:
        settings |= each
    return f"Off-principal {name}", model, OffPrincipal, settings | options


def _sparse(name: str, model: str, targets: Any, **options: Any) -> Case:
    return f"Sparse {name}", model, Sparse, {"target_modules": targets} | options


CUSTOM_MODEL_CASES: list[Case] = [
    _off("MLP bottom", "MLP", ["lin0", "lin1"], BOTTOM),
    _off("MLP bottom rsLoRA, dropout", "MLP", "lin0", BOTTOM, use_rslora=True, lora_dropout=0.1, lora_alpha=4),
    _off("MLP random", "MLP", ["lin0", "lin1"], init_subspace="random", r=2, lora_alpha=2),
    _off("MLP PiSSA", "MLP", ["lin0", "lin1"], PISSA, r=2, lora_alpha=2),
    _off("MLP MiLoRA, regex", "MLP", r".*lin\d", MILORA, r=2, lora_alpha=4),
    _off("MLP OLoRA-tail, modules_to_save", "MLP", ["lin0"], TAIL, r=4, modules_to_save=["lin1"]),
    _off("MLP GeoRA, rank_pattern", "MLP", ["lin0", "lin1"], GEORA, r=2, rank_pattern={"lin0": 5}),
    _off("MLP MiCA", "MLP", ["lin0"], MICA, r=4),
    _off("MLP only B trains", "MLP", ["lin0"], BOTTOM, r=4, train_factors="B"),
    _off("MLP projected", "MLP", ["lin0"], PROJECTED, r=4),
    _off("MLP projected input, OLoRA-tail", "MLP", ["lin0"], TAIL, r=4, projection="input", principal_rank=0.3),
    _off("MLP projected output, modules_to_save", "MLP", ["lin0"], BOTTOM, OUTPUT, r=4, modules_to_save=["lin1"]),
    _off("Conv1D bottom", "EmbConv1D", ["conv1d"], BOTTOM, r=4),
    _off("Conv1D PiSSA", "EmbConv1D", ["conv1d"], PISSA, r=1),
    _off("Conv1D and linear projected", "EmbConv1D", ["lin0"], PROJECTED, r=4, principal_rank=1),
    _sparse("MLP safe, all-linear", "MLP", "all-linear"),
    _sparse("MLP safe, regex", "MLP", r".*lin\d"),
    _sparse("MLP low, modules_to_save", "MLP", ["lin0"], mask="low", modules_to_save=["lin1"]),
    _sparse("MLP random", "MLP", ["lin0"], mask="random", random_density=0.1),
    _sparse("MLP low, dense packing", "MLP", ["lin0", "lin1"], mask="low", packing="dense"),
    _sparse("MLP safe, packed", "MLP", ["lin0", "lin1"], packing="packed"),
    _sparse("MLP rows", "MLP", ["lin0", "lin1"], structure="row"),
    _sparse("MLP columns", "MLP", ["lin0", "lin1"], structure="column", mask="principal"),
    _sparse("Conv1D elements", "EmbConv1D", ["conv1d"], mask="principal"),
    _sparse("Conv1D and linear columns", "EmbConv1D", ["conv1d", "lin0"], mask="low", structure="column"),
]


# test_adapter_dtype_autocast alone runs twelve times for each case.
DTYPE_CASES = ("bottom", "projected", "OLoRA-tail", "Conv1D PiSSA", "dense packing", "packed", "Conv1D elements")


def dtype_cases() -> list[Case]:
    return [case for case in CUSTOM_MODEL_CASES if case[0].endswith(DTYPE_CASES)]


# The second column is the kind of model and, for "lora", a call of add_weighted_adapter, which the method refuses.
TWO_ADAPTERS = [
    ("Off-principal same layer", "mlp", OffPrincipal, {"target_modules": ["lin0"]}, {"target_modules": ["lin0"]}),
    ("Off-principal other layer", "mlp", OffPrincipal, {"target_modules": ["lin0"]}, {"target_modules": ["lin1"]}),
    (
        "Off-principal PiSSA and projected",
        "mlp",
        OffPrincipal,
        PISSA | {"target_modules": ["lin0"], "r": 2},
        PROJECTED | {"target_modules": ["lin0"], "r": 4},
    ),
    (
        "Off-principal + trainable tokens, same layer",
        "lora+trainable_tokens",
        OffPrincipal,
        {"target_modules": ["lin0"], "trainable_token_indices": {"emb": [0, 1, 2]}},
        {"target_modules": ["lin0"], "trainable_token_indices": {"emb": [3, 4, 5, 6]}},
    ),
    (
        "Off-principal + trainable tokens, other layer",
        "lora+trainable_tokens",
        OffPrincipal,
        {"target_modules": ["lin0"], "trainable_token_indices": {"emb": [0, 1, 2]}},
        {"target_modules": ["conv1d"], "trainable_token_indices": {"emb": [3, 4, 5, 6]}},
    ),
    ("Sparse other layer", "mlp", Sparse, {"target_modules": ["lin0"]}, {"target_modules": ["lin1"]}),
]


def two_adapter_cases() -> list[tuple[Any, ...]]:
    """`TWO_ADAPTERS`, both away from their starts."""
    switch = {OffPrincipal: "init_lora_weights", Sparse: "init_weights"}
    return [(*row[:3], row[3] | {switch[row[2]]: False}, row[4] | {switch[row[2]]: False}) for row in TWO_ADAPTERS]


# PEFT's LoRA cases that the method refuses: their name, and the error. Checked against explained.REFUSED_LORA_CASES.
REFUSED: dict[str, str] = {}


def lora_cases(module: types.ModuleType) -> list[Case]:
    """PEFT's own LoRA entries of ``module.TEST_CASES``, with LoRA's start, less what the method refuses."""
    kept: list[Case] = []
    for name, model, config_cls, options in module.TEST_CASES:
        if config_cls is not peft.LoraConfig:
            continue
        options = LORA_START | options
        try:
            peft.get_peft_model(module.MockTransformerWrapper.from_pretrained(model), OffPrincipal(**options))
        except ValueError as error:
            REFUSED[name] = str(error)
        else:
            kept.append((name, model, OffPrincipal, options))
    return kept


def model_cases(rows: list[tuple[type, dict[str, Any]]], task: str) -> list[Any]:
    """PEFT's own LoRA entries for a kind of transformers model, with LoRA's start, and both methods on all layers."""
    chosen = []
    for config_cls, kwargs in rows:
        if config_cls is peft.LoraConfig:
            options = LORA_START | kwargs
            try:
                OffPrincipal(**options)
            except ValueError as error:
                REFUSED[f"{task} {sorted(kwargs)}"] = str(error)
            else:
                name = "tokens" if "trainable_token_indices" in kwargs else "lora"
                chosen.append(pytest.param(OffPrincipal, options, id=name))
    every: dict[str, Any] = {"task_type": task, "target_modules": "all-linear"}
    if task == "FEATURE_EXTRACTION":  # the tests look at the last hidden state, to which the pooler adds nothing
        every["exclude_modules"] = r".*pooler.*"
    projected = PROJECTED | every | {"r": 4, "lora_alpha": 16, "lora_dropout": 0.05}
    chosen.append(pytest.param(OffPrincipal, projected, id="projected"))
    chosen.append(pytest.param(OffPrincipal, PISSA | every | {"r": 2, "lora_alpha": 2}, id="pissa"))
    chosen.append(pytest.param(Sparse, every, id="sparse"))
    return chosen
