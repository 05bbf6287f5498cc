"""One trial: a model, an adapter, TRL's trainer, evaluations, and one record of all of it.

``python -m offprincipal_peft.rlvr.trial CONFIG.json OUT.json`` runs one in its own process, prints its progress as one
JSON object a line, and writes its record whatever happens to the training.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from .config import TrialConfig
from .records import SCHEMA, environment, write_record

Progress = Callable[[dict[str, Any]], None]
CURVE = {  # a log's key -> the record's
    "reward": "reward",
    "reward_std": "reward_std",
    "loss": "loss",
    "entropy": "entropy",
    "completions/mean_length": "completion_length",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
    "kl": "kl",
}


class Stages:
    """Where a trial is, so that an error can say when it happened."""

    def __init__(self, progress: Progress) -> None:
        self.name, self.progress = "start", progress

    def enter(self, name: str) -> None:
        self.name = name
        self.progress({"event": "stage", "stage": name})


def run_trial(
    config: TrialConfig, progress: Progress = lambda event: None, *, weights: Path | None = None
) -> dict[str, Any]:
    """Train, evaluate, and return the record; a failure of any stage is a record with its traceback.

    ``weights``: a folder for what was trained, as the trainer saves it (the model, or the adapter alone).
    """
    begun = time.time()
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "id": config.trial_id,
        "status": "finished",
        "config": config.to_dict(),
        "environment": {},
        "started": datetime.datetime.fromtimestamp(begun, datetime.UTC).isoformat(timespec="seconds"),
        "checks": {},
        "curve": [],
        "evaluations": [],
        "geometry": None,
        "result": {},
        "error": None,
    }
    stages = Stages(lambda event: progress({"id": config.trial_id, **event}))
    try:
        _train_and_evaluate(config, record, stages, weights)
    except Exception as error:
        record["status"] = "failed"
        record["error"] = {
            "stage": stages.name,
            "type": type(error).__name__,
            "message": str(error),
            "traceback": "".join(traceback.format_exception(error)),
        }
    record["environment"] = environment()
    record["wall_s"] = time.time() - begun
    stages.progress({"event": record["status"], "result": record["result"], "error": record["error"]})
    return record


def _train_and_evaluate(config: TrialConfig, record: dict[str, Any], stages: Stages, weights: Path | None) -> None:
    import torch

    from .measure import Measurements
    from .methods import build_config, find_method
    from .models import choose_device, load_model, load_tokenizer
    from .tasks import TaskError, load_task
    from .trainers import AtSteps, OnLog, StepClock, build_trainer

    if config.threads:
        torch.set_num_threads(config.threads)
    stages.enter("task")
    sizes = {split: getattr(config, f"{split}_items") for split in ("train", "validation", "test")}
    task = load_task(config.task, sizes, config.task_options)
    record["checks"] = task.prove()
    rows = config.prompts_per_step * (config.group_size if config.algorithm == "sft" else 1)
    if len(task.splits.train) < rows:
        raise TaskError(f"task {task.name}: {len(task.splits.train)} train items, and a step takes {rows} of them")
    stages.enter("model")
    device = choose_device(config.device)
    config = dataclasses.replace(config, device=device.type)
    method, peft_config = find_method(config.method), build_config(config)
    tokenizer = load_tokenizer(config.model)
    model = load_model(config.model, config.dtype, device, config.quantization)
    measure = Measurements(config, method, model, tokenizer, task, device, record)

    def log(step: int, logs: dict[str, Any]) -> None:
        row = {"step": step, **{name: logs.get(key) for key, name in CURVE.items()}, "step_s": clock.seconds.get(step)}
        record["curve"].append(row)
        stages.progress({"event": "step", "steps": config.steps, **row})

    def evaluate(step: int) -> None:
        stages.enter("evaluate")
        measure.evaluate(trainer.model, step)
        last = record["evaluations"][-1]
        stages.progress({"event": "evaluation", **{k: v for k, v in last.items() if k != "correct"}})
        stages.enter("train")

    clock = StepClock()
    callbacks: list[Any] = [clock, measure.geometry, AtSteps(config.evaluate_every, evaluate), OnLog(log)]
    with tempfile.TemporaryDirectory(prefix="offprincipal-") as folder:
        used = [callback for callback in callbacks if callback is not None]
        trainer = build_trainer(config, model, tokenizer, task, peft_config, folder, used)
        evaluate(0)
        trainer.train()
        stages.enter("evaluate")
        measure.finish(trainer)
        if weights is not None:
            stages.enter("save")
            trainer.save_model(str(weights))
            (weights / "training_args.bin").unlink(missing_ok=True)  # a pickle, and all of it is in the config


def _line(event: dict[str, Any], stream: Any) -> None:
    print(json.dumps(event, default=str), file=stream, flush=True)


def main(arguments: list[str]) -> int:
    """Run the trial of one config file; 0 when a record was written, whether the training succeeded or not."""
    if len(arguments) != 2:
        print("usage: python -m offprincipal_peft.rlvr.trial CONFIG.json OUT.json", file=sys.stderr)
        return 2
    source, target = map(Path, arguments)
    try:
        config = TrialConfig.from_dict(json.loads(source.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        print(f"{source}: {error}", file=sys.stderr)
        return 2
    stdout = sys.stdout
    first = int(os.environ.get("RANK", "0")) == 0
    with redirect_stdout(sys.stderr):  # trainers print; only progress belongs on stdout
        record = run_trial(config, (lambda event: _line(event, stdout)) if first else (lambda event: None))
    if first:
        write_record(target, record)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
