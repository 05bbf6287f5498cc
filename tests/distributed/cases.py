"""The adapters and optimisers that are trained on one process and on two, and how: the same batches everywhere."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from helpers import token_batch
from lifecycle import config, tiny, trainable
from offprincipal_peft import MaskedAdamW
from sparse_models import sparse_config

STEPS = 4
ROWS = 4  # of the global batch; each of two ranks has half of them
VOCABULARY = 128
OPTIMIZERS: dict[str, Callable[[Iterable[Tensor]], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.3),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    "masked": lambda parameters: MaskedAdamW(parameters, lr=1e-2),
}


@dataclass(frozen=True)
class Case:
    name: str
    config: Callable[[], PeftConfig]
    dtype: torch.dtype = torch.float32
    family: str = "llama"

    def base(self) -> PreTrainedModel:
        return tiny(self.family, self.dtype)

    def adapted(self) -> PeftModel:
        return get_peft_model(self.base(), self.config()).train()

    def load(self, folder: Any) -> PeftModel:
        return PeftModel.from_pretrained(self.base(), folder, is_trainable=True)


CASES = {
    case.name: case
    for case in (
        Case("projected", lambda: config("offprincipal")),
        Case("pissa", lambda: config("pissa")),
        Case("projected-bf16", lambda: config("offprincipal"), torch.bfloat16),
        Case("packed", lambda: sparse_config(packing="packed")),
        Case("dense", lambda: sparse_config(packing="dense", mask="safe")),
        Case("transposed", lambda: sparse_config(structure="row"), family="gpt2"),
        Case("sparse-bf16", lambda: sparse_config(packing="packed"), torch.bfloat16),
        Case("split", lambda: sparse_config(precision="split"), torch.bfloat16),
    )
}
# How each is trained, and whether FSDP can: (case, optimiser).
UNDER_DDP = [
    ("projected", "sgd"),
    ("projected", "adamw"),
    ("pissa", "sgd"),
    ("packed", "sgd"),
    ("packed", "adamw"),
    ("dense", "sgd"),
    ("sparse-bf16", "sgd"),
    ("sparse-bf16", "masked"),
    ("split", "masked"),
]
UNDER_FSDP = [
    ("projected", "sgd"),
    ("projected", "adamw"),
    ("pissa", "sgd"),
    ("projected-bf16", "sgd"),
    ("packed", "sgd"),
    ("packed", "adamw"),
    ("packed", "masked"),
    ("dense", "sgd"),
    ("dense", "masked"),
    ("transposed", "sgd"),
    ("sparse-bf16", "sgd"),
]
LOADED = ("projected", "packed", "dense", "split")


def batches() -> list[Tensor]:
    """The global batches (ROWS, 12); every row has as many tokens, so that the ranks' means average to the whole's."""
    return [token_batch(VOCABULARY, batch=ROWS, seed=100 + step) for step in range(STEPS)]


def part(batch: Tensor, rank: int, world: int = 2) -> Tensor:
    return batch.chunk(world)[rank]


def train(
    model: nn.Module,
    by: torch.optim.Optimizer,
    of: Callable[[Tensor], Tensor] = lambda batch: batch,
    backward: Callable[[Tensor], Any] = Tensor.backward,
) -> list[float]:
    """Steps over the batches, or over what ``of`` takes of each; the losses."""
    losses = []
    for batch in batches():
        ids = of(batch)
        loss = model(input_ids=ids, labels=ids).loss
        backward(loss)
        by.step()
        by.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    return OPTIMIZERS[name](list(trainable(model).values()))
