"""A trial's config: every field is checked, and its id is a function of all of them."""

import dataclasses
import json
import math
import re
import subprocess
import sys

import pytest

from offprincipal_peft.rlvr import config as config_module
from offprincipal_peft.rlvr.config import TrialConfig

FIELDS = [f.name for f in dataclasses.fields(TrialConfig)]
BASE = {"method": "lora", "learning_rate": 1e-4}
# Another good value of every field.
OTHER = {
    "method": "dora",
    "learning_rate": 2e-4,
    "label": "mine",
    "method_options": {"use_rslora": True},
    "model": "some/folder",
    "dtype": "bfloat16",
    "quantization": "nf4",
    "other_text": "some/text.txt",
    "device": "cpu",
    "task": "products",
    "task_options": {"largest": 9},
    "algorithm": "rloo",
    "rank": 8,
    "alpha": 16,
    "dropout": 0.1,
    "target_modules": ["q_proj"],
    "steps": 3,
    "prompts_per_step": 2,
    "group_size": 4,
    "max_completion_length": 5,
    "temperature": 0.7,
    "beta": 0.1,
    "optimizer": "sgd",
    "optimizer_options": {"reg": 0.1},
    "weight_decay": 0.1,
    "warmup_steps": 2,
    "scheduler": "linear",
    "max_grad_norm": 0.5,
    "trainer_options": {"scale_rewards": False},
    "train_items": 99,
    "validation_items": 9,
    "test_items": 8,
    "evaluate_every": 4,
    "evaluation_batch": 16,
    "geometry": False,
    "k": 8,
    "seed": 1,
    "threads": 1,
}
COUNTS = ("rank", "alpha", "steps", "prompts_per_step", "group_size", "max_completion_length", "evaluation_batch")
ITEMS = ("train_items", "validation_items", "test_items")
NOT_NEGATIVE = ("evaluate_every", "seed", "threads", "warmup_steps")
POSITIVE = ("learning_rate", "temperature", "max_grad_norm", "k")
FROM_ZERO = ("beta", "weight_decay", "dropout")
TEXTS = ("method", "label", "model", "device", "task", "optimizer", "scheduler")
OPTIONS = ("method_options", "task_options", "trainer_options", "optimizer_options")
BAD = [
    *((name, value) for name in (*COUNTS, *ITEMS) for value in (0, -1, 1.0, True, "3", None)),
    *((name, value) for name in NOT_NEGATIVE for value in (-1, 1.0, False, "3", None)),
    *((name, value) for name in POSITIVE for value in (0, -1e-4, math.nan, math.inf, True, "fast", None)),
    *((name, value) for name in FROM_ZERO for value in (-0.1, math.nan, -math.inf, False, "none", None)),
    *(("algorithm", value) for value in ("ppo", "GRPO", "", None)),
    *(("dtype", value) for value in ("float16", "bf16", "", None)),
    *(("quantization", value) for value in ("int4", "fp4", "8bit", "", None, False)),
    *(("other_text", value) for value in (3, None, False)),
    *((name, value) for name in TEXTS for value in (3, None, ["lora"]) if name != "label" or value),
    *((name, value) for name in OPTIONS for value in ([], "largest=3", None, {3: 4})),
]
# Accepted here. Most end their trial with a reason once the model is loaded; geometry="no" is taken for yes.
UNCHECKED = [
    ("method", ""),
    ("model", ""),
    ("dropout", 1.0),
    ("target_modules", 3),
    ("target_modules", []),
    ("geometry", "no"),
    ("seed", 2**32),
]


def test_this_file_knows_every_field():
    assert set(OTHER) == set(FIELDS)
    assert {name for name, _ in BAD + UNCHECKED} == set(FIELDS)


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_value_is_refused_with_its_field(name, value):
    if name == "group_size":
        expected = "group_size=.*: a group compares at least 2|group_size=.*whole number"
    else:
        expected = f"{name}={re.escape(repr(value))}: it (is a whole number|is a number|is one of|is text|maps names)"
    with pytest.raises(ValueError, match=expected):
        TrialConfig.from_dict({**BASE, name: value})


@pytest.mark.parametrize(("name", "value"), UNCHECKED)
def test_further_bad_values(name, value):
    with pytest.raises(ValueError, match=name):
        TrialConfig.from_dict({**BASE, name: value})


def test_groups_are_of_two_at_least_except_without_any():
    with pytest.raises(ValueError, match="group_size=1: a group compares at least 2 completions"):
        TrialConfig.from_dict({**BASE, "group_size": 1})
    assert TrialConfig.from_dict({**BASE, "group_size": 1, "algorithm": "sft"}).group_size == 1


@pytest.mark.parametrize("name", [*POSITIVE, *FROM_ZERO])
def test_numbers_that_yaml_reads_as_text(name):
    """YAML 1.1 takes 1e-4 for text."""
    config = TrialConfig.from_dict({**BASE, name: "1e-4"})
    assert getattr(config, name) == 1e-4
    assert config == TrialConfig.from_dict({**BASE, name: 1e-4})
    assert config.trial_id == TrialConfig.from_dict({**BASE, name: 1e-4}).trial_id


