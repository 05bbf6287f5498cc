"""The reference of an adapter that was trained before is that adapter, exactly, in all trainers that have one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, ShiraConfig, get_peft_model
from torch import Tensor

from helpers import assert_same_base, base_bytes, token_batch
from lifecycle import tiny
from sparse_models import no_new_mask
from trainers import (
    BF16,
    CASES,
    TRAINERS,
    Case,
    adapter_state,
    assert_same_state,
    dpo,
    each,
    grpo_trainer,
    logged,
    pretrained,
)

IDS = token_batch(128)
WITH_REFERENCE = ["dpo", "rloo", "grpo"]
SOME_BF16 = [c for c in BF16 if c.name in ("lora-bf16", "milora-bf16", "offprincipal-bf16", "sparse-bf16")]


def first_distance(kind: str, trainer: Any) -> float:
    """How far the policy is from its reference at the first step; the trainer has run."""
    if kind == "dpo":
        return max(abs(logged(trainer, key)[0]) for key in ("rewards/chosen", "rewards/rejected", "rewards/margins"))
    return abs(logged(trainer, "kl")[0])


def logits_of(model: PeftModel, adapter: str) -> Tensor:
    before = model.active_adapter
    model.set_adapter(adapter)
    with torch.no_grad():
        found = model(input_ids=IDS).logits
    model.set_adapter(before)
    return found


@each([*CASES, *SOME_BF16])
@pytest.mark.parametrize("kind", WITH_REFERENCE)
def test_a_saved_adapter_trains_on_against_its_own_start(kind: str, case: Case, tmp_path: Path) -> None:
    source = pretrained(case)
    bare = base_bytes(case.base())
    start = logits_of(source, "default")
    source.save_pretrained(tmp_path / "adapter")
    with no_new_mask():
        model = PeftModel.from_pretrained(case.base(), tmp_path / "adapter", is_trainable=True)
        trainer = TRAINERS[kind](model, tmp_path / "run", more=case.optimizers(model))
        assert "ref" in model.peft_config
        trainer.train()
    assert first_distance(kind, trainer) == 0.0
    assert torch.equal(logits_of(model, "ref"), start), "the reference moved"
    assert not torch.equal(logits_of(model, "default"), start), "the policy did not"
    assert_same_base(bare, base_bytes(model.unload()))


@pytest.mark.parametrize(
    ("case", "fresh"), [*((case, False) for case in CASES), (CASES[3], True), (CASES[6], True)], ids=str
)
def test_reference_log_probabilities_computed_in_advance(case: Case, fresh: bool, tmp_path: Path) -> None:
    """TRL then walks the data set before training and caches what it finds."""
    model = case.adapted() if fresh else pretrained(case)
    start = adapter_state(model)
    trainer = dpo(model, tmp_path, more=case.optimizers(model), precompute_ref_log_probs=True)
    assert_same_state(adapter_state(model), start)
    trainer.train()
    assert first_distance("dpo", trainer) == 0.0


@each(CASES)
def test_the_reference_is_exact_under_autocast_and_checkpointing(case: Case, tmp_path: Path) -> None:
    for kind in ("dpo", "grpo"):
        model = pretrained(case)
        options = {"bf16": True, "gradient_checkpointing": True}
        trainer = TRAINERS[kind](model, tmp_path / kind, more=case.optimizers(model), **options)
        trainer.train()
        assert first_distance(kind, trainer) == 0.0, kind


@each(CASES)
def test_several_updates_per_generation(case: Case, tmp_path: Path) -> None:
    """The old policy's log-probabilities are then computed apart, and the ratio is one at the first of them."""
    model = pretrained(case)
    trainer = grpo_trainer(
        model, tmp_path, steps=4, more=case.optimizers(model), num_iterations=2, steps_per_generation=1
    )
    trainer.train()
    kl = logged(trainer, "kl")
    assert kl[0] == 0.0
    assert all(value != 0.0 for value in kl[1:])


def test_the_measurement_sees_a_wrong_reference(tmp_path: Path) -> None:
    """PEFT's PiSSA writes its residual into the base; its SHiRA names parameters so that TRL copies none of them."""
    pissa = LoraConfig(r=4, init_lora_weights="pissa", target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = dpo(tiny(), tmp_path / "pissa", steps=1, more={"peft_config": pissa})
    trainer.train()
    assert first_distance("dpo", trainer) > 1e-4
    shira = get_peft_model(tiny(), ShiraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(0)
    for p in shira.parameters():
        if p.requires_grad:
            p.data.copy_(0.05 * torch.randn(p.shape, generator=generator))
    trainer = dpo(shira, tmp_path / "shira", steps=1)
    trainer.train()
    assert first_distance("dpo", trainer) > 1e-4
