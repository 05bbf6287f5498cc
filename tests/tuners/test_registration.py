"""The method is a full member of PEFT's registry, however often and from wherever it is imported."""

import copy
import importlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, LoraModel, PeftType, get_peft_model
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.utils import hotswap

import offprincipal_peft
from helpers import tiny_llama, token_batch
from offprincipal_peft import OffPrincipalLoraConfig
from offprincipal_peft.tuners import OffPrincipalLoraModel, offprincipal_lora, registration

NAME = "OFFPRINCIPAL_LORA"
ROOT = Path(offprincipal_peft.__file__).resolve().parents[1]


@pytest.fixture
def registry() -> Iterator[None]:
    """Whatever a test adds to PEFT's registry is taken out again."""
    tables = [
        PeftType._member_map_,
        PeftType._value2member_map_,
        PEFT_TYPE_TO_CONFIG_MAPPING,
        PEFT_TYPE_TO_TUNER_MAPPING,
        PEFT_TYPE_TO_PREFIX_MAPPING,
        hotswap.CONFIG_KEYS_TO_CHECK,
    ]
    before, names = [dict(table) for table in tables], list(PeftType._member_names_)
    yield
    for name in set(PeftType._member_names_) - set(names):
        type.__delattr__(PeftType, name)
    PeftType._member_names_[:] = names
    for table, old in zip(tables, before, strict=True):
        table.clear()
        table.update(old)


def member() -> PeftType:
    return PeftType[NAME]


# -- the enum member ----------------------------------------------------------------------------------------------


def test_lookup():
    assert member() is PeftType(NAME) is PeftType.OFFPRINCIPAL_LORA is getattr(PeftType, NAME)
    assert member() is PeftType(member())
    assert PeftType.__members__[NAME] is member()


def test_it_is_a_member_like_the_others():
    assert isinstance(member(), PeftType) and isinstance(member(), str)
    assert type(member()) is type(PeftType.LORA)
    assert (member().name, member().value) == (NAME, NAME)
    assert repr(member()) == repr(PeftType.LORA).replace("LORA", NAME)
    assert str(member()) == str(PeftType.LORA).replace("LORA", NAME)
    assert f"{member()}" == f"{PeftType.LORA}".replace("LORA", NAME)
    assert set(vars(member())) == set(vars(PeftType.LORA))


def test_membership_and_iteration():
    assert member() in PeftType and NAME in list(PeftType) and member() in list(PeftType)
    assert [m for m in PeftType if m.name == NAME] == [member()]
    assert len(PeftType) == len(list(PeftType)) == len(set(PeftType)) == len(PeftType.__members__)
    assert list(reversed(PeftType))[::-1] == list(PeftType)


def test_equality_and_hash():
    assert member() == NAME and member() != PeftType.LORA
    assert hash(member()) == hash(NAME)
    assert {member(): 1}[NAME] == 1


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle(protocol):
    assert pickle.loads(pickle.dumps(member(), protocol)) is member()


def test_copies():
    assert copy.copy(member()) is member()
    assert copy.deepcopy({"type": [member()]})["type"][0] is member()


def test_json():
    assert json.dumps({"peft_type": member()}) == f'{{"peft_type": "{NAME}"}}'
    assert json.loads(json.dumps(member())) == member()


def test_the_other_members_are_untouched():
    for other in PeftType:
        assert PeftType(other.value) is PeftType[other.name] is other
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] is LoraConfig


def test_an_unknown_name_is_still_unknown():
    with pytest.raises(ValueError, match="OFFPRINCIPAL_NONE"):
        PeftType("OFFPRINCIPAL_NONE")
    with pytest.raises(KeyError):
        PeftType["OFFPRINCIPAL_NONE"]


def test_a_new_member(registry):
    count = len(PeftType)
    added = registration.extend_peft_type("SOME_METHOD")
    assert registration.extend_peft_type("SOME_METHOD") is added is PeftType("SOME_METHOD")
    assert len(PeftType) == count + 1 and list(PeftType)[-1] is added
    assert pickle.loads(pickle.dumps(added)) is added


def test_an_existing_member_is_returned():
    assert registration.extend_peft_type("LORA") is PeftType.LORA


# -- the mappings -------------------------------------------------------------------------------------------------


def assert_registered() -> None:
    assert PEFT_TYPE_TO_CONFIG_MAPPING[NAME] is OffPrincipalLoraConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[NAME] is OffPrincipalLoraModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[NAME] == OffPrincipalLoraModel.prefix == "lora_"
    assert NAME not in PEFT_TYPE_TO_MIXED_MODEL_MAPPING
    keys = hotswap.CONFIG_KEYS_TO_CHECK[member()]
    assert set(hotswap.CONFIG_KEYS_TO_CHECK[PeftType.LORA]) & set(keys) >= {"use_rslora", "lora_dropout"}
    fields = OffPrincipalLoraConfig.__dataclass_fields__
    assert all(key in fields for key in keys)


