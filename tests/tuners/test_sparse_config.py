"""The config of masked sparse fine-tuning: defaults, what it refuses and how it says so, JSON, registration."""

import copy
import json
import pickle

import peft
import pytest
from peft import PeftConfig, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from lifecycle import tiny
from offprincipal_peft import PrincipalSparseConfig
from offprincipal_peft.geometry.mask_expression import MaskExpressionError
from offprincipal_peft.geometry.masks import MaskOptions
from offprincipal_peft.tuners.principal_sparse import PrincipalSparseModel
from sparse_models import sparse_config, sparse_layers

DEFAULTS = {
    "target_modules": "all-linear",
    "exclude_modules": None,
    "modules_to_save": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "mask": "safe",
    "principal_rank": 1 / 16,
    "principal_density": 0.5,
    "low_density": 0.5859,
    "random_density": 0.01,
    "principal_method": "exact",
    "structure": "element",
    "precision": "fp32",
    "packing": "auto",
    "seed": 0,
}


def test_defaults():
    config = PrincipalSparseConfig()
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS
    assert config.mask_options() == MaskOptions()
    inherited = set(PeftConfig().to_dict())
    assert set(config.to_dict()) - inherited == set(DEFAULTS)  # no option is missing above


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        *[
            (option, value, [option, "strictly between 0 and 1", repr(value)])
            for option in ("principal_density", "low_density", "random_density")
            for value in (0, 1, 0.0, 1.0, -0.1, 1.5, float("nan"), float("inf"), True, "0.5", None)
        ],
        *[("principal_rank", value, ["principal_rank", "int or a float", repr(value)]) for value in (True, "4", None)],
        *[
            ("principal_rank", value, [f"principal_rank={value!r}", "(0, 1)", "give an int"])
            for value in (0.0, 1.0, -0.5, 2.5, float("nan"))
        ],
        *[("principal_rank", value, ["principal_rank must be at least 1", str(value)]) for value in (0, -3)],
        ("precision", "fp16", ["precision", "'fp32', 'split', 'bf16', 'bf16-stochastic'", "'fp16'"]),
        ("structure", "diagonal", ["structure", "'element', 'row', 'column', 'block'", "'diagonal'"]),
        ("principal_method", "guess", ["principal_method", "'exact', 'randomized'", "'guess'"]),
        *[("seed", value, ["seed must be an integer", repr(value)]) for value in (1.0, True, "0", None)],
        *[("mask", value, ["mask must be an expression", "'safe'", repr(value)]) for value in (None, 3, ["safe"])],
        ("layers_pattern", "layers", ["layers_pattern needs layers_to_transform"]),
        ("layers_to_transform", [1], ["layers_to_transform needs target_modules to be a list"]),
    ],
)
def test_a_refused_value_is_named_and_shown(option, value, words):
    with pytest.raises(ValueError) as caught:
        PrincipalSparseConfig(**{option: value})
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("text", "position", "words"),
    [
        ("", 0, "expected a mask name, '~' or '(', found the end"),
        ("   ", 3, "found the end"),
        ("safe &", 6, "found the end"),
        ("low principal", 4, "expected '&', '|' or the end, found 'principal'"),
        ("low & high", 6, "unknown mask 'high'; there are principal, low, safe, random and random(x)"),
        ("(low | principal", 16, "expected ')', found the end"),
        ("low)", 3, "found ')'"),
        ("low ^ principal", 4, "unexpected character '^'"),
        ("matched", 0, "'matched' needs an argument"),
        ("low(principal)", 3, "'low' takes no argument"),
        ("~", 1, "found the end"),
        ("__import__('os')", 0, "unknown mask '__import__'"),
        ("~" * 200 + "low", 100, "nested more than 100 deep"),
    ],
)
def test_a_malformed_expression_carries_its_position(text, position, words):
    with pytest.raises(MaskExpressionError) as caught:
        PrincipalSparseConfig(mask=text)
    message = str(caught.value)
    assert isinstance(caught.value, ValueError) and caught.value.position == position
    assert f"position {position + 1}" in message and words in message
    text_line, caret_line = message.split("\n")[1:]
    assert caret_line.index("^") - 2 == position and text_line[2:] == text


