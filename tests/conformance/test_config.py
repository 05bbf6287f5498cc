"""PEFT's test_config.py, for the configs of both methods themselves."""

import types

import pytest

from conformance.adopt import THEMSELVES, adopt
from offprincipal_peft import OffPrincipalLoraConfig, PrincipalSparseConfig

pytestmark = pytest.mark.usefixtures("local_models_folder")


def _prepare(module: types.ModuleType) -> None:
    # layers_to_transform needs a list, and both methods' default is "all-linear"
    both = (OffPrincipalLoraConfig, PrincipalSparseConfig)
    module.LAYER_INDEXING_CONFIG_CLASSES[:] = [(config_cls, {"target_modules": ["q_proj"]}) for config_cls in both]


globals().update(adopt("test_config", _prepare, methods=THEMSELVES))
