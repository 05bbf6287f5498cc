"""What TRL's trainers write and load again: best checkpoints, adapters alone, a folder that AutoPeft reads."""

import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM

from helpers import assert_same_base, base_bytes, token_batch
from lifecycle import logits, trainable
from sparse_models import no_new_mask
from trainers import CASES, Case, adapter_state, assert_same_state, each, sentences, sft

IDS = token_batch(128)


def saved_base(case: Case, folder: Path) -> str:
    case.base().save_pretrained(folder)
    return str(folder)


@each(CASES)
def test_the_best_checkpoint_is_loaded_at_the_end(case: Case, tmp_path: Path) -> None:
    """The worst loss counts as the best, so that it is not the last."""
    model = case.adapted()
    own = base_bytes(case.base())
    trainer = sft(
        model,
        tmp_path,
        steps=3,
        more=case.optimizers(model) | {"eval_dataset": sentences(4)},
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=1,
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
    )
    names = set(trainable(model))
    with no_new_mask():
        trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name in ("checkpoint-1", "checkpoint-2")
    loaded = PeftModel.from_pretrained(case.base(), best)
    last = PeftModel.from_pretrained(case.base(), tmp_path / "checkpoint-3")
    assert_same_state(adapter_state(model), adapter_state(loaded))
    assert torch.equal(logits(model, IDS), logits(loaded.eval(), IDS))
    assert not torch.equal(logits(model, IDS), logits(last.eval(), IDS))
    assert set(trainable(model)) in (names, set()), "nothing else became trainable"
    evaluated = trainer.evaluate()["eval_loss"]
    assert evaluated == trainer.state.best_metric
    assert_same_base(own, base_bytes(model.unload()))


@each(CASES)
def test_checkpoints_without_an_optimiser(case: Case, tmp_path: Path) -> None:
    model = case.adapted()
    options = {"save_strategy": "steps", "save_steps": 2, "save_only_model": True}
    sft(model, tmp_path, more=case.optimizers(model), **options).train()
    folder = tmp_path / "checkpoint-2"
    assert not list(folder.glob("optimizer*")) and (folder / "adapter_model.safetensors").exists()
    assert not list(folder.glob("model*.safetensors")), "the base was saved as well"
    with no_new_mask():
        loaded = PeftModel.from_pretrained(case.base(), folder)
    assert_same_state(adapter_state(loaded), adapter_state(model))


@each(CASES)
def test_a_saved_model_is_read_by_autopeft(case: Case, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(saved_base(case, tmp_path / "base"), dtype=case.dtype)
    more = {"peft_config": case.config()}
    trainer = sft(base, tmp_path / "run", steps=2, more=more)
    if case.own_optimizer:
        trainer.optimizer = case.optimizers(trainer.model)["optimizers"][0]
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(tmp_path / "base")
    with no_new_mask():
        loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out", dtype=case.dtype)
    assert_same_state(adapter_state(loaded), adapter_state(trainer.model))
    trainer.model.eval()
    assert torch.equal(logits(loaded.eval(), IDS), logits(trainer.model, IDS))


@each([CASES[3], CASES[4], CASES[6]])
def test_a_model_that_the_trainer_loads_itself(case: Case, tmp_path: Path) -> None:
    """From a folder's name, as scripts do."""
    name = saved_base(case, tmp_path / "base")
    dtype = str(case.dtype).removeprefix("torch.")
    more = {"peft_config": case.config()}
    trainer = sft(name, tmp_path / "run", steps=2, more=more, model_init_kwargs={"dtype": dtype})
    if case.own_optimizer:
        trainer.optimizer = case.optimizers(trainer.model)["optimizers"][0]
    trainer.train()
    same = case.adapted()
    again = sft(same, tmp_path / "again", steps=2, more=case.optimizers(same))
    again.train()
    assert_same_state(adapter_state(trainer.model), adapter_state(same))


def test_a_dtype_is_what_the_base_was_saved_in() -> None:
    with pytest.raises(ValueError, match="bfloat16"):
        Case("fp32 base", CASES[6].config).adapted()
