"""PEFT's test_token_classification_qa.py, for both methods, on tiny local models."""

import types

import pytest

from conformance import cases, local_models
from conformance.adopt import adopt

pytestmark = pytest.mark.usefixtures("local_models_folder")


def _prepare(module: types.ModuleType) -> None:
    module.PEFT_TOKEN_CLS_MODELS_TO_TEST[:] = local_models.HEADED_ENCODERS
    for rows, task in ((module.TOKEN_CLS_CONFIGS, "TOKEN_CLS"), (module.QA_CONFIGS, "QUESTION_ANS")):
        rows[:] = cases.model_cases(rows, task)


globals().update(adopt("test_token_classification_qa", _prepare))
