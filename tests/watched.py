"""Small models of every method in a plain Trainer, for the tests of what watches training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from datasets import Dataset
from peft import get_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from helpers import token_batch
from lifecycle import config, tiny
from offprincipal_peft import MaskedAdamW, PrincipalSparseConfig
from offprincipal_peft.rlvr.callbacks import GeometryCallback


def lora_config(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **options})


METHODS: dict[str, Callable[[], Any]] = {
    "lora": lambda: lora_config(lora_dropout=0.5),  # dropout draws random numbers in every forward
    "dora": lambda: lora_config(use_dora=True),
    "offprincipal": lambda: config("offprincipal"),
    "pissa": lambda: config("pissa"),
    "sparse": lambda: PrincipalSparseConfig(task_type="CAUSAL_LM", principal_rank=4),
    "split": lambda: PrincipalSparseConfig(task_type="CAUSAL_LM", principal_rank=4, precision="split"),
    "shira": lambda: peft.ShiraConfig(r=4, target_modules=["q_proj"]),
    "osf": lambda: peft.OSFConfig(effective_rank=8, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "full": lambda: None,
}


def small_model(method: str) -> nn.Module:
    torch.manual_seed(0)
    model = tiny("llama", torch.bfloat16 if method == "split" else torch.float32)
    adapter = METHODS[method]()
    return model.requires_grad_(True) if adapter is None else get_peft_model(model, adapter)


def trainer_of(
    model: nn.Module, folder: Path, callbacks: list[TrainerCallback], steps: int = 5, **options: Any
) -> Trainer:
    ids = token_batch(128, batch=32)
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "seed": 0,
    }
    optimizer = MaskedAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    return Trainer(
        model=model,
        args=TrainingArguments(**{**settings, **options}),
        train_dataset=Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()}),
        callbacks=callbacks,
        optimizers=(optimizer, None),
    )


def run(method: str, folder: Path, callback: GeometryCallback, **options: Any) -> Trainer:
    trainer = trainer_of(small_model(method), folder, [callback], **options)
    trainer.train()
    return trainer
