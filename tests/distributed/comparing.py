"""Adapters of two runs, tensor by tensor."""

from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

EXACT = ("lora_start", "lora_basis", ".entries", ".base")  # what never trains and is compared by its bits


def state_of(host: PeftModel) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in get_peft_model_state_dict(host).items()}


def saved(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def compare(actual: dict[str, Tensor], expected: dict[str, Tensor], start: dict[str, Tensor]) -> tuple[float, float]:
    """The largest difference of a trained tensor, in units of its largest movement from ``start``; the same in norms.

    Frozen tensors must agree bit for bit, something must have moved, and the names and dtypes must be the same.
    """
    assert actual.keys() == expected.keys() == start.keys()
    largest, norm, moved = 0.0, 0.0, 0
    for key, value in expected.items():
        got = actual[key]
        assert got.dtype == value.dtype and got.shape == value.shape, key
        if any(part in key for part in EXACT):
            assert torch.equal(got, value), f"{key} differs"
            continue
        movement = value.double() - start[key].double()
        if not bool(movement.any()):
            assert torch.equal(got, value), f"{key} moved in one run only"
            continue
        moved += 1
        error = got.double() - value.double()
        largest = max(largest, float(error.abs().max() / movement.abs().max()))
        norm = max(norm, float(error.norm() / movement.norm()))
    assert moved, "nothing was trained"
    return largest, norm
