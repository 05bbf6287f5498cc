"""TRL's GRPOTrainer as a host: the reference is the policy's start, exactly, by both of its routes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from grpo import kl_per_step, trainer_for
from helpers import assert_same_base, base_bytes, tiny_llama
from offprincipal_peft import OffPrincipalLoraConfig

PRESETS = ["lora", "pissa", "mica", "rlmo", "offprincipal"]


def _config(preset: str, **overrides: Any) -> OffPrincipalLoraConfig:
    return OffPrincipalLoraConfig.preset(preset, r=4, lora_alpha=8, task_type="CAUSAL_LM", **overrides)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("preset", PRESETS)
def test_kl_is_zero_at_the_first_step_with_a_peft_config(preset: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_llama(dtype)
    before = base_bytes(model)
    trainer = trainer_for(model, tmp_path, _config(preset))
    kl = kl_per_step(trainer)
    assert kl[0] == 0.0
    assert kl[1] != 0.0  # the policy moved
    assert_same_base(before, base_bytes(trainer.model))


@pytest.mark.parametrize("preset", PRESETS)
def test_kl_is_zero_at_the_first_step_of_a_ready_model(preset: str, tmp_path: Path) -> None:
    """A ready PeftModel gets a "ref" adapter, which TRL fills by copying the parameters named `.default.`."""
    model = get_peft_model(tiny_llama(), _config(preset))
    _disturb(model)  # as after earlier training: the reference is this policy, not the base
    start = _values(model, "default")
    trainer = trainer_for(model, tmp_path)
    assert "ref" in trainer.model.peft_config
    for name, value in _values(trainer.model, "ref").items():
        assert torch.equal(value, start[name]), name
    kl = kl_per_step(trainer)
    assert kl[0] == 0.0
    assert kl[1] != 0.0
    for name, value in _values(trainer.model, "ref").items():
        assert torch.equal(value, start[name]), f"{name} of the reference moved"


@pytest.mark.parametrize("preset", ["pissa", "offprincipal", "lora"])
def test_a_saved_adapter_continues_against_its_own_start(
    preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = get_peft_model(tiny_llama(), _config(preset))
    _disturb(model)
    model.save_pretrained(tmp_path / "adapter")
    start = _values(model, "default")
    for name in ("svd", "svdvals", "eigh", "qr"):
        monkeypatch.setattr(torch.linalg, name, _no_decomposition)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter", is_trainable=True)
    trainer = trainer_for(loaded, tmp_path / "run")
    for name, value in _values(trainer.model, "ref").items():
        assert torch.equal(value, start[name]), name
    assert kl_per_step(trainer)[0] == 0.0


def test_the_measurement_sees_a_wrong_reference(tmp_path: Path) -> None:
    """PEFT's own PiSSA writes its residual into the base, so disabling it is not the policy's start."""
    config = LoraConfig(r=4, init_lora_weights="pissa", target_modules="all-linear", task_type="CAUSAL_LM")
    kl = kl_per_step(trainer_for(tiny_llama(), tmp_path, config, steps=1))
    assert kl[0] > 1e-5  # seen 0.037


def _no_decomposition(*_: Any, **__: Any) -> None:
    raise AssertionError("a weight was decomposed while an adapter was loaded")


def _values(model: Any, adapter: str) -> dict[str, torch.Tensor]:
    marker = f".{adapter}."
    return {
        name.replace(marker, ".X."): parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if marker in name
    }


def _disturb(model: Any) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ".lora_" in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
