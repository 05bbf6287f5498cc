"""What can be known to fail before anything trains: methods, tasks with their verifiers, the model's files."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from .config import TrialConfig
from .methods import build_config
from .models import choose_device, load_tokenizer
from .tasks import TaskError, load_task


def check_trials() -> Callable[[TrialConfig], None]:
    """A check of one trial after another that does shared work once; it raises ``ValueError`` with the reason."""
    seen: set[str] = set()

    def once(*key: Any) -> bool:
        text = json.dumps(key, sort_keys=True, default=str)
        return text not in seen and not seen.add(text)  # type: ignore[func-returns-value]

    def check(config: TrialConfig) -> None:
        build_config(config)
        sizes = {split: getattr(config, f"{split}_items") for split in ("train", "validation", "test")}
        if once("task", config.task, sizes, config.task_options):
            try:
                load_task(config.task, sizes, config.task_options).prove()
            except ImportError as error:
                raise TaskError(str(error)) from None
        if once("model", config.model, config.device):
            choose_device(config.device)
            load_tokenizer(config.model)

    return check
