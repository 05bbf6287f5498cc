"""TRL's trainers in two processes under accelerate, on CPUs: DDP, as `accelerate launch` runs them."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from distributed.cases import CASES, ROWS, Case
from distributed.checks import all_checks, digests
from helpers import base_bytes
from offprincipal_peft import MaskedAdamW
from offprincipal_peft.tuners.ranks import check_same_on_every_rank
from trainers import RATE, grpo_trainer, logged, sft, trainable

SFT = ("projected", "packed", "split")
GRPO = ("projected", "packed")


def fine_tuned(case: Case, folder: Path, world: int) -> Trainer:
    """Two steps of SFT on global batches of ROWS rows, whatever the number of processes."""
    torch.manual_seed(0)
    host = case.adapted()
    own = {"optimizers": (MaskedAdamW(trainable(host).values(), lr=RATE), None)} if case.name == "split" else {}
    trainer = sft(host, folder, more=own, per_device_train_batch_size=ROWS // world)
    trainer.train()
    return trainer


def observed(trainer: Trainer) -> dict[str, Any]:
    assert isinstance(trainer.model_wrapped, DistributedDataParallel), type(trainer.model_wrapped)
    host = trainer.model
    found: dict[str, Any] = {"compared": check_same_on_every_rank(host), "adapter": digests(host)}
    with host.disable_adapter():
        found["base"] = base_bytes(host)
    return found


def all_trainers(rank: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"sft": {}, "grpo": {}}
    for name in SFT:
        trainer = fine_tuned(CASES[name], folder / "out", dist.get_world_size())
        found["sft"][name] = {"losses": logged(trainer, "loss"), **observed(trainer)}
        trainer.save_model(folder / "sft" / name)
    for name in GRPO:
        torch.manual_seed(0)
        trainer = grpo_trainer(CASES[name].adapted(), folder / "out")
        before = digests(trainer.model)
        trainer.train()
        found["grpo"][name] = {"kl": logged(trainer, "kl"), "before": before, **observed(trainer)}
    return found


def everything(rank: int, folder: Path) -> dict[str, Any]:
    """One start of two processes for the whole folder: their imports cost more than what they do."""
    return {**all_checks(rank, folder), **all_trainers(rank, folder)}