@pytest.mark.parametrize("name", ["lr", "learning_rates", "ranks", "seeds", ""])
def test_an_unknown_field_names_the_known(name):
    with pytest.raises(ValueError, match=f"unknown field '{name}' of a trial.*; the fields are method, learning_rate"):
        TrialConfig.from_dict({**BASE, name: 1})


def test_the_close_field_is_proposed():
    with pytest.raises(ValueError, match="did you mean 'learning_rate'"):
        TrialConfig.from_dict({"method": "lora", "learning_rat": 1e-4})


@pytest.mark.parametrize(
    ("values", "words"),
    [({}, "method and learning_rate"), ({"method": "lora"}, "learning_rate"), ({"learning_rate": 1.0}, "method")],
)
def test_what_a_trial_needs(values, words):
    with pytest.raises(ValueError, match=f"a trial needs {words}$"):
        TrialConfig.from_dict(values)


def test_there_and_back_through_json():
    for values in (BASE, OTHER):
        config = TrialConfig.from_dict(values)
        assert TrialConfig.from_dict(config.to_dict()) == config
        again = TrialConfig.from_dict(json.loads(json.dumps(config.to_dict())))
        assert again == config and again.trial_id == config.trial_id
        assert set(config.to_dict()) == set(FIELDS)


def test_the_dict_is_a_copy():
    config = TrialConfig.from_dict(OTHER)
    config.to_dict()["method_options"]["use_rslora"] = False
    assert config.method_options == {"use_rslora": True}
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 3  # type: ignore[misc]


# ---- ids


@pytest.mark.parametrize("name", FIELDS)
def test_the_id_changes_with_every_field(name):
    config = TrialConfig.from_dict(BASE)
    assert getattr(config, name) != OTHER[name]
    assert TrialConfig.from_dict({**BASE, name: OTHER[name]}).trial_id != config.trial_id


@pytest.mark.parametrize("name", config_module.LATER)
def test_a_field_that_came_later_leaves_earlier_ids_as_they_were(name):
    """A record's id is checked against its config, and folders of finished trials are taken up again by it."""
    config = TrialConfig.from_dict({**BASE, name: config_module.LATER[name]})
    assert config == TrialConfig.from_dict(BASE)
    assert config.trial_id == "lora-lr0.0001-s0-05b09a86"  # as the version without the field named it


def test_ids_are_the_same_in_another_process():
    code = (  # the module alone, by its file: the package would import torch, which takes seconds
        "import importlib.util, json, sys\n"
        f"spec = importlib.util.spec_from_file_location('config', {config_module.__file__!r})\n"
        "sys.modules['config'] = module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print([module.TrialConfig.from_dict(v).trial_id for v in json.load(sys.stdin)])\n"
    )
    turned = dict(reversed(OTHER.items()))  # the order in which a file lists its fields is nothing
    ids = [TrialConfig.from_dict(v).trial_id for v in (BASE, OTHER)]
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps([BASE, turned]),
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "77", "PATH": ""},
    )
    assert done.stdout.strip() == str(ids)


def test_the_order_of_options_is_nothing():
    one, other = {"r": 3, "use_rslora": True}, {"use_rslora": True, "r": 3}
    ids = {TrialConfig.from_dict({**BASE, "method_options": options}).trial_id for options in (one, other)}
    assert len(ids) == 1


def test_a_whole_number_is_the_same_number_as_a_float():
    """YAML's `beta: 0` and the default 0.0 are one trial."""
    for name in (*POSITIVE, *FROM_ZERO):
        value = 0 if name == "dropout" else 1  # a dropout of 1 is refused
        whole, floating = (TrialConfig.from_dict({**BASE, name: kind(value)}) for kind in (int, float))
        assert whole == floating and whole.trial_id == floating.trial_id, name


@pytest.mark.parametrize(
    ("label", "start"),
    [
        ("~principal", "~principal-lr"),
        ("random(safe)", "random.safe-lr"),
        ("configs/my adapter.yaml", "configs_my_adapter.yaml-lr"),
        ("../../etc", "_.._etc-lr"),
        ("ΔW off", "_W_off-lr"),
        ("x" * 300, "x" * 60 + "-lr"),
    ],
)
def test_an_id_is_a_file_name(label, start):
    name = TrialConfig.from_dict({**BASE, "label": label}).trial_id
    assert name.startswith(start) and re.fullmatch(r"[A-Za-z0-9._~-]+", name) and len(name) < 100
    assert not name.startswith((".", "-"))


def test_labels_that_read_the_same_as_file_names_stay_apart():
    ids = {TrialConfig.from_dict({**BASE, "label": label}).trial_id for label in ("a(b)", "a.b", "a|b", "a&b")}
    assert len(ids) == 4


def test_the_label_is_the_method_where_none_is_given():
    assert TrialConfig.from_dict(BASE).label == "lora"
    assert TrialConfig.from_dict({**BASE, "label": "mine"}).label == "mine"
