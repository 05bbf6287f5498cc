"""Switches of the trainers: checkpointing, autocast, clipping, evaluation, embedding noise, packing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer, TrainerCallback

from helpers import assert_same_base, base_bytes
from lifecycle import trainable
from trainers import BF16, CASES, Case, adapter_state, assert_same_state, each, grpo_trainer, logged, sentences, sft


def trained(case: Case, folder: Path, more: dict[str, Any] | None = None, **options: Any) -> Trainer:
    model = case.adapted()
    trainer = sft(model, folder, more=case.optimizers(model) | (more or {}), **options)
    trainer.train()
    return trainer


@each(CASES[1:])
@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_gradient_checkpointing_changes_nothing(reentrant: bool, case: Case, tmp_path: Path) -> None:
    plain = trained(case, tmp_path)
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    checkpointed = trained(case, tmp_path, **options)
    assert logged(checkpointed, "loss") == logged(plain, "loss")
    assert_same_state(adapter_state(checkpointed.model), adapter_state(plain.model))


@each([*CASES[1:6], *BF16[3:]])
def test_bf16_autocast(case: Case, tmp_path: Path) -> None:
    own = base_bytes(case.base())
    model = case.adapted()
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    more = case.optimizers(model) | {"train_dataset": sentences(4)}  # one batch, so that the losses compare
    trainer = sft(model, tmp_path, steps=3, more=more, bf16=True, gradient_checkpointing=True)
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[-1] < losses[0]
    assert {name: p.dtype for name, p in model.named_parameters()} == dtypes
    assert all(value.isfinite().all() for value in adapter_state(model).values() if value.is_floating_point())
    assert_same_base(own, base_bytes(model.unload()))


class GradientNorms(TrainerCallback):
    """The norm of all gradients together as each optimiser step finds them."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        squares = [p.grad.double().square().sum() for p in trainable(model).values()]
        self.seen.append(torch.stack(squares).sum().sqrt().item())


@each(CASES)
def test_gradients_are_clipped(case: Case, tmp_path: Path) -> None:
    free, clipped = GradientNorms(), GradientNorms()
    trained(case, tmp_path, {"callbacks": [free]}, max_grad_norm=1e9)
    trainer = trained(case, tmp_path, {"callbacks": [clipped]}, max_grad_norm=1e-3)
    assert min(free.seen) > 0.1
    assert all(norm == pytest.approx(1e-3, rel=2e-3) for norm in clipped.seen)
    assert logged(trainer, "grad_norm")[0] == pytest.approx(free.seen[0], rel=1e-5)  # what is logged is before it


@pytest.mark.parametrize(("case", "loss_only"), [(case, i % 2 == 0) for i, case in enumerate(CASES)], ids=str)
def test_evaluation_in_between_changes_nothing(case: Case, loss_only: bool, tmp_path: Path) -> None:
    plain = trained(case, tmp_path, steps=3)
    held_out = {"eval_dataset": sentences(6)}
    options = {"eval_strategy": "steps", "eval_steps": 1, "prediction_loss_only": loss_only}
    trainer = trained(case, tmp_path, held_out, steps=3, **options)
    assert_same_state(adapter_state(trainer.model), adapter_state(plain.model))
    losses = logged(trainer, "eval_loss")
    assert len(losses) == 3 and len(set(losses)) == 3
    assert trainer.evaluate()["eval_loss"] == losses[-1]
    predictions = trainer.predict(trainer.eval_dataset).predictions
    assert (predictions is None) == loss_only
    assert_same_base(base_bytes(case.base()), base_bytes(trainer.model.unload()))


@each([CASES[1], CASES[3], CASES[6]])
def test_noise_on_the_embeddings(case: Case, tmp_path: Path) -> None:
    plain = trained(case, tmp_path)
    noisy = trained(case, tmp_path, neftune_noise_alpha=5.0)
    assert logged(noisy, "loss")[0] != logged(plain, "loss")[0]
    assert not noisy.model.get_input_embeddings()._forward_hooks
    assert_same_base(base_bytes(case.base()), base_bytes(noisy.model.unload()))


@each([CASES[3], CASES[4], CASES[6]])
@pytest.mark.parametrize("packing", ["bfd", "wrapped"])
def test_packed_sequences(packing: str, case: Case, tmp_path: Path) -> None:
    options = {"packing": True, "packing_strategy": packing, "max_length": 24}
    trainer = trained(case, tmp_path, {"train_dataset": sentences(8)}, steps=3, **options)  # one batch of packs
    losses = logged(trainer, "loss")
    assert losses[-1] < losses[0]
    assert_same_base(base_bytes(case.base()), base_bytes(trainer.model.unload()))


@each(CASES)
def test_modules_that_are_trained_whole(case: Case, tmp_path: Path) -> None:
    model = get_peft_model(case.base(), case.config(modules_to_save=["lm_head"]))
    before = model.base_model.model.lm_head.modules_to_save["default"].weight.detach().clone()
    trainer = sft(model, tmp_path, more=case.optimizers(model))
    trainer.train()
    assert not torch.equal(model.base_model.model.lm_head.modules_to_save["default"].weight, before)
    with model.disable_adapter():  # unload() keeps the trained module, by PEFT's design
        assert_same_base(base_bytes(case.base()), base_bytes(model))


@each(CASES)
def test_evaluation_of_a_policy(case: Case, tmp_path: Path) -> None:
    """GRPO generates and scores against the reference while it evaluates, too."""
    model = case.adapted()
    trainer = grpo_trainer(model, tmp_path, more=case.optimizers(model))
    trainer.eval_dataset = trainer.train_dataset.select(range(4))
    first = trainer.evaluate()
    assert first["eval_kl"] == 0.0
    trainer.train()
    state = adapter_state(model)
    assert trainer.evaluate()["eval_kl"] > 0.0
    assert_same_state(adapter_state(model), state)
