"""What the tests of merged adapters share: adapters with noise in them, PEFT's own merge in fp32, the comparison."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from helpers import relative_error
from interop.exporting import load_base, saved
from offprincipal_peft.audit import open_checkpoint
from offprincipal_peft.interop.audit_source import MergedCheckpoint

TOLERANCE = 1e-7  # 1.3e-8 observed (pissa, milora, olora-tail, geora), 0 for every other method and preset


def noisy(model: nn.Module, method: PeftConfig) -> PeftModel:
    """Every trained parameter away from where it starts."""
    host, generator = get_peft_model(model, method), torch.Generator().manual_seed(1)
    for parameter in host.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return host


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", "target_modules": ["q_proj"]} | options)


def adapter(base: Path, folder: Path, method: PeftConfig, **saving: Any) -> Path:
    return saved(noisy(load_base(base), method), folder, **saving)


def twin(base: Path, adapter: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    return dict(PeftModel.from_pretrained(model, adapter).eval().merge_and_unload().state_dict())


def check(
    base: Path,
    opened: MergedCheckpoint,
    expected: dict[str, Tensor],
    changed: int,
    rename: Callable[[str], str] = str,
) -> None:
    """Every tensor: the base's own exactly, merged ones as ``expected``; ``changed`` of them differ from the base."""
    differ = 0
    with open_checkpoint(base) as bare, opened:
        for name, info in opened.tensors.items():
            found = opened.read(name)
            assert (found.dtype, tuple(found.shape)) == (info.dtype, info.shape)
            if name not in opened.adapted:
                assert info == bare.tensors[name] and torch.equal(found, bare.read(name))
                continue
            assert relative_error(found, expected[rename(name)]) < TOLERANCE, name
            differ += name not in bare.tensors or not torch.equal(found, bare.read(name).to(found.dtype))
    assert differ == changed
