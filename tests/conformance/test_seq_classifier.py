"""PEFT's test_seq_classifier.py, for both methods, on tiny local models."""

import types

import pytest

from conformance import cases, local_models
from conformance.adopt import adopt

pytestmark = pytest.mark.usefixtures("local_models_folder")


def _prepare(module: types.ModuleType) -> None:
    module.PEFT_SEQ_CLS_MODELS_TO_TEST[:] = local_models.CLASSIFIERS
    module.ALL_CONFIGS[:] = cases.model_cases(module.ALL_CONFIGS, "SEQ_CLS")


globals().update(adopt("test_seq_classifier", _prepare))
