"""PEFT's test_custom_models.py, for both methods: tiny models, the whole life of an adapter."""

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

from conformance import cases
from conformance.adopt import STAND_INS, adopt


def _seeded(build: Callable[..., Any]) -> Callable[..., Any]:
    """The same weights each time: a sparse adapter is loaded into the model that it was trained on, or refused."""

    def built(*args: Any, **options: Any) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return build(*args, **options)

    return built


def _prepare(module: types.ModuleType) -> None:
    module.DeepMLP = _seeded(module.DeepMLP)
    module.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES[:] = cases.two_adapter_cases()
    module.TEST_CASES[:] = [*cases.lora_cases(module), *cases.CUSTOM_MODEL_CASES]
    module.ALL_PEFT_CONFIG_CLASSES[:] = STAND_INS
    dtypes = module.TestPeftCustomModel.test_adapter_dtype_autocast
    dtypes.pytestmark = [
        pytest.mark.parametrize(mark.args[0], cases.dtype_cases()).mark if mark.args[1] is module.TEST_CASES else mark
        for mark in dtypes.pytestmark
    ]


globals().update(adopt("test_custom_models", _prepare))
