"""TRL's GRPOTrainer as a host: the reference is the policy's start, exactly, by both of its routes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from helpers import assert_same_base, base_bytes, tiny_llama
from offprincipal_peft import OffPrincipalLoraConfig

PRESETS = ["lora", "pissa", "mica", "rlmo", "offprincipal"]


def _tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(125))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def _reward(completions: list[str], **_: Any) -> list[float]:
    """Different within a group, so that advantages and gradients are not zero."""
    return [float(sum(map(ord, completion)) % 7) for completion in completions]


def _trainer(model: Any, folder: Path, peft_config: Any = None, *, steps: int = 2, **options: Any) -> GRPOTrainer:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 6,
        "learning_rate": 1e-2,
        "beta": 0.1,
        "seed": 0,
    }
    prompts = Dataset.from_dict({"prompt": [f"w{i} w{i + 1} w{i + 2}" for i in range(16)]})
    return GRPOTrainer(
        model=model,
        reward_funcs=_reward,
        args=GRPOConfig(**{**settings, **options}),
        train_dataset=prompts,
        processing_class=_tokenizer(),
        peft_config=peft_config,
    )


def _kl_per_step(trainer: GRPOTrainer) -> list[float]:
    trainer.train()
    return [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]


def _config(preset: str, **overrides: Any) -> OffPrincipalLoraConfig:
    return OffPrincipalLoraConfig.preset(preset, r=4, lora_alpha=8, task_type="CAUSAL_LM", **overrides)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("preset", PRESETS)
def test_kl_is_zero_at_the_first_step_with_a_peft_config(preset: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_llama(dtype)
    before = base_bytes(model)
    trainer = _trainer(model, tmp_path, _config(preset))
    kl = _kl_per_step(trainer)
    assert kl[0] == 0.0
    assert kl[1] != 0.0  # the policy moved
    assert_same_base(before, base_bytes(trainer.model))


@pytest.mark.parametrize("preset", PRESETS)
def test_kl_is_zero_at_the_first_step_of_a_ready_model(preset: str, tmp_path: Path) -> None:
    """A ready PeftModel gets a "ref" adapter, which TRL fills by copying the parameters named `.default.`."""
    model = get_peft_model(tiny_llama(), _config(preset))
    _disturb(model)  # as after earlier training: the reference is this policy, not the base
    start = _values(model, "default")
    trainer = _trainer(model, tmp_path)
    assert "ref" in trainer.model.peft_config
    for name, value in _values(trainer.model, "ref").items():
        assert torch.equal(value, start[name]), name
    kl = _kl_per_step(trainer)
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
    trainer = _trainer(loaded, tmp_path / "run")
    for name, value in _values(trainer.model, "ref").items():
        assert torch.equal(value, start[name]), name
    assert _kl_per_step(trainer)[0] == 0.0


def test_the_measurement_sees_a_wrong_reference(tmp_path: Path) -> None:
    """PEFT's own PiSSA writes its residual into the base, so disabling it is not the policy's start."""
    config = LoraConfig(r=4, init_lora_weights="pissa", target_modules="all-linear", task_type="CAUSAL_LM")
    kl = _kl_per_step(_trainer(tiny_llama(), tmp_path, config, steps=1))
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