@pytest.mark.parametrize(
    "accepted",
    [
        {"mask": "matched(principal) | thinned(~low & random)"},
        {"principal_rank": 1, "principal_density": 1e-6, "low_density": 0.999999},
        {"principal_rank": 0.999},
        {"seed": -7, "structure": "block", "precision": "split", "principal_method": "randomized"},
        {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
        {"target_modules": r".*\.q_proj", "exclude_modules": ["lm_head"]},
    ],
)
def test_accepted(accepted):
    config = PrincipalSparseConfig(**accepted)
    for name, value in accepted.items():
        is_names = name.endswith("_modules") and isinstance(value, list)
        assert getattr(config, name) == (set(value) if is_names else value)


OTHER = {
    "task_type": "CAUSAL_LM",
    "target_modules": ["q_proj", "up_proj"],
    "exclude_modules": ["lm_head"],
    "modules_to_save": ["lm_head"],
    "layers_to_transform": [1],
    "layers_pattern": "layers",
    "mask": "matched(low & ~principal)",
    "principal_rank": 3,
    "principal_density": 0.25,
    "low_density": 0.125,
    "random_density": 0.0625,
    "principal_method": "randomized",
    "structure": "row",
    "precision": "split",
    "packing": "packed",
    "seed": 11,
}


@pytest.mark.parametrize("cls", [PrincipalSparseConfig, PeftConfig])
def test_a_saved_config_is_the_same_config(tmp_path, cls):
    assert not {name for name in DEFAULTS if OTHER[name] == DEFAULTS[name]}  # every option is another than its default
    config = PrincipalSparseConfig(**OTHER)
    config.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path)
    assert type(loaded) is PrincipalSparseConfig
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["peft_type"] == "PRINCIPAL_SPARSE"
    for name in DEFAULTS:
        assert getattr(loaded, name) == getattr(config, name), name
    assert loaded.mask_options() == config.mask_options()


def test_a_saved_config_is_checked_again(tmp_path):
    PrincipalSparseConfig(**OTHER).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mask": "low & "}))
    with pytest.raises(ValueError, match="position 7"):
        PrincipalSparseConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_are_equal(copied):
    config = PrincipalSparseConfig(**OTHER)
    again = copied(config)
    assert again == config and again.peft_type is PeftType.PRINCIPAL_SPARSE


def test_one_config_object_serves_many_models():
    """PEFT writes the layers it found into the object; the next model starts from what was asked for."""
    config = sparse_config()
    llama, gpt2, bigger = tiny(), tiny("gpt2"), tiny(hidden=64)
    hosts = [get_peft_model(model, config) for model in (llama, gpt2, bigger)]
    assert hosts[0].peft_config["default"] is config
    for host, name in ((hosts[0], "q_proj"), (hosts[1], "c_attn"), (hosts[2], "q_proj")):
        assert any(target.endswith(name) for target in host.peft_config["default"].target_modules)
    assert [len(sparse_layers(host)) for host in hosts] == [14, 8, 14]
    hosts[0].add_adapter("second", config)
    assert hosts[0].peft_config["second"].target_modules == config.target_modules


def test_a_change_of_the_config_afterwards_reaches_no_layer():
    """The model holds the caller's own object, as PEFT's task models expect; the layers hold copies."""
    config = sparse_config()
    host = get_peft_model(tiny(), config)
    assert host.peft_config["default"] is config
    config.precision, config.mask = "split", "random"
    assert all(layer.configs["default"].mask == "~principal" for layer in sparse_layers(host).values())
    assert all(layer.configs["default"].precision == "fp32" for layer in sparse_layers(host).values())


def test_it_is_registered():
    member = PeftType.PRINCIPAL_SPARSE
    assert PeftType("PRINCIPAL_SPARSE") is member and member in list(PeftType)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is PrincipalSparseConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[member] is PrincipalSparseModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[member] == PrincipalSparseModel.prefix == "princsparse_"
    assert isinstance(peft.get_peft_config({"peft_type": "PRINCIPAL_SPARSE"}), PrincipalSparseConfig)


def test_every_trainable_name_has_the_prefix_and_the_adapter_in_its_middle():
    """TRL fills its reference adapter by `.default.` in the middle of a name."""
    host = get_peft_model(tiny(), sparse_config())
    names = [name for name, parameter in host.named_parameters() if parameter.requires_grad]
    assert len(names) == 14
    assert all(name.endswith(".princsparse_delta.default.weight") for name in names)
