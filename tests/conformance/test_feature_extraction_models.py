"""PEFT's test_feature_extraction_models.py, for both methods, on tiny local models."""

import types

import pytest

from conformance import cases, local_models
from conformance.adopt import adopt

pytestmark = pytest.mark.usefixtures("local_models_folder")


def _prepare(module: types.ModuleType) -> None:
    module.PEFT_FEATURE_EXTRACTION_MODELS_TO_TEST[:] = local_models.ENCODERS
    module.ALL_CONFIGS[:] = cases.model_cases(module.ALL_CONFIGS, "FEATURE_EXTRACTION")


globals().update(adopt("test_feature_extraction_models", _prepare))
