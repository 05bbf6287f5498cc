"""``PatchCallback``: a training run that sends its weights as sparse patches.

trainer = GRPOTrainer(..., callbacks=[PatchCallback("runs/sync", every=1)])
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..interop.sparse_patch import PatchInfo, PatchRecorder
from .reporters import live_reporters, log_figures

_log = logging.getLogger(__name__)


class PatchCallback(TrainerCallback):
    """Writes a patch of the merged weights every ``every`` steps, of either method or full fine-tuning.

    When training begins a full anchor of the weights as they are then is written; after every ``every`` steps, and at
    the end, the entries that changed. Size and density of each go to the trainer's reporters, to ``state.log_history``
    (``patch/bytes``, ``patch/density``, ``patch/entries``, ``patch/seconds``) and to ``history``. The run itself is not
    changed: a merged adapter is taken out again, and the base has its bytes back.

    Only the process that logs writes, which under DDP has the same weights as the others. A second ``train()``, or one
    that is resumed, needs another folder.

    Args:
        folder: of the chain; made, and must hold no patches.
        every: steps between patches.
        anchor_every: a further full anchor after so many patches; 0: the first alone.
        dtype: of the written floating-point tensors; default: as they are.

    Raises :class:`PatchError` when training begins: weights that cannot be told whole (see :class:`LiveState`), or a
    folder with patches. ``ValueError`` for ``every`` below 1.
    """

    def __init__(
        self, folder: str | Path, *, every: int = 1, anchor_every: int = 0, dtype: torch.dtype | None = None
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every={every!r}: it is a whole number of at least 1")
        self.folder, self.every, self.anchor_every, self.dtype = Path(folder), every, anchor_every, dtype
        self.history: list[dict[str, Any]] = []
        self.recorder: PatchRecorder | None = None
        self._reporters: list[TrainerCallback] = []

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        self.history, self.recorder = [], None
        if not state.is_world_process_zero or model is None:
            return
        self._reporters = live_reporters()
        self.recorder = PatchRecorder(
            model, self.folder, anchor_every=self.anchor_every, dtype=self.dtype, tokenizer=processing_class
        )
        self._record(args, state, control, model)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if state.global_step % self.every == 0 or control.should_training_stop:
            self._record(args, state, control, model)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if self.recorder is not None and (self.recorder.last is None or self.recorder.last.step < state.global_step):
            self._reporters = []  # their runs are closed by now
            self._record(args, state, control, model)
        self._reporters = []

    def _record(self, args: Any, state: TrainerState, control: TrainerControl, model: Any) -> None:
        if self.recorder is None:
            return
        begin = time.perf_counter()
        info = self.recorder.record(state.global_step)
        seconds = time.perf_counter() - begin
        self.history.append(_row(info, seconds))
        entry = {"patch/bytes": info.nbytes, "patch/density": info.density, "patch/entries": info.count}
        log_figures(self._reporters, {**entry, "patch/seconds": seconds}, args, state, control, model)


def _row(info: PatchInfo, seconds: float) -> dict[str, Any]:
    return {
        "step": info.step,
        "kind": info.kind,
        "bytes": info.nbytes,
        "entries": info.count,
        "density": info.density,
        "seconds": seconds,
        "state": info.result,
    }
