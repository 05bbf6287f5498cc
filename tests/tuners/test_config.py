"""What the configuration accepts and refuses, with messages that name the option, and its way through JSON."""

import copy
import dataclasses
import itertools
import json
import math

import pytest
from peft import LoraConfig, PeftConfig
from peft.tuners.lora import config as lora_config

from offprincipal_peft import OffPrincipalLoraConfig
from offprincipal_peft.tuners.offprincipal_lora.config import _REFUSED
from offprincipal_peft.tuners.offprincipal_lora.presets import PRESETS

AXES = {
    "init_subspace": ("bottom", "top", "null", "random", "kaiming"),
    "init_source": ("weight", "geora"),
    "init_scale": ("unit", "lora", "spectral", "native"),
    "init_factors": ("A", "B", "both"),
    "train_factors": ("both", "A", "B"),
    "projection": ("none", "output", "input", "both"),
}
COMBINATIONS = [dict(zip(AXES, values, strict=True)) for values in itertools.product(*AXES.values())]


def contradicts(axes: dict[str, str]) -> bool:
    """The combinations that cannot work, in words of their own."""
    has_triplets = axes["init_subspace"] in ("top", "bottom")
    return (
        (axes["init_scale"] == "spectral" and not has_triplets)
        or (axes["init_source"] == "geora" and not has_triplets)
        # A gradient reaches a factor only through the other one, which must not stay at zero.
        or (axes["init_factors"], axes["train_factors"]) in {("A", "A"), ("B", "B")}
    )


def rank_for(axes: dict[str, str]) -> int:
    return 0 if axes["projection"] == "none" else 4


# -- axes ---------------------------------------------------------------------------------------------------------


def test_every_combination_is_accepted_or_refused_as_it_should_be():
    refused = 0
    for axes in COMBINATIONS:
        if contradicts(axes):
            refused += 1
            with pytest.raises(ValueError, match=r"init_scale|init_source|init_factors"):
                OffPrincipalLoraConfig(**axes, principal_rank=rank_for(axes))
        else:
            config = OffPrincipalLoraConfig(**axes, principal_rank=rank_for(axes))
            assert {name: getattr(config, name) for name in AXES} == axes
    assert (len(COMBINATIONS), refused) == (1440, 740)  # 25 * 7 * 4 work


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("value", ["botom", "", "A ", "NONE", None, 0, True, ["A"]], ids=repr)
def test_a_value_outside_an_axis_names_the_choices(axis, value):
    with pytest.raises(ValueError) as caught:
        OffPrincipalLoraConfig(**{axis: value})
    message = str(caught.value)
    assert message.startswith(f"{axis} must be one of ") and message.endswith(f"got {value!r}.")
    assert all(repr(choice) in message for choice in AXES[axis])


SCALARS = {
    "r": [0, -1, 2.0, 2.5, math.nan, True, "4", None],
    "lora_alpha": [0, -8, math.nan, math.inf, True, "8", None],
    "lora_dropout": [-0.1, 1.0, math.nan],
    "geora_rho": [0.0, 1.0, -0.2, math.nan],
    "seed": [0.5, True, "0", None],
    "principal_rank": [-1, -0.5, 1.0, 1.5, math.nan, math.inf, True, "4", None],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in SCALARS.items() for value in values], ids=repr
)
def test_a_number_out_of_range_is_named_and_shown(name, value):
    with pytest.raises(ValueError) as caught:
        OffPrincipalLoraConfig(**{"projection": "both" if name == "principal_rank" else "none", name: value})
    assert str(caught.value).startswith(name) and repr(value) in str(caught.value)


