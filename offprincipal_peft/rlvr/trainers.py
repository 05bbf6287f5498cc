"""TRL's trainers for a trial: one set of arguments for all methods, and the callbacks that make runs comparable."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..kernels import MaskedAdamW
from ..tuners.offprincipal_lora.layer import OffPrincipalLinear
from .config import TrialConfig
from .evaluation import end_tokens
from .optimizers import DEFAULT, PEFTS, build_optimizer, check_optimizer, needs_masked_adamw
from .rewards import as_trl
from .tasks import Task

STEP_SEEDS = 1_000_003  # apart by more than any number of steps


def build_trainer(
    config: TrialConfig,
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    peft_config: Any,
    folder: str,
    callbacks: list[TrainerCallback],
) -> Any:
    """The GRPO, RLOO or SFT trainer of ``config``; nothing has been trained yet.

    Raises:
        ValueError: ``trainer_options`` that the trainer's arguments do not have; an optimiser that does not fit.
    """
    check_optimizer(config, peft_config)
    torch.manual_seed(config.seed)  # the adapter's random start
    model.generation_config.eos_token_id = end_tokens(model, tokenizer, task.stop)  # type: ignore[union-attr]
    build = _supervised if config.algorithm == "sft" else _reinforced
    options: dict[str, Any] = {"processing_class": tokenizer, "callbacks": [*callbacks, SeedEachStep(config.seed)]}
    if needs_masked_adamw(peft_config):
        from peft import get_peft_model

        model = get_peft_model(model, peft_config)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = MaskedAdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay)
        options["optimizers"] = (optimizer, None)
    else:
        options["peft_config"] = peft_config
    trainer = build(config, model, task, folder, options)
    if config.quantization != "none":
        _widen_trained(trainer.model)
    if (factors := build_optimizer(config, trainer.model)) is not None:
        trainer.optimizer = factors  # the Trainer makes its own where there is none
    return trainer


def _widen_trained(model: nn.Module) -> None:
    """Let adapters train in fp32 as on every other base: TRL's trainers cast them to bf16 on quantised ones.

    There, steps below half a unit in the last place of a start of norm 1 round away: some methods would stall, and
    others, with other starts, not. Stored starts were not cast: the factors that began there get their bits back.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype == torch.bfloat16:
            parameter.data = parameter.data.float()
    for layer in (module for module in model.modules() if isinstance(module, OffPrincipalLinear)):
        factors: Any
        for factors, starts in ((layer.lora_A, layer.lora_start_A), (layer.lora_B, layer.lora_start_B)):
            for name, start in starts.items():
                factors[name].weight.data.copy_(start.weight)


def _reinforced(config: TrialConfig, model: Any, task: Task, folder: str, options: dict[str, Any]) -> Any:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    arguments_class, trainer = {"grpo": (GRPOConfig, GRPOTrainer), "rloo": (RLOOConfig, RLOOTrainer)}[config.algorithm]
    arguments = {
        **_arguments(config, folder),
        "per_device_train_batch_size": config.prompts_per_step * config.group_size,
        "num_generations": config.group_size,
        "max_completion_length": config.max_completion_length,
        "temperature": config.temperature,
        "beta": config.beta,
    }
    items = task.splits.train
    data = Dataset.from_list([{"prompt": i.prompt, "answer": i.answer, **i.columns} for i in items])
    return trainer(
        model=model,
        reward_funcs=as_trl(task.verifier, task.name),
        args=_checked(arguments_class, arguments, config),
        train_dataset=data,
        **options,
    )


def _supervised(config: TrialConfig, model: Any, task: Task, folder: str, options: dict[str, Any]) -> Any:
    """The same prompts with their gold answers; the loss is on the answers."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    arguments = {
        **_arguments(config, folder),
        "per_device_train_batch_size": config.prompts_per_step * config.group_size,
        "completion_only_loss": True,
    }
    rows = []
    for item in task.splits.train:
        gold = task.gold(item)
        chat = not isinstance(item.prompt, str)
        rows.append({"prompt": item.prompt, "completion": [{"role": "assistant", "content": gold}] if chat else gold})
    return SFTTrainer(
        model=model, args=_checked(SFTConfig, arguments, config), train_dataset=Dataset.from_list(rows), **options
    )


def _arguments(config: TrialConfig, folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "use_cpu": config.device == "cpu",
        "bf16": False,
        "gradient_checkpointing": False,
        "max_steps": config.steps,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.scheduler,
        "warmup_steps": config.warmup_steps,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "optim": DEFAULT if config.optimizer in PEFTS else config.optimizer,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": config.seed,
        "data_seed": config.seed,
    }


def _checked(cls: type, arguments: dict[str, Any], config: TrialConfig) -> Any:
    try:
        return cls(**{**arguments, **config.trainer_options})
    except TypeError as error:
        raise ValueError(f"trainer_options of {config.label}: {error} (fields of trl.{cls.__name__})") from None


class SeedEachStep(TrainerCallback):
    """Gives step n of every method the same random numbers, however many were drawn before it.

    Two methods then sample with common random numbers: their difference is less noisy than each.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        torch.manual_seed((self.seed * STEP_SEEDS + state.global_step) * 1024 + args.process_index)


class StepClock(TrainerCallback):
    """Seconds of each step, from its beginning to its end, without what other callbacks do afterwards.

    It has to be the first callback at the end of a step.
    """

    def __init__(self) -> None:
        self.seconds: dict[int, float] = {}
        self._begun = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._begun = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[state.global_step] = time.perf_counter() - self._begun


class AtSteps(TrainerCallback):
    """Calls ``action(step)`` after every ``every`` steps and after the last one."""

    def __init__(self, every: int, action: Callable[[int], None]) -> None:
        self.every, self.action = every, action

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        step = state.global_step
        if step == args.max_steps or (self.every and step % self.every == 0):
            self.action(step)


class OnLog(TrainerCallback):
    """Hands every training log to ``action(step, logs)``."""

    def __init__(self, action: Callable[[int, dict[str, Any]], None]) -> None:
        self.action = action

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs and state.is_world_process_zero:
            self.action(state.global_step, logs)
