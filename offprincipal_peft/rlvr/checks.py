"""What can be known to fail before anything trains: methods, tasks with their verifiers, the model's files."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from typing import Any

from .config import TrialConfig
from .evaluation import check_text, other_text
from .methods import build_config
from .models import check_quantization, choose_device, load_tokenizer
from .optimizers import check_optimizer
from .tasks import TaskError, load_task


def check_trials() -> Callable[[TrialConfig], None]:
    """A check of one trial after another that does shared work once; it raises ``ValueError`` with the reason."""
    seen: set[str] = set()

    def once(*key: Any) -> bool:
        text = json.dumps(key, sort_keys=True, default=str)
        return text not in seen and not seen.add(text)  # type: ignore[func-returns-value]

    def check(config: TrialConfig) -> None:
        if once("packages"):
            check_packages()
        check_optimizer(config, build_config(config))
        check_quantization(config.quantization)
        sizes = {split: getattr(config, f"{split}_items") for split in ("train", "validation", "test")}
        if once("task", config.task, sizes, config.task_options):
            try:
                load_task(config.task, sizes, config.task_options).prove()
            except ImportError as error:
                raise TaskError(str(error)) from None
        if once("model", config.model, config.device):
            choose_device(config.device)
            load_tokenizer(config.model)
        if once("text", config.model, config.other_text):
            check_text(other_text(config.other_text), load_tokenizer(config.model))

    return check


# What a trial imports from its start to its last evaluation: (module, distribution).
_NEEDED = (("trl", "trl"), ("datasets", "datasets"), ("scipy", "scipy"))


def check_packages() -> None:
    """Raises ``TaskError`` for packages that a trial would only miss after training."""
    missing = [name for module, name in _NEEDED if importlib.util.find_spec(module) is None]
    if missing:
        raise TaskError(
            f"trials need {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed: "
            "pip install 'offprincipal-peft[compare]'"
        )
