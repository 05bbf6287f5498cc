"""What reaches the directions that a low-rank update can start in: the energy of a layer's inputs along them.

A row of A passes on the part of the input that lies along it. Here the inputs of every linear layer of the small model
are those of a task's items with their answers, and those of the text whose loss says what was forgotten. Energies are
mean squares along the rows over mean squares along an axis, so that random rows have 1.

    python benchmarks/study_inputs.py runs/study/model benchmarks/results/study_inputs.json
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from _common import environment, write_result
from torch import Tensor, nn

from offprincipal_peft.geometry.rotations import haar_rotation
from offprincipal_peft.geometry.subspace import project_off
from offprincipal_peft.rlvr.tasks import load_task

ROWS, FRACTION = 8, 1 / 32  # the study's rank, and its k as a fraction of min(shape)
SEEDS = 8  # of random rows
ITEMS, PIECE, PIECES = 256, 256, 32  # items of the task; tokens and number of the pieces of other text


def second_moments(model: nn.Module, pieces: Iterable[list[int]]) -> dict[str, Tensor]:
    """fp64 (d_in, d_in) by linear layer: the mean of x xᵀ over all tokens of ``pieces``."""
    sums: dict[str, Tensor] = {}
    tokens = 0

    def add(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].flatten(0, -2).double()
            sums[name] = sums.get(name, 0) + x.T @ x

        return hook

    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in f".{name}"}
    handles = [layer.register_forward_pre_hook(add(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            for piece in pieces:
                model(torch.tensor([piece]))
                tokens += len(piece)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / tokens for name, total in sums.items()}


def directions(weight: Tensor) -> dict[str, list[Tensor]]:
    """By start: draws of orthonormal rows (ROWS, d_in), fp64; those of the exact singular vectors are one draw."""
    _, _, right = torch.linalg.svd(weight.double(), full_matrices=True)
    k = max(1, int(FRACTION * min(weight.shape)))
    random = [haar_rotation(weight.shape[1], seed)[:ROWS] for seed in range(SEEDS)]
    confined = [torch.linalg.qr(project_off(rows.T, right[:k].T)).Q.T for rows in random]
    return {"top": [right[:ROWS]], "bottom": [right[-ROWS:]], "random": random, "random, off the top n/32": confined}


def energies(model: nn.Module, moments: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, float]]:
    """By start and inputs: the energy along its rows, a geometric mean over layers (and draws)."""
    found: dict[str, dict[str, list[float]]] = {}
    for name in next(iter(moments.values())):
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        for start, draws in directions(weight.detach()).items():
            for inputs, by_layer in moments.items():
                moment = by_layer[name]
                logs = [((rows @ moment * rows).sum() / ROWS / (moment.trace() / len(moment))).log() for rows in draws]
                found.setdefault(start, {}).setdefault(inputs, []).append(float(torch.stack(logs).mean()))
    return {
        start: {inputs: float(torch.tensor(logs).mean().exp()) for inputs, logs in by_inputs.items()}
        for start, by_inputs in found.items()
    }


def main() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    task = load_task("sums", {"train": ITEMS, "validation": 1, "test": 1}, {})
    items = [tokenizer(f"{item.prompt}{task.gold(item)}")["input_ids"] for item in task.splits.train]
    ids = tokenizer((options.model / "other_text.txt").read_text(encoding="utf-8"))["input_ids"]
    other = [ids[start : start + PIECE] for start in range(0, min(len(ids), PIECE * PIECES), PIECE)]
    moments = {"task": second_moments(model, items), "other text": second_moments(model, other)}
    write_result(
        options.out,
        {
            "model": hashlib.sha256((options.model / "model.safetensors").read_bytes()).hexdigest(),
            "rows": ROWS,
            "principal_rank": FRACTION,
            "tokens": {"task": sum(map(len, items)), "other text": sum(map(len, other))},
            "energies": energies(model, moments),
            "environment": environment("cpu"),
        },
    )


if __name__ == "__main__":
    main()
