"""TRL's GRPOTrainer with sparse fine-tuning: the reference is the policy's start, exactly, by both of its routes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, ShiraConfig, get_peft_model

from grpo import kl_per_step, trainer_for
from helpers import assert_same_base, base_bytes, tiny_llama, token_batch
from offprincipal_peft import MaskedAdamW, PrincipalSparseConfig

CASES = [("fp32", torch.float32), ("fp32", torch.bfloat16), ("split", torch.bfloat16)]
IDS = ["fp32 delta, fp32 base", "fp32 delta, bf16 base", "split"]


def _config(precision: str = "fp32", **options: Any) -> PrincipalSparseConfig:
    settings: dict[str, Any] = {"mask": "safe", "precision": precision, "task_type": "CAUSAL_LM"}
    return PrincipalSparseConfig(**{**settings, **options})


def _optimizers(model: PeftModel, precision: str) -> dict[str, Any]:
    """A split master needs its own optimiser, which the trainer takes ready-made."""
    if precision == "fp32":
        return {}
    return {"optimizers": (MaskedAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), None)}


def _values(model: PeftModel, adapter: str) -> dict[str, torch.Tensor]:
    model.set_adapter(adapter)
    with torch.no_grad():
        logits = model(input_ids=token_batch(128)).logits
    model.set_adapter("default")
    return {"logits": logits}


def _trained(precision: str, dtype: torch.dtype) -> PeftModel:
    model = get_peft_model(tiny_llama(dtype), _config(precision))
    optimizer = MaskedAdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for step in range(2):
        ids = token_batch(128, seed=step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("structure", ["element", "row", "column"])
def test_kl_is_zero_at_the_first_step_with_a_peft_config(structure: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_llama(dtype)
    before = base_bytes(model)
    trainer = trainer_for(model, tmp_path, _config(structure=structure))
    kl = kl_per_step(trainer)
    assert kl[0] == 0.0
    assert kl[1] != 0.0  # the policy moved
    assert_same_base(before, base_bytes(trainer.model.unload()))


@pytest.mark.parametrize(("precision", "dtype"), CASES, ids=IDS)
@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "trained before"])
def test_kl_is_zero_at_the_first_step_of_a_ready_model(
    precision: str, dtype: torch.dtype, fresh: bool, tmp_path: Path
) -> None:
    """A ready PeftModel gets a "ref" adapter, which TRL fills by copying the parameters named `.default.`."""
    model = get_peft_model(tiny_llama(dtype), _config(precision)) if fresh else _trained(precision, dtype)
    start = _values(model, "default")
    trainer = trainer_for(model, tmp_path, **_optimizers(model, precision))
    assert "ref" in trainer.model.peft_config
    kl = kl_per_step(trainer)
    assert kl[0] == 0.0
    assert kl[1] != 0.0
    assert torch.equal(_values(trainer.model, "ref")["logits"], start["logits"]), "the reference moved"
    assert not torch.equal(_values(trainer.model, "default")["logits"], start["logits"])


def test_with_gradient_checkpointing_and_autocast(tmp_path: Path) -> None:
    trainer = trainer_for(tiny_llama(), tmp_path, _config(), gradient_checkpointing=True, bf16=True)
    kl = kl_per_step(trainer)
    assert kl[0] == 0.0
    assert kl[1] != 0.0


@pytest.mark.parametrize(("precision", "dtype"), CASES, ids=IDS)
def test_a_saved_adapter_continues_against_its_own_start(precision: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = _trained(precision, dtype)
    start = _values(model, "default")
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny_llama(dtype), tmp_path / "adapter", is_trainable=True)
    trainer = trainer_for(loaded, tmp_path / "run", **_optimizers(loaded, precision))
    assert kl_per_step(trainer)[0] == 0.0
    assert torch.equal(_values(trainer.model, "ref")["logits"], start["logits"])


def test_the_measurement_sees_a_wrong_reference(tmp_path: Path) -> None:
    """PEFT's SHiRA names its parameters so that TRL copies none of them into the reference."""
    model = get_peft_model(tiny_llama(), ShiraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.requires_grad:
            p.data.copy_(0.05 * torch.randn(p.shape, generator=generator))
    assert kl_per_step(trainer_for(model, tmp_path, steps=1))[0] > 1e-5