@pytest.mark.parametrize("pattern", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("value", [0, -2, math.nan, True, "4", None], ids=repr)
def test_a_number_in_a_pattern_is_checked_too(pattern, value):
    with pytest.raises(ValueError) as caught:
        OffPrincipalLoraConfig(**{pattern: {"q_proj": 8, "v_proj": value}})
    assert str(caught.value).startswith(f"{pattern}['v_proj']") and repr(value) in str(caught.value)


@pytest.mark.parametrize(
    "accepted",
    [
        {"r": 1},
        {"lora_alpha": 0.5},
        {"lora_dropout": 0.5},
        {"geora_rho": 0.01},
        {"seed": -3},
        {"principal_rank": 1, "projection": "output"},
        {"principal_rank": 0.999, "projection": "input"},
        {"principal_rank": 0.0},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 2.5}},
        {"modules_to_save": ["lm_head"]},
        {"exclude_modules": ["q_proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
    ],
    ids=str,
)
def test_accepted(accepted):
    config = OffPrincipalLoraConfig(**accepted)
    for name, value in accepted.items():
        found = getattr(config, name)
        assert found == (set(value) if isinstance(found, set) else value)


@pytest.mark.parametrize("k", [0, 0.0])
@pytest.mark.parametrize("projection", ["output", "input", "both"])
def test_a_projection_needs_directions(projection, k):
    with pytest.raises(ValueError, match=f"projection='{projection}' needs principal_rank > 0"):
        OffPrincipalLoraConfig(projection=projection, principal_rank=k)


@pytest.mark.parametrize("k", [1, 0.25])
def test_directions_need_a_projection(k):
    with pytest.raises(ValueError, match=f"principal_rank={k} has no effect with projection='none'"):
        OffPrincipalLoraConfig(principal_rank=k)


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ({"init_scale": "spectral", "init_subspace": "random"}, ["init_scale='spectral'", "'random'", "'top'"]),
        ({"init_source": "geora", "init_subspace": "null"}, ["init_source='geora'", "'null'", "'top'"]),
        ({"init_factors": "A", "train_factors": "A"}, ["init_factors='A'", "train_factors='A'", "Train 'B'"]),
        ({"init_factors": "B", "train_factors": "B"}, ["init_factors='B'", "train_factors='B'", "Train 'A'"]),
    ],
)
def test_a_contradiction_names_both_sides_and_a_way_out(axes, words):
    with pytest.raises(ValueError) as caught:
        OffPrincipalLoraConfig(**axes)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("k", "shape", "expected"),
    [(4, (64, 32), 4), (0.25, (64, 32), 8), (0.25, (32, 64), 8), (0.1, (32, 99), 3), (0.001, (32, 64), 1)],
)
def test_the_fraction_is_of_the_smaller_side(k, shape, expected):
    config = OffPrincipalLoraConfig(principal_rank=k, projection="both")
    assert config.resolve_principal_rank(shape) == expected
    assert OffPrincipalLoraConfig().resolve_principal_rank(shape) == 0


# -- inherited options --------------------------------------------------------------------------------------------


def sub_config(name: str) -> object:
    """PEFT's own settings object, or anything at all where the installed PEFT is too old to have it."""
    return getattr(lora_config, name, object)()


PLAUSIBLE = {
    "init_lora_weights": [False, "gaussian", "pissa", "olora", "mica", "orthogonal"],
    "bias": ["all", "lora_only"],
    "lora_bias": [True],
    "use_dora": [True],
    "use_qalora": [True],
    "use_bdlora": [sub_config("BdLoraConfig")],
    "alora_invocation_tokens": [[1, 2]],
    "velora_config": [sub_config("VeloraConfig")],
    "kasa_config": [sub_config("KasaConfig")],
    "monteclora_config": [sub_config("MontecloraConfig")],
    "arrow_config": [sub_config("ArrowConfig")],
    "eva_config": [sub_config("EvaConfig")],
    "corda_config": [sub_config("CordaConfig")],
    "lora_ga_config": [sub_config("LoraGAConfig")],
    "loftq_config": [{"loftq_bits": 4}],
    "target_parameters": [["mlp.experts.gate_up_proj"]],
    "layer_replication": [[(0, 2), (1, 2)]],
    "megatron_config": [{"hidden_size": 4}],
    "ensure_weight_tying": [True],
}
# Inherited options that keep their meaning here.
SUPPORTED = {
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "r",
    "target_modules",
    "exclude_modules",
    "lora_alpha",
    "lora_dropout",
    "fan_in_fan_out",
    "use_rslora",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "trainable_token_indices",
    "runtime_config",
    # settings of refused options
    "megatron_core",
    "qalora_group_size",
}
LORA_FIELDS = {f.name: f for f in dataclasses.fields(LoraConfig)}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in PLAUSIBLE.items() for value in values], ids=str
)
def test_an_option_that_contradicts_the_method_is_refused(name, value):
    if name not in LORA_FIELDS:
        pytest.skip(f"the installed PEFT has no {name}")
    with pytest.raises(ValueError) as caught:
        OffPrincipalLoraConfig(**{name: value})
    assert str(caught.value) == f"OffPrincipalLoraConfig does not take {name}={value!r}: {_REFUSED[name]}."


@pytest.mark.parametrize("name", PLAUSIBLE)
def test_its_default_is_accepted(name):
    if name not in LORA_FIELDS:
        pytest.skip(f"the installed PEFT has no {name}")
    f = LORA_FIELDS[name]
    default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
    assert getattr(OffPrincipalLoraConfig(**{name: default}), name) == default


def test_every_inherited_option_is_refused_or_known_to_work():
    """A LoRA option that a later PEFT adds has to be looked at before it is let through."""
    assert PLAUSIBLE.keys() == _REFUSED.keys()
    assert LORA_FIELDS.keys() - _REFUSED.keys() - SUPPORTED == set()


# -- presets ------------------------------------------------------------------------------------------------------

