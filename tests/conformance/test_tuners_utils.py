"""PEFT's test_tuners_utils.py, with off-principal LoRA where it says LoraConfig."""

import pytest

from conformance.adopt import adopt

pytestmark = pytest.mark.usefixtures("local_models_folder")

globals().update(adopt("test_tuners_utils"))
