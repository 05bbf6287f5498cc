"""PEFT's test_decoder_models.py, for both methods, on tiny local models."""

import types

import pytest

from conformance import cases, local_models
from conformance.adopt import adopt

pytestmark = pytest.mark.usefixtures("local_models_folder")


def _prepare(module: types.ModuleType) -> None:
    module.PEFT_DECODER_MODELS_TO_TEST[:] = local_models.DECODERS
    module.ALL_CONFIGS[:] = cases.model_cases(module.ALL_CONFIGS, "CAUSAL_LM")


globals().update(adopt("test_decoder_models", _prepare))
