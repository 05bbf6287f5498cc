"""``GeometryCallback``: the geometry of the update, measured while any Trainer trains.

trainer = GRPOTrainer(..., callbacks=[GeometryCallback()])
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..geometry.numerics import full_precision
from .layer_geometry import LayerGeometry, final_figures, model_figures
from .observers import Since, observe_layers
from .reporters import live_reporters, log_figures

DEFAULT_INTERVAL = 10

_log = logging.getLogger(__name__)


class GeometryCallback(TrainerCallback):
    """Logs where the update of each linear layer goes, for full fine-tuning and every PEFT method.

    Every ``interval`` steps, for all layers as one (``callback.history``, the trainer's reporters and
    ``state.log_history``, keys ``geometry/...``) and for each layer (``callback.layer_history``):

    - ``update_norm``: the Frobenius norm of dW = W_now - W_start of the effective weight; ``relative_norm``: divided
      by the norm of W_start;
    - ``share_output``, ``share_input``, ``share_both``: the share of ||dW||^2 inside the top-k left and right singular
      subspaces of W_start, and ``random_...``: the share that an update without a preferred direction has;
    - ``update_sparsity``: the share of entries whose bf16 rounding did not change, on a sample of rows.

    At the end of training (``callback.layers`` for each layer, ``callback.summary`` for all of them): the same for the
    whole weights, the normalised spectral shift, the largest principal angle of U_k and V_k in degrees, effective and
    stable rank of dW, and how uneven the rows and columns are.

    The *start* is the effective weight when ``train()`` begins, also when training is resumed from a checkpoint: what
    earlier runs did is then not in dW. ``since="base"`` measures from the weight without its adapters, which a resumed
    run shares with the first. A second ``train()`` begins anew.

    Cost: one top-k basis per layer before the first step (kept in ``cache_dir``, or in the directory that the variable
    OFFPRINCIPAL_CACHE names), thin products at an observation, and at the end two full decompositions per layer,
    which ``final=False`` leaves out. Memory, on the CPU: the bases ((d_out + d_in) k fp32 numbers a layer), the
    sampled rows, and what :mod:`.observers` lists; full fine-tuning keeps a copy of the starting weights.

    Training is not changed: no random number is drawn from a global generator, no parameter, gradient or mode is
    touched. Only the process that logs measures. Embeddings, norms, biases and convolutions are not watched.

    Args:
        interval: steps between observations; 10 by default. The last step is always observed.
        k: directions of the principal subspaces, a number or a fraction of min(shape) rounded down (at least 1).
        layers: a regular expression searched for in the layers' names, for instance ``r"(q|k|v)_proj$"``.
        since: ``"start"`` or ``"base"``.
        final: whether the final report is made.
        per_layer: whether the reporters get every layer's figures too (``geometry/<layer>/...``).
        sample_rows: rows of each weight in the sparsity sample.
        cache_dir: where singular bases are kept between runs.
        seed: of the sample.

    Raises (when training begins):
        ValueError: nothing to watch, a pattern without a match, a k that a layer does not have, sharded weights.
    """

    def __init__(
        self,
        interval: int | None = None,
        *,
        k: int | float = 1 / 16,
        layers: str | None = None,
        since: Since = "start",
        final: bool = True,
        per_layer: bool = False,
        sample_rows: int = 32,
        cache_dir: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        self.interval = DEFAULT_INTERVAL if interval is None else _whole("interval", interval)
        if isinstance(k, bool) or not ((isinstance(k, int) and k >= 1) or (isinstance(k, float) and 0 < k < 1)):
            raise ValueError(f"k={k!r}: it is a number of directions of at least 1, or a fraction between 0 and 1")
        if since not in ("start", "base"):
            raise ValueError(f"since={since!r}: it is 'start' or 'base'")
        self.k, self.pattern, self.since, self.with_final = k, layers, since, final
        self.per_layer, self.sample_rows, self.cache_dir = per_layer, _whole("sample_rows", sample_rows), cache_dir
        self.seed = seed
        self._forget()

    def _forget(self) -> None:
        self.history: list[dict[str, float]] = []  # of all layers as one: step and "geometry/..."
        self.layer_history: list[dict[str, Any]] = []  # {"step": .., "layers": {name: figures}}
        self.layers: list[dict[str, Any]] = []  # the final report of each layer
        self.summary: dict[str, float] = {}  # the final report of all layers as one
        self.not_observed: dict[str, str] = {}  # adapted layers that cannot be measured, and why
        self.setup_seconds, self.final_seconds = 0.0, 0.0
        self.seconds: list[float] = []  # of each observation
        self._watched: list[LayerGeometry] = []
        self._reporters: list[TrainerCallback] = []
        self._ended = True

    def record(self) -> dict[str, Any]:
        """History, layers and summary as JSON values, for a trial's record."""
        return {"history": self.history, "layers": self.layers, "summary": {**self.summary}} | (
            {"not_observed": self.not_observed} if self.not_observed else {}
        )

    # -- events -----------------------------------------------------------------------------------------------------

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        self._forget()
        if not state.is_world_process_zero or model is None:
            return
        self._reporters, self._ended = live_reporters(), False
        begin = time.perf_counter()
        with full_precision():
            observers, self.not_observed = observe_layers(model, self.pattern, self.since)
            self._watched = [
                LayerGeometry(observer, self.k, self.sample_rows, self.cache_dir, self.seed + number)
                for number, observer in enumerate(observers)
            ]
        self.setup_seconds = time.perf_counter() - begin
        for name, reason in self.not_observed.items():
            _log.warning("the geometry of %s is not observed: %s", name, reason)
        if not self._watched:
            raise ValueError(
                f"none of the {len(self.not_observed)} adapted layers can be observed, for instance "
                f"{next(iter(self.not_observed.items()))}"
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._ended:
            return
        if control.should_training_stop:  # now, because reporters close their runs before this callback's on_train_end
            self._finish(args, state, control, kwargs.get("model"))
        elif state.global_step % self.interval == 0:
            self._observe(args, state, control, kwargs.get("model"))

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._ended and control.should_training_stop:
            self._finish(args, state, control, kwargs.get("model"))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._ended:  # stopped by a callback that came later: the reporters' runs are closed by now
            self._reporters = []
            self._finish(args, state, control, kwargs.get("model"))
        self._watched, self._reporters = [], []

    # -- measuring --------------------------------------------------------------------------------------------------

    def _observe(self, args: Any, state: TrainerState, control: TrainerControl, model: Any) -> None:
        begin = time.perf_counter()
        with full_precision():
            launched = [layer.observe() for layer in self._watched]  # read only when all are under way
            observed = [row.tolist() for row in launched]
        figures = model_figures(self._watched, observed)
        layers = {layer.name: layer.figures(row) for layer, row in zip(self._watched, observed, strict=True)}
        self.layer_history.append({"step": state.global_step, "layers": layers})
        entry = {f"geometry/{name}": value for name, value in figures.items()}
        self.history.append({"step": state.global_step, **entry})
        if self.per_layer:
            entry |= {f"geometry/{layer}/{name}": v for layer, row in layers.items() for name, v in row.items()}
        self.seconds.append(time.perf_counter() - begin)
        self._report(entry, args, state, control, model)

    def _finish(self, args: Any, state: TrainerState, control: TrainerControl, model: Any) -> None:
        self._ended = True
        self._observe(args, state, control, model)
        last = self.history[-1]
        self.summary = {"step": state.global_step, "layers": len(self._watched)}
        self.summary |= {name.removeprefix("geometry/"): v for name, v in last.items() if name != "step"}
        if not self.with_final:
            return
        begin = time.perf_counter()
        with full_precision():
            self.layers = [layer.final() for layer in self._watched]
        self.final_seconds = time.perf_counter() - begin
        figures = final_figures(self.layers)
        self.summary |= figures
        self._report({f"geometry/final/{name}": v for name, v in figures.items()}, args, state, control, model)

    def _report(
        self, entry: dict[str, float], args: Any, state: TrainerState, control: TrainerControl, model: Any
    ) -> None:
        log_figures(self._reporters, entry, args, state, control, model)


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r}: it is a whole number of at least 1")
    return value