def test_mappings():
    assert_registered()
    assert OffPrincipalLoraConfig().peft_type is member()


def test_registering_again_changes_nothing():
    before = [dict(m) for m in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING)]
    names = list(PeftType._member_names_)
    for _ in range(2):
        found = registration.register(
            "offprincipal_lora", OffPrincipalLoraConfig, OffPrincipalLoraModel, hotswap_like_lora=True
        )
        assert found is member()
    assert before == [PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING]
    assert names == PeftType._member_names_
    assert_registered()


def test_reloading_the_package_changes_nothing():
    old = member()
    for module in (registration, offprincipal_lora, offprincipal_peft.tuners, offprincipal_peft):
        importlib.reload(module)
    assert member() is old and list(PeftType).count(old) == 1
    assert_registered()


def test_a_reloaded_class_takes_its_own_place(registry):
    """After a deep reload the classes are new objects with the old names."""
    twin = type("OffPrincipalLoraConfig", (LoraConfig,), {"__module__": OffPrincipalLoraConfig.__module__})
    model = type("Model", (LoraModel,), {"prefix": "other_"})
    assert registration.register("offprincipal_lora", twin, model) is member()
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member()] is twin
    assert PEFT_TYPE_TO_TUNER_MAPPING[member()] is model
    assert PEFT_TYPE_TO_PREFIX_MAPPING[member()] == "other_"


@pytest.mark.parametrize("name", ["lora", "offprincipal_lora"])
def test_another_packages_method_is_not_replaced(registry, name):
    class OffPrincipalLoraConfig(LoraConfig):
        """The same name in another place."""

    before = dict(PEFT_TYPE_TO_CONFIG_MAPPING)
    with pytest.raises(KeyError) as caught:
        registration.register(name, OffPrincipalLoraConfig, OffPrincipalLoraModel)
    holder = before[name.upper()]
    for word in (repr(name), f"{holder.__module__}.{holder.__qualname__}", "cannot take its place"):
        assert word in caught.value.args[0]
    assert before == PEFT_TYPE_TO_CONFIG_MAPPING


def test_the_fixture_cleans_up():
    """The tests above must not be what makes the others pass or fail."""
    assert_registered()
    assert "SOME_METHOD" not in PeftType.__members__ and not hasattr(PeftType, "SOME_METHOD")


# -- a fresh interpreter ------------------------------------------------------------------------------------------

LOAD = """
import json, pickle, sys
import torch
import offprincipal_peft  # all that a user has to do
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, PeftType
from transformers import AutoModelForCausalLM

base, adapter = sys.argv[1:]
config = PeftConfig.from_pretrained(adapter)
assert type(config) is offprincipal_peft.OffPrincipalLoraConfig, type(config)
with open(adapter + "/member.pickle", "rb") as file:
    assert pickle.load(file) is config.peft_type is PeftType.OFFPRINCIPAL_LORA
ids = torch.load(adapter + "/ids.pt")
for model in (
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter),
    AutoPeftModelForCausalLM.from_pretrained(adapter),
):
    assert type(model.base_model) is offprincipal_peft.tuners.OffPrincipalLoraModel
    assert torch.equal(model.eval()(input_ids=ids).logits, torch.load(adapter + "/logits.pt"))

# A second import of every module gives new classes, which take the place of the first ones.
first = offprincipal_peft.OffPrincipalLoraConfig
for name in [n for n in sys.modules if n.split(".")[0] == "offprincipal_peft"]:
    del sys.modules[name]
import offprincipal_peft
assert offprincipal_peft.OffPrincipalLoraConfig is not first
again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
assert type(again.peft_config["default"]) is offprincipal_peft.OffPrincipalLoraConfig
assert torch.equal(again.eval()(input_ids=ids).logits, torch.load(adapter + "/logits.pt"))
print("loaded")
"""


def test_importing_the_package_is_all_that_loading_needs(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model = tiny_llama()
    model.save_pretrained(base)
    model.name_or_path = str(base)
    adapted = get_peft_model(model, OffPrincipalLoraConfig.preset("offprincipal", r=4, task_type="CAUSAL_LM"))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape)
    ids = token_batch(128)
    with torch.no_grad():
        logits = adapted.eval()(input_ids=ids).logits
        with adapted.disable_adapter():
            assert not torch.equal(adapted(input_ids=ids).logits, logits)
    adapted.save_pretrained(adapter)
    torch.save(ids, adapter / "ids.pt")
    torch.save(logits, adapter / "logits.pt")
    (adapter / "member.pickle").write_bytes(pickle.dumps(member()))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", LOAD, str(base), str(adapter)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded"