TABLE = {  # subspace, source, scale, factors, trained, projection
    "lora": ("kaiming", "weight", "native", "A", "both", "none"),
    "pissa": ("top", "weight", "spectral", "both", "both", "none"),
    "milora": ("bottom", "weight", "spectral", "both", "both", "none"),
    "olora-tail": ("bottom", "weight", "unit", "both", "both", "none"),
    "mica": ("bottom", "weight", "unit", "B", "A", "none"),
    "rlpo": ("top", "weight", "unit", "A", "both", "none"),
    "rlmo": ("bottom", "weight", "unit", "A", "both", "none"),
    "geora": ("top", "geora", "spectral", "both", "both", "none"),
    "offprincipal": ("bottom", "weight", "unit", "A", "both", "both"),
    "offprincipal-random": ("random", "weight", "lora", "A", "both", "both"),
}


@pytest.mark.parametrize("name", TABLE)
def test_presets(name):
    config = OffPrincipalLoraConfig.preset(name)
    axes = ("init_subspace", "init_source", "init_scale", "init_factors", "train_factors", "projection")
    assert tuple(getattr(config, axis) for axis in axes) == TABLE[name]
    assert (config.r, config.lora_alpha, config.target_modules, config.seed) == (16, 32, "all-linear", 0)
    assert config.principal_rank == (1 / 32 if name.startswith("offprincipal") else 0)


def test_there_are_no_other_presets():
    assert PRESETS.keys() == TABLE.keys()


def test_a_preset_can_be_overridden():
    config = OffPrincipalLoraConfig.preset("rlmo", r=4, init_subspace="top", projection="input", principal_rank=3)
    assert (config.r, config.init_subspace, config.principal_rank) == (4, "top", 3)
    assert OffPrincipalLoraConfig.preset("rlmo").init_subspace == "bottom"


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError) as caught:
        OffPrincipalLoraConfig.preset("pisa")
    assert "'pisa'" in str(caught.value) and all(name in str(caught.value) for name in TABLE)


def test_an_unknown_option_is_refused():
    with pytest.raises(TypeError, match="principal_ranks"):
        OffPrincipalLoraConfig.preset("offprincipal", principal_ranks=4)


# -- storage ------------------------------------------------------------------------------------------------------

STORED = {
    **{name: {} for name in TABLE},
    "offprincipal-int": {"principal_rank": 7, "projection": "output"},
    "options": {
        "r": 3,
        "lora_alpha": 2.5,
        "lora_dropout": 0.25,
        "use_rslora": True,
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"q_proj": 5},
        "alpha_pattern": {"v_proj": 7},
        "init_subspace": "random",
        "init_factors": "both",
        "train_factors": "B",
        "geora_rho": 0.3,
        "seed": 12,
        "task_type": "CAUSAL_LM",
    },
}


def stored_config(name: str) -> OffPrincipalLoraConfig:
    return OffPrincipalLoraConfig.preset(name) if name in TABLE else OffPrincipalLoraConfig(**STORED[name])


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("cls", [OffPrincipalLoraConfig, PeftConfig], ids=lambda cls: cls.__name__)
def test_a_saved_config_is_the_same_config(tmp_path, name, cls):
    config = stored_config(name)
    config.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path)
    assert type(loaded) is OffPrincipalLoraConfig
    assert loaded == config
    assert type(loaded.principal_rank) is type(config.principal_rank)


@pytest.mark.parametrize("name", STORED)
def test_to_dict_is_json(name):
    config = stored_config(name)
    found = config.to_dict()
    assert found["peft_type"] == "OFFPRINCIPAL_LORA"
    assert {axis: found[axis] for axis in AXES} == {axis: getattr(config, axis) for axis in AXES}
    found["target_modules"] = None  # a set while in use; save_pretrained writes it as a list
    assert json.loads(json.dumps(found))["principal_rank"] == config.principal_rank


def test_a_saved_config_is_checked_again(tmp_path):
    OffPrincipalLoraConfig.preset("rlmo").save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"init_subspace": "bottom"', '"init_subspace": "botom"'))
    with pytest.raises(ValueError, match="init_subspace must be one of"):
        PeftConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, dataclasses.replace], ids=lambda f: f.__name__)
def test_copies_are_equal(copied):
    config = OffPrincipalLoraConfig.preset("offprincipal", rank_pattern={"q_proj": 4})
    assert copied(config) == config


@pytest.mark.parametrize(
    ("option", "value"),
    [("lora_dropout", "x"), ("geora_rho", "0.2"), ("rank_pattern", ["q_proj"]), ("alpha_pattern", 3)],
)
def test_a_value_of_the_wrong_type_is_named(option, value):
    with pytest.raises(ValueError, match=option):
        OffPrincipalLoraConfig(**{option: value})
