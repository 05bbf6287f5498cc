"""What a trial measures of its model: before training, at chosen steps, and at the end."""

from __future__ import annotations

import statistics
from contextlib import nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from .callbacks import GeometryCallback
from .config import TrialConfig
from .evaluation import Reference, accuracy, as_found, divergence, other_text, text_loss
from .memory import peak_bytes, reachable_tensors, storages
from .methods import Method
from .models import cache_folder, load_model
from .tasks import Task

EVALUATION_SEED = 20_251_111  # the same completions are drawn for every method that is still at the start


class Measurements:
    """Fills a trial's record. The pretrained model's own figures come first, from the model before any adapter."""

    def __init__(
        self,
        config: TrialConfig,
        method: Method,
        model: nn.Module,
        tokenizer: Any,
        task: Task,
        device: torch.device,
        record: dict[str, Any],
    ) -> None:
        self.config, self.method, self.tokenizer, self.task = config, method, tokenizer, task
        self.device, self.record = device, record
        self.text = other_text(config.other_text)
        self.base_bytes = sum(storages(reachable_tensors([model])).values())
        self.geometry = _geometry(config)
        self._reference: nn.Module | None = None

    def reference(self, model: nn.Module) -> Reference:
        """The pretrained model: the adapter switched off where that is exactly it, or another copy."""
        if self.method.base_intact and isinstance(model, PeftModel):
            return Reference(model, model.disable_adapter)
        if self._reference is None:
            self._reference = self._load().eval()
        return Reference(self._reference, nullcontext)

    def _load(self) -> nn.Module:
        config = self.config
        return load_model(config.model, config.dtype, self.device, config.quantization)

    def evaluate(self, model: nn.Module, step: int) -> None:
        """Test accuracy, divergence on the validation prompts, loss on other text, and the size of the update."""
        config, task = self.config, self.task
        with as_found(model, EVALUATION_SEED):
            scored = self._accuracy(model, task.splits.test)
            moved = divergence(
                model,
                self.reference(model),
                self.tokenizer,
                task,
                task.splits.validation,
                max_new_tokens=config.max_completion_length,
                temperature=config.temperature,
                batch=config.evaluation_batch,
            )
            forgetting = text_loss(model, self.tokenizer, self.text)
        evaluation = {"step": step, "split": "test", **scored, **moved, "forgetting": forgetting}
        evaluation["update_norm"] = self._update_norm(step)
        self.record["evaluations"].append(evaluation)

    def finish(self, trainer: Any) -> None:
        """After the last step: validation accuracy, costs, geometry, and the summary of everything."""
        model = trainer.model
        with as_found(model, EVALUATION_SEED):
            validation = self._accuracy(model, self.task.splits.validation)
        self.record["evaluations"].append({"step": self.config.steps, "split": "validation", **validation})
        held = storages(reachable_tensors([model, trainer.optimizer]))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if self.geometry is not None:
            self.record["geometry"] = self.geometry.record()
        tests = [e for e in self.record["evaluations"] if e["split"] == "test"]
        first, last = tests[0], tests[-1]
        self.record["result"] = {
            "test_accuracy": last["accuracy"],
            "validation_accuracy": validation["accuracy"],
            "base_accuracy": first["accuracy"],
            **{name: last[name] for name in ("kl", "entropy", "completion_length", "update_norm", "forgetting")},
            "forgetting_base": first["forgetting"],
            "trainable_parameters": sum(parameter.numel() for parameter in trained),
            "state_bytes": sum(held.values()) - self.base_bytes,
            "peak_memory_bytes": peak_bytes(self.device),
            "step_s": statistics.median(row["step_s"] for row in self.record["curve"]),
            "reward_slope": self._slope(),
        }

    def _update_norm(self, step: int) -> float | None:
        """‖W − W₀‖_F over all adapted layers; None where the geometry is not measured."""
        if self.geometry is None:
            return None
        norms = {row["step"]: row["geometry/update_norm"] for row in self.geometry.history}
        return norms[step] if step else 0.0

    def _accuracy(self, model: nn.Module, items: list[Any]) -> dict[str, Any]:
        length, batch = self.config.max_completion_length, self.config.evaluation_batch
        return accuracy(model, self.tokenizer, self.task, items, max_new_tokens=length, batch=batch)

    def _slope(self) -> dict[str, float | None] | None:
        """Change of the mean reward a step, with its 95 % interval; None where nothing was rewarded (SFT)."""
        from .slopes import run_slope

        rewards = [row["reward"] for row in self.record["curve"]]
        if len(rewards) < 4 or any(reward is None for reward in rewards):
            return None
        found = run_slope(rewards)
        return {"value": found.value, "low": found.low, "high": found.high}


def _geometry(config: TrialConfig) -> GeometryCallback | None:
    """Observes at every evaluation; the singular bases of the pretrained weights are shared by all trials."""
    if not config.geometry:
        return None
    k = int(config.k) if config.k >= 1 else config.k
    return GeometryCallback(config.evaluate_every or config.steps, k=k, cache_dir=cache_folder() / "bases")
