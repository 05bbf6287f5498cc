"""TRL's SFT, DPO, RLOO and GRPO trainers on tiny models on the CPU, and the adapters that each must host."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from trl import DPOConfig, DPOTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer

import grpo
from lifecycle import config, tiny, train, trainable
from offprincipal_peft import MaskedAdamW, OffPrincipalLoraConfig
from sparse_models import sparse_config

RATE = 1e-2
ON_CPU = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "learning_rate": RATE,
    "seed": 0,
}


@dataclass(frozen=True)
class Case:
    """One kind of adapter: its config, the base it needs and whether it needs its own optimiser."""

    name: str
    config: Callable[..., PeftConfig]
    dtype: torch.dtype = torch.float32
    own_optimizer: bool = False

    def __str__(self) -> str:
        return self.name

    def base(self, family: str = "llama", **sizes: Any) -> PreTrainedModel:
        return tiny(family, self.dtype, **sizes)

    def adapted(self, family: str = "llama", **options: Any) -> PeftModel:
        return get_peft_model(self.base(family), self.config(**options))

    def optimizers(self, model: nn.Module) -> dict[str, Any]:
        """What a trainer has to be given for a ready model; empty where it makes its own AdamW."""
        if not self.own_optimizer:
            return {}
        return {"optimizers": (MaskedAdamW(trainable(model).values(), lr=RATE), None)}


def _default(**options: Any) -> OffPrincipalLoraConfig:
    return OffPrincipalLoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | options)


def _preset(name: str) -> Callable[..., PeftConfig]:
    return lambda **options: config(name, **options)


CASES = [
    Case("lora", _preset("lora")),
    Case("default", _default),
    Case("pissa", _preset("pissa")),
    Case("milora", _preset("milora")),
    Case("offprincipal", _preset("offprincipal")),
    Case("sparse", sparse_config),
    Case("split", lambda **options: sparse_config(precision="split", **options), torch.bfloat16, own_optimizer=True),
]
LOW_RANK, SPARSE = CASES[:5], CASES[5:]
BF16 = [*(Case(f"{c.name}-bf16", c.config, torch.bfloat16) for c in CASES[:6]), CASES[6]]


def each(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=str)


# -- trainers ------------------------------------------------------------------------------------------------------


def sentences(count: int = 16, length: int = 8) -> Dataset:
    """Of equal length, so that batches have no padding and every row counts alike."""
    return Dataset.from_dict(
        {"text": [" ".join(f"w{(7 * i + 3 * j * j) % 125}" for j in range(length)) for i in range(count)]}
    )


def preferences(count: int = 16) -> Dataset:
    return Dataset.from_dict(
        {
            "prompt": [f"w{i} w{i + 1}" for i in range(count)],
            "chosen": [f" w{i + 2} w{i + 3} w{i + 4}" for i in range(count)],
            "rejected": [f" w{i + 50} w{i + 30} w{i + 7} w{i + 9}" for i in range(count)],
        }
    )


def prompts(count: int = 16) -> Dataset:
    return Dataset.from_dict({"prompt": [f"w{i} w{i + 1} w{i + 2}" for i in range(count)]})


def sft(model: Any, folder: Path, *, steps: int = 2, more: dict[str, Any] | None = None, **options: Any) -> SFTTrainer:
    """`more`: arguments of the trainer; `options`: of its configuration."""
    settings = ON_CPU | {"output_dir": str(folder), "max_steps": steps, "per_device_train_batch_size": 4} | options
    arguments = {"train_dataset": sentences(), "processing_class": grpo.tokenizer()} | (more or {})
    return SFTTrainer(model=model, args=SFTConfig(**settings), **arguments)


def dpo(model: Any, folder: Path, *, steps: int = 2, more: dict[str, Any] | None = None, **options: Any) -> DPOTrainer:
    settings = ON_CPU | {"output_dir": str(folder), "max_steps": steps, "per_device_train_batch_size": 4} | options
    arguments = {"train_dataset": preferences(), "processing_class": grpo.tokenizer()} | (more or {})
    return DPOTrainer(model=model, args=DPOConfig(**settings), **arguments)


def rloo(
    model: Any, folder: Path, *, steps: int = 2, more: dict[str, Any] | None = None, **options: Any
) -> RLOOTrainer:
    settings = ON_CPU | {"output_dir": str(folder), "max_steps": steps, "per_device_train_batch_size": 4}
    settings |= {"num_generations": 4, "max_completion_length": 6, "beta": 0.1} | options
    arguments = {"train_dataset": prompts(), "processing_class": grpo.tokenizer()} | (more or {})
    return RLOOTrainer(model=model, reward_funcs=reward, args=RLOOConfig(**settings), **arguments)


def grpo_trainer(
    model: Any, folder: Path, *, steps: int = 2, more: dict[str, Any] | None = None, **options: Any
) -> Trainer:
    more = dict(more or {})
    trainer = grpo.trainer_for(model, folder, more.pop("peft_config", None), steps=steps, **more, **options)
    return trainer


TRAINERS = {"sft": sft, "dpo": dpo, "rloo": rloo, "grpo": grpo_trainer}


def reward(completions: list[str], **_: Any) -> list[float]:
    """Different within a group, so that advantages and gradients are not zero."""
    return [float(sum(map(ord, completion)) % 7) for completion in completions]


# -- observations --------------------------------------------------------------------------------------------------


def logged(trainer: Trainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def adapter_state(model: PeftModel, adapter: str = "default") -> dict[str, Tensor]:
    """Copies of all that a saved adapter would hold."""
    marker = f".{adapter}."
    return {k: v.detach().clone() for k, v in model.state_dict().items() if marker in k and ".base_layer." not in k}


def assert_same_state(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert expected and actual.keys() == expected.keys()
    differing = [name for name, tensor in expected.items() if not torch.equal(bits(actual[name]), bits(tensor))]
    assert not differing, f"{len(differing)} of {len(expected)} tensors differ: {differing[:5]}"


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def optimizer_state(trainer: Trainer) -> dict[str, Tensor]:
    """Copies of the optimiser's state by parameter number."""
    held = trainer.optimizer.state_dict()["state"]
    return {
        f"{number}.{key}": value.clone()
        for number, entry in held.items()
        for key, value in entry.items()
        if isinstance(value, Tensor)
    }


def pretrained(case: Case, steps: int = 2, **options: Any) -> PeftModel:
    """An adapter that was trained before, so that its start is not the base model."""
    model = case.adapted(**options)
    train_by_hand(case, model, steps)
    return model


def train_by_hand(case: Case, model: PeftModel, steps: int = 2) -> None:
    by = MaskedAdamW(trainable(model).values(), lr=RATE) if case.own_optimizer else None
    train(model, steps, by=by)


def merged_parameters(model: PeftModel) -> dict[str, Tensor]:
    """Of `merge_and_unload()` of a copy."""
    return {name: p.detach().clone() for name, p in copy.deepcopy(model).merge_and_unload().named_parameters()}
