"""The methods: the same rank, alpha, targets and dropout for all, a base that stays, configs from files."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from offprincipal_peft.rlvr.config import TrialConfig
from offprincipal_peft.rlvr.evaluation import as_found
from offprincipal_peft.rlvr.methods import METHODS, OURS, MethodError, build_config, find_method
from tiny_models import character_tokenizer, save_tiny_model

TRIAL = TrialConfig("lora", 1e-3, rank=5, alpha=13, dropout=0.25, target_modules=["q_proj", "up_proj"], seed=7)
# The trial's field -> what PEFT's classes call it.
SAME = {
    "rank": ("r", "rank"),
    "alpha": ("lora_alpha", "alpha", "mica_alpha"),
    "dropout": ("lora_dropout", "dropout", "module_dropout"),
    "target_modules": ("target_modules",),
    "seed": ("seed", "random_seed"),
}
# Super-Tuning's class inherits LoRA's fields and refuses to use them: it trains entries, not factors.
UNUSED = {("peft-supertuning", name) for name in ("rank", "alpha", "dropout")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def tiny_trial(method: str, **fields) -> TrialConfig:
    options = {"principal_rank": 2} if method == "offprincipal" else {}
    return TrialConfig.from_dict(
        {"method": method, "learning_rate": 1e-3, "rank": 4, "method_options": options} | fields
    )


def logits(model: torch.nn.Module) -> Tensor:
    ids = character_tokenizer()(["12+34=", "largest"], padding=True, return_tensors="pt")["input_ids"]
    with as_found(model, 0):
        return model(input_ids=ids).logits


# ---- one trial, every method


@pytest.mark.parametrize("method", [name for name in METHODS if name != "full"])
def test_every_config_has_what_the_trial_says(method):
    config = build_config(dataclasses.replace(TRIAL, method=method))
    fields = {field.name for field in dataclasses.fields(config)}
    found = 0
    for name, aliases in SAME.items():
        for alias in fields & set(aliases):
            if (method, name) in UNUSED:
                assert getattr(config, alias) in (None, 0.0)
                continue
            value, expected = getattr(config, alias), getattr(TRIAL, name)
            assert (set(value) == set(expected)) if name == "target_modules" else (value == expected), alias
            found += 1
    assert found >= 1 and str(config.task_type).endswith("CAUSAL_LM")
    assert not config.inference_mode


def test_low_rank_methods_take_all_four():
    """So that the test above is not passed by classes without any such field."""
    low_rank = [m.name for m in METHODS.values() if m.family == OURS] + ["dora", "peft-pissa"]
    assert len(low_rank) == 12
    for method in low_rank:
        config = build_config(dataclasses.replace(TRIAL, method=method))
        assert (config.r, config.lora_alpha, config.lora_dropout) == (5, 13, 0.25)
        assert set(config.target_modules) == {"q_proj", "up_proj"}


@pytest.mark.parametrize("method", METHODS)
def test_options_are_over_the_shared_ones_and_unknown_ones_named(method):
    if method == "full":
        with pytest.raises(MethodError, match="full: full fine-tuning has no options, got r"):
            build_config(dataclasses.replace(TRIAL, method="full", label="", method_options={"r": 3}))
        return
    changed = dataclasses.replace(TRIAL, method=method, label="mine", method_options={"target_modules": ["k_proj"]})
    assert set(build_config(changed).target_modules) == {"k_proj"}
    with pytest.raises(MethodError, match=r"^mine: .*rnak"):
        build_config(dataclasses.replace(changed, method_options={"rnak": 3}))


def test_every_method_says_what_it_is_and_which_rates_to_try():
    for name, method in METHODS.items():
        assert method.name == name and 10 < len(method.summary) < 80 and method.family
        assert len(method.learning_rates) == 3 and sorted(method.learning_rates) == list(method.learning_rates)


def test_an_unknown_method_names_the_close_one_and_all():
    everything = r"there are full, lora, .*, and any PEFT config as \.json or \.yaml"
    with pytest.raises(MethodError, match=rf"unknown method 'lorra' \(did you mean 'lora'\?\); {everything}"):
        find_method("lorra")
    with pytest.raises(MethodError, match=f"unknown method 'qqq'; {everything}"):
        find_method("qqq")


# ---- whether the base is still there


def trained(folder: Path, method: str) -> torch.nn.Module:
    model = load(folder)
    config = build_config(tiny_trial(method))
    torch.manual_seed(0)
    model = get_peft_model(model, config) if config is not None else model
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    ids = torch.randint(2, 60, (4, 12), generator=torch.Generator().manual_seed(1))
    model.train()
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("method", METHODS)
def test_disabling_the_adapter_gives_the_pretrained_model_where_the_table_says_so(method, folder):
    """Bit for bit: such methods are their own reference of the KL. The others need a second copy, and it shows why."""
    base = logits(load(folder))
    model = trained(folder, method)
    moved = (logits(model) - base).abs().max().item()
    assert moved > 1e-2  # seen: 0.08 (peft-supertuning) to 0.9 (full)
    if METHODS[method].base_intact:
        assert isinstance(model, PeftModel)
        for _ in range(2):  # and again, after it has been on
            with model.disable_adapter():
                assert torch.equal(logits(model), base)
            assert (logits(model) - base).abs().max().item() == moved
        return
    if method == "full":  # nothing to switch off
        assert not isinstance(model, PeftModel)
        return
    with model.disable_adapter():  # OSF of this PEFT keeps the weight as well; its copy is caution
        assert torch.equal(logits(model), base) == (method == "osf")


# ---- configs from files


def write(path: Path, fields: dict) -> str:
    path.write_text(json.dumps(fields) if path.suffix == ".json" else "\n".join(f"{k}: {v}" for k, v in fields.items()))
    return str(path)


@pytest.mark.parametrize("suffix", [".json", ".yaml", ".yml"])
def test_a_files_own_fields_win_and_the_rest_is_the_trials(suffix, tmp_path):
    name = write(
        tmp_path / f"mine{suffix}", {"peft_type": "LORA", "r": 3, "use_rslora": "true" if suffix != ".json" else True}
    )
    config = build_config(dataclasses.replace(TRIAL, method=name))
    assert type(config) is LoraConfig
    assert (config.r, config.use_rslora) == (3, True)
    assert (config.lora_alpha, config.lora_dropout, set(config.target_modules)) == (13, 0.25, {"q_proj", "up_proj"})
    over = build_config(dataclasses.replace(TRIAL, method=name, method_options={"r": 2}))
    assert over.r == 2
    method = find_method(name)
    assert (method.name, method.base_intact) == (f"mine{suffix}", False)


@pytest.mark.parametrize("kind", ["OFFPRINCIPAL_LORA", "PRINCIPAL_SPARSE", "VERA", "IA3", "LN_TUNING"])
def test_any_peft_type(kind, tmp_path):
    """Classes without rank or dropout get the shared fields that they have."""
    config = build_config(dataclasses.replace(TRIAL, method=write(tmp_path / "a.json", {"peft_type": kind})))
    assert config.peft_type.value == kind and set(config.target_modules) == {"q_proj", "up_proj"}


@pytest.mark.parametrize("method", ["lora", "offprincipal", "dora", "safe", "peft-shira"])
def test_a_saved_adapters_folder_is_a_method_that_trains(method, folder, tmp_path):
    """save_pretrained writes inference_mode: true, with which nothing would train."""
    model = get_peft_model(load(folder), build_config(tiny_trial(method)))
    model.save_pretrained(tmp_path / "saved")
    again = get_peft_model(load(folder), build_config(tiny_trial(str(tmp_path / "saved"), rank=2)))
    assert again.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()
    assert again.get_nb_trainable_parameters()[0] > 0


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"peft_type": "LORA", "rnak": 3}, "LoraConfig has no field 'rnak'"),
        ({"peft_type": "LORA", "lora_alpa": 3}, r"LoraConfig has no field 'lora_alpa' .did you mean 'lora_alpha'"),
        ({"peft_type": "LORRA"}, "peft_type is 'LORRA'; it is one of .*LORA.*OFFPRINCIPAL_LORA.*PRINCIPAL_SPARSE"),
        ({"r": 3}, "peft_type is None; it is one of"),
        ([1], "a list, not the fields of a PEFT config"),
    ],
)
def test_a_file_with_mistakes_is_named(fields, words, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(fields))
    with pytest.raises(MethodError, match=rf"a.json: {words}"):
        find_method(str(tmp_path / "a.json"))


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "a.yaml").write_text("r: [1\n")
    for name in ("a.json", "a.yaml"):
        with pytest.raises(MethodError, match=f"{name}: neither JSON nor YAML"):
            find_method(str(tmp_path / name))
    with pytest.raises(MethodError, match=r"none.yaml: No such file or directory"):
        find_method(str(tmp_path / "none.yaml"))
    with pytest.raises(MethodError, match=r"adapter_config.json: No such file or directory"):
        find_method(str(tmp_path))


def test_values_that_the_class_refuses_are_said_with_the_label(tmp_path):
    name = write(tmp_path / "a.json", {"peft_type": "OFFPRINCIPAL_LORA", "init_subspace": "sideways"})
    with pytest.raises(MethodError, match=r"^mine: .*sideways"):
        build_config(dataclasses.replace(TRIAL, method=name, label="mine"))
