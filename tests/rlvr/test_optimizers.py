"""A trial's optimiser: PEFT's preconditioner and rates reach the factors, and what does not fit is refused first."""

import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from offprincipal_peft.rlvr.checks import check_trials
from offprincipal_peft.rlvr.config import TrialConfig
from offprincipal_peft.rlvr.methods import build_config
from offprincipal_peft.rlvr.models import load_model
from offprincipal_peft.rlvr.optimizers import PEFTS, build_optimizer, check_optimizer
from offprincipal_peft.rlvr.records import numeric_fields
from offprincipal_peft.rlvr.trial import run_trial
from tiny_trials import save_tiny_task, tiny_trial

OFF = {"method": "offprincipal", "method_options": {"principal_rank": 2}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OFFPRINCIPAL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield save_tiny_task(tmp_path_factory.mktemp("tiny"))


def trial(folder: Path, **fields) -> TrialConfig:
    small = {"method": "lora", "learning_rate": 1e-2, "alpha": 8, "steps": 3, "evaluation_batch": 4}
    return TrialConfig.from_dict({**tiny_trial(folder), **small, **fields})


def numbers(config: TrialConfig) -> str:
    record = run_trial(config)
    assert record["error"] is None, record["error"]["traceback"]
    return json.dumps({k: v for k, v in numeric_fields(record).items() if k not in ("config", "id")}, sort_keys=True)


@pytest.mark.parametrize("fields", [{"method": "lora"}, OFF, {"method": "dora"}], ids=lambda f: f["method"])
def test_equal_rates_of_both_factors_are_adamw(fields, folder):
    """LoRA+ with a ratio of 1 is the trainer's own AdamW to the bit, weight decay too; with another it is not."""
    plain = numbers(trial(folder, **fields))
    same = trial(folder, **fields, optimizer="peft-loraplus", optimizer_options={"loraplus_lr_ratio": 1})
    assert numbers(same) == plain
    assert numbers(trial(folder, **fields, optimizer="peft-loraplus")) != plain
    assert numbers(trial(folder, **fields, optimizer="peft-riemannian")) != plain


def adapted(config: TrialConfig) -> torch.nn.Module:
    torch.manual_seed(0)
    model = get_peft_model(load_model(config.model, "float32", torch.device("cpu")), build_config(config))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)  # neither factor is zero
            parameter.grad = torch.randn_like(parameter)
    return model


def pairs(model: torch.nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return [(p, trained[name.replace("lora_A", "lora_B")]) for name, p in trained.items() if "lora_A" in name]


@pytest.mark.parametrize("fields", [{"method": "lora"}, OFF], ids=lambda f: f["method"])
@pytest.mark.parametrize("damping", [1e-2, 10.0])
def test_the_preconditioner_is_the_papers(fields, damping, folder):
    """One step of 2402.02347's scaled AdamW, written out: Adam of (B'B + d)^-1 dA and of dB (AA' + d)^-1."""
    config = trial(folder, **fields, optimizer="peft-riemannian", optimizer_options={"reg": damping}, weight_decay=0.1)
    model = adapted(config)
    expected = []
    for a, b in pairs(model):
        eye = damping * torch.eye(len(a), dtype=torch.float64)
        a64, b64 = a.detach().double(), b.detach().double()
        steps = (torch.inverse(b64.T @ b64 + eye) @ a.grad.double(), b.grad.double() @ torch.inverse(a64 @ a64.T + eye))
        for value, gradient in zip((a64, b64), steps, strict=True):
            adam = gradient / (gradient.abs() + 1e-8)  # the first step of Adam: both moments are the gradient's
            expected.append((1 - config.learning_rate * 0.1) * value - config.learning_rate * adam)
    assert expected
    optimizer = build_optimizer(config, model)
    optimizer.step()
    seen = [factor.detach().double() for pair in pairs(model) for factor in pair]
    error = max(float((x - y).abs().max()) for x, y in zip(seen, expected, strict=True))
    assert error < 1e-6, error  # observed: 5.0e-8; a step is 1e-2


def test_loraplus_rates(folder):
    config = trial(folder, **OFF, optimizer="peft-loraplus", optimizer_options={"loraplus_lr_ratio": 4.0})
    model = adapted(config)
    rate = {id(p): group["lr"] for group in build_optimizer(config, model).param_groups for p in group["params"]}
    assert pairs(model)
    for a, b in pairs(model):
        assert (rate[id(a)], rate[id(b)]) == (1e-2, 4e-2)


BAD = [
    ({"optimizer": "peft-riemanian"}, r"unknown optimizer 'peft-riemanian' \(did you mean 'peft-riemannian'\?\)"),
    ({"optimizer": "adam_torch"}, r"unknown optimizer 'adam_torch' \(did you mean 'adamw_torch'"),
    ({"optimizer": "qqq"}, "unknown optimizer 'qqq'; there are peft-riemannian, peft-loraplus, and transformers'"),
    ({"optimizer_options": {"reg": 1}}, "are for peft-riemannian and peft-loraplus; those of 'adamw_torch' go into"),
    ({"optimizer": "peft-loraplus", "optimizer_options": {"reg": 1}}, "has no option 'reg'; it takes loraplus_lr_rat"),
    ({"optimizer": "peft-riemannian", "optimizer_options": {"reg": 0}}, "reg=0: it is a number above 0"),
    ({"optimizer": "peft-riemannian", "optimizer_options": {"reg": "big"}}, "reg='big': it is a number above 0"),
    ({"optimizer": "peft-riemannian", "optimizer_options": {"reg": True}}, "reg=True: it is a number above 0"),
    *(
        ({"optimizer": name, "method": method}, f"which '{method}' does not; leave the optimiser at 'adamw_torch'")
        for name in PEFTS
        for method in ("full", "mica", "osf", "safe", "peft-shira")
    ),
    (
        {"optimizer": "peft-loraplus", "method_options": {"train_factors": "B"}},
        "is for methods that train both LoRA factors",
    ),
    (
        {"optimizer": "sgd", "method": "safe", "method_options": {"precision": "split"}},
        "precision='split' trains with MaskedAdamW alone; leave the optimiser at 'adamw_torch'",
    ),
]


@pytest.mark.parametrize(("fields", "words"), BAD)
def test_what_does_not_fit_is_refused_before_anything_trains(fields, words, folder):
    config = trial(folder, **{"label": "mine", **fields})
    with pytest.raises(ValueError, match=f"^mine: .*{words}"):
        check_optimizer(config, build_config(config))
    with pytest.raises(ValueError, match=words):
        check_trials()(config)
    record = run_trial(config)
    assert record["status"] == "failed" and record["error"]["type"] == "ValueError"
    assert record["curve"] == [] and "mine: " in record["error"]["message"]


@pytest.mark.parametrize("optimizer", ["adamw_torch", "sgd", "adafactor", *PEFTS])
def test_what_fits_is_let_through(optimizer, folder):
    check_trials()(trial(folder, optimizer=optimizer))
