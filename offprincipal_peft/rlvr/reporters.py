"""How a callback's own figures reach the reporters (``report_to``) of the trainer that it watches.

A callback is given neither the trainer nor its other callbacks, and the reporters run before it when the trainer logs,
so that adding to ``logs`` would be too late. Reporters of one's own would open a second run (TensorBoard a second
folder, DVCLive and ClearML a second experiment, Trackio a second run after the first was closed). The trainer's own are
found instead, on the stack: whoever calls ``on_train_begin`` is the ``CallbackHandler`` that holds them.
"""

from __future__ import annotations

import inspect
import logging
import math
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler

_log = logging.getLogger(__name__)


def live_reporters() -> list[TrainerCallback]:
    """The reporters (``report_to``) of the trainer whose event is being handled; none outside of one."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    kinds: tuple[type[TrainerCallback], ...] = tuple(INTEGRATION_TO_CALLBACK.values())
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, CallbackHandler):
            return [callback for callback in owner.callbacks if isinstance(callback, kinds)]
        frame = frame.f_back
    _log.warning("called outside of a trainer: the figures are in callback.history and in no reporter")
    return []


def log_figures(
    reporters: list[TrainerCallback],
    entry: dict[str, float],
    args: Any,
    state: TrainerState,
    control: TrainerControl,
    model: Any,
) -> None:
    """As ``Trainer.log`` does, but to the reporters alone and without asking for another log of the trainer."""
    logs = {name: value for name, value in entry.items() if math.isfinite(value)}
    if state.epoch is not None:
        logs["epoch"] = state.epoch
    state.log_history.append({**logs, "step": state.global_step})
    for reporter in reporters:
        reporter.on_log(args, state, control, logs=dict(logs), model=model)
