"""Each TRL trainer with each kind of adapter: what trains, what does not, and where training starts from."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import Trainer

from helpers import assert_same_base, base_bytes
from lifecycle import trainable
from offprincipal_peft import MaskedAdamW
from trainers import CASES, RATE, TRAINERS, Case, adapter_state, assert_same_state, each, logged


def build(kind: str, case: Case, folder: Path, ready: bool, **options: Any) -> Trainer:
    """By `peft_config=`, or with a model that has its adapter already."""
    if ready:
        model = case.adapted()
        return TRAINERS[kind](model, folder, more=case.optimizers(model), **options)
    more: dict[str, Any] = {"peft_config": case.config()}
    if case.own_optimizer and kind == "sft":  # the one trainer that takes it by class
        more["optimizer_cls_and_kwargs"] = (MaskedAdamW, {"lr": RATE})
    trainer = TRAINERS[kind](case.base(), folder, more=more, **options)
    if case.own_optimizer and kind != "sft":
        trainer.optimizer = MaskedAdamW(trainable(trainer.model).values(), lr=RATE)
    return trainer


@each(CASES)
@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("ready", [False, True], ids=["peft_config", "ready model"])
def test_only_the_adapter_trains_and_it_starts_as_the_reference(
    ready: bool, kind: str, case: Case, tmp_path: Path
) -> None:
    bare = base_bytes(case.base())
    trainer = build(kind, case, tmp_path, ready)
    model = trainer.model
    names = set(trainable(model))
    start = adapter_state(model)
    assert names and all(".default." in name for name in names)
    trainer.train()
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert {name for name, p in model.named_parameters() if id(p) in held} == names
    after = adapter_state(model)
    moved = {name for name, value in after.items() if not torch.equal(value, start[name])}
    values = {name.replace(".weight", ".master") if case.own_optimizer else name for name in names}
    assert moved == values, "only trained values move, and all of them do"
    assert all(math.isfinite(loss) for loss in logged(trainer, "loss"))
    assert_starts_as_reference(kind, trainer)
    assert_same_base(bare, base_bytes(model.unload()))


def assert_starts_as_reference(kind: str, trainer: Trainer) -> None:
    if kind in ("rloo", "grpo"):
        kl = logged(trainer, "kl")
        assert kl[0] == 0.0
        assert kl[1] != 0.0
    elif kind == "dpo":
        for key in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
            rewards = logged(trainer, key)
            assert rewards[0] == 0.0, key
            assert rewards[1] != 0.0, key
        assert logged(trainer, "loss")[0] == torch.tensor(2.0).log().item()


@each(CASES)
def test_a_ready_model_and_a_config_train_alike(case: Case, tmp_path: Path) -> None:
    states = []
    for ready in (False, True):
        trainer = build("sft", case, tmp_path, ready)
        trainer.train()
        assert isinstance(trainer.model, PeftModel)
        states.append(adapter_state(trainer.model))
    assert_same_state(states[1], states[0])


def test_a_split_master_refuses_the_optimiser_that_a_trainer_makes(tmp_path: Path) -> None:
    case = CASES[-1]
    trainer = TRAINERS["sft"](case.base(), tmp_path, more={"peft_config": case.config()})
    start = adapter_state(trainer.model)
    with pytest.raises(RuntimeError, match="MaskedAdamW"):
        trainer.train()
    assert_same_state(adapter_state(trainer.model), start)
