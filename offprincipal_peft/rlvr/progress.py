"""What a person sees while a sweep runs: a live table on a terminal, a line at a time anywhere else."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass, field
from typing import Any, TextIO

BARS = "▁▂▃▄▅▆▇█"
LINE_EVERY = 4  # steps between lines where there is no terminal


@dataclass
class Shown:
    """What is known of one trial."""

    name: str
    state: str = "waiting"
    step: int = 0
    steps: int = 0
    rewards: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    step_s: float | None = None
    message: str = ""


class SweepProgress:
    """Takes the events of :func:`~offprincipal_peft.rlvr.sweep.run_sweep` and shows them; use as a context manager."""

    def __init__(self, names: dict[str, str], stream: TextIO | None = None) -> None:
        """``names``: a trial's id -> how it is shown."""
        self.trials = {trial: Shown(name) for trial, name in names.items()}
        self.stream = stream or sys.stdout
        self.width = max((len(name) for name in names.values()), default=0)
        self.begun = time.monotonic()
        self._live: Any = None

    def __enter__(self) -> SweepProgress:
        if self.stream.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(file=self.stream), get_renderable=self._table, refresh_per_second=2)
            self._live.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._live is not None:
            self._live.__exit__(*exception)

    def __call__(self, event: dict[str, Any]) -> None:
        trial = self.trials.get(event.get("id", ""))
        if trial is None:
            if event["event"] == "waiting":
                self._say("another run is using this folder; waiting for it to end")
            return
        line = self._take(trial, event)
        if line and self._live is None:
            self._say(f"{time.monotonic() - self.begun:6.0f} s  {trial.name:{self.width}s}  {line}")

    def _take(self, trial: Shown, event: dict[str, Any]) -> str:
        """Note the event; the line that tells of it, empty where it is not worth one."""
        kind = event["event"]
        if kind == "trial":
            return self._state(trial, event)
        if kind == "stage":
            trial.state = event["stage"]
            return "loading the model" if event["stage"] == "model" else ""
        if kind == "step":
            trial.state, trial.step, trial.steps, trial.step_s = "train", event["step"], event["steps"], event["step_s"]
            trial.rewards.append(event["reward"] if event["reward"] is not None else event["loss"] or 0.0)
            label = "reward" if event["reward"] is not None else "loss"
            shown = event["step"] % LINE_EVERY == 0 or event["step"] == event["steps"]
            recent = trial.rewards[-LINE_EVERY:]
            mean = sum(recent) / len(recent)
            return (
                f"step {event['step']:3d}/{event['steps']}  {label} {mean:6.3f}  {spark(trial.rewards[-40:])}"
                if shown
                else ""
            )
        if kind == "evaluation":
            trial.accuracy.append(event["accuracy"])
            return f"test accuracy {event['accuracy']:.1%} at step {event['step']}, KL {event['kl']:.4f}"
        return ""

    def _state(self, trial: Shown, event: dict[str, Any]) -> str:
        trial.state, done = event["state"], f"({event['done']}/{event['total']} done)"
        if event["state"] == "started":
            trial.rewards, trial.accuracy, trial.step = [], [], 0
        if event["state"] in ("failed", "retry"):
            trial.message = str(event.get("message") or event.get("error") or "")
            return f"{event['state']} {done} {trial.message}".rstrip()
        return {"started": f"started {done}", "finished": f"finished {done}", "skipped": "done before"}.get(
            event["state"], ""
        )

    def _table(self) -> Any:
        from rich.markup import escape
        from rich.table import Table

        table = Table(title=f"{time.monotonic() - self.begun:.0f} s", title_justify="left", box=None, pad_edge=False)
        for column, side in (("trial", "left"), ("", "left"), ("step", "right"), ("reward", "left"), ("", "right")):
            table.add_column(column, justify=side)  # type: ignore[arg-type]
        table.add_column("test accuracy")
        for trial in self.trials.values():
            last = f"{trial.rewards[-1]:.2f}" if trial.rewards else ""
            scores = " → ".join(f"{value:.1%}" for value in trial.accuracy)
            step = f"{trial.step}/{trial.steps}" if trial.steps else ""
            row = (trial.name, trial.state, step, spark(trial.rewards[-40:]), last, scores or trial.message[:60])
            table.add_row(*map(escape, row))  # [...] in a label or a message is no markup
        return table

    def _say(self, text: str) -> None:
        print(text, file=self.stream, flush=True)


def spark(values: list[float]) -> str:
    """The values as a line of bars, from the smallest to the largest of them (rewards: from 0 to 1)."""
    values = [value for value in values if math.isfinite(value)]  # a loss may overflow
    if not values:
        return ""
    low, high = min(0.0, *values), max(1.0, *values) if max(values) <= 1 else max(values)
    return "".join(BARS[round((value - low) / (high - low) * (len(BARS) - 1))] for value in values)
