"""What the comparison harness costs over the same GRPO run written by hand with TRL alone.

Both train LoRA on the same prompts with the same arguments. One round runs both, in random order, and gives one ratio
of the seconds inside ``trainer.train()``; what the harness measures besides training is left out on both
sides (evaluations, the spectra after the last step), its own callbacks are in: seeds, clock, log, and the geometry of
the update with its singular bases from the cache that all trials share. Run:

    python benchmarks/harness_overhead.py --out benchmarks/results/harness_overhead.json
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _common import environment, median, paired_ratio, write_result
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from offprincipal_peft.rlvr.callbacks import GeometryCallback
from offprincipal_peft.rlvr.config import TrialConfig
from offprincipal_peft.rlvr.methods import build_config
from offprincipal_peft.rlvr.models import cache_folder, load_model, load_tokenizer, model_folder
from offprincipal_peft.rlvr.tasks import load_task
from offprincipal_peft.rlvr.trainers import OnLog, StepClock, build_trainer


def by_hand(config: TrialConfig, rows: list[dict[str, str]], folder: str) -> GRPOTrainer:
    """As a user of TRL would write it."""
    path = model_folder(config.model)
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.encode("\n")[0]]

    def reward(completions: list[str], answer: list[str], **_: Any) -> list[float]:
        found = [re.search(r"-?\d+", completion) for completion in completions]
        return [float(match is not None and match.group() == gold) for match, gold in zip(found, answer, strict=True)]

    return GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=config.prompts_per_step * config.group_size,
            num_generations=config.group_size,
            max_completion_length=config.max_completion_length,
            max_steps=config.steps,
            learning_rate=config.learning_rate,
            lr_scheduler_type="constant",
            beta=0.0,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=config.seed,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=config.rank, lora_alpha=config.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )


def with_harness(config: TrialConfig, folder: str) -> GRPOTrainer:
    task = load_task(config.task, {"train": config.train_items, "validation": 8, "test": 8})
    model = load_model(config.model, config.dtype, torch.device("cpu"))
    geometry = GeometryCallback(config.steps, final=False, cache_dir=cache_folder() / "bases")  # as a trial has it
    callbacks = [StepClock(), geometry, OnLog(lambda step, logs: None)]
    tokenizer = load_tokenizer(config.model)
    return build_trainer(config, model, tokenizer, task, build_config(config), folder, callbacks)


def seconds(trainer: GRPOTrainer) -> float:
    begin = time.perf_counter()
    trainer.train()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    config = TrialConfig(
        method="lora",
        learning_rate=1e-4,
        model=args.model,
        device="cpu",
        steps=args.steps,
        prompts_per_step=8,
        group_size=4,
        train_items=256,
    )
    items = load_task(config.task, {"train": config.train_items, "validation": 8, "test": 8}).splits.train
    rows = [{"prompt": str(item.prompt), "answer": item.answer} for item in items]
    times: dict[str, list[float]] = {"by hand": [], "harness": []}
    order = random.Random(0)
    for number in range(args.rounds + 1):
        names = list(times)
        order.shuffle(names)
        run = config if number else dataclasses.replace(config, steps=1)  # the first round warms up
        for name in names:
            with tempfile.TemporaryDirectory() as folder:
                torch.manual_seed(0)
                trainer = by_hand(run, rows, folder) if name == "by hand" else with_harness(run, folder)
                spent = seconds(trainer)
            if number:
                times[name].append(spent)
    ratio = paired_ratio(times["harness"], times["by hand"])
    low, high = ratio["interval"]
    print(f"harness / by hand: {ratio['ratio']:.3f} [{low:.3f}, {high:.3f}], {median(times['by hand']):.1f} s by hand")
    if args.out:
        payload = {
            "benchmark": "harness_overhead",
            "environment": environment("cpu"),
            "settings": {"model": args.model, "steps": args.steps, "rounds": args.rounds, "prompts": 8, "group": 4},
            "seconds": {name: median(values) for name, values in times.items()},
            "overhead": ratio,
        }
        write_result(args.out, payload)


if __name__ == "__main__":
    main()
