"""What the export tests share: saved adapters on saved bases, and their logits in a process without the package."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lifecycle import IDS, config, logits, tiny, train

TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"

# Largest difference of logits to the off-principal model's, relative to the largest logit.
TOLERANCES = {
    torch.float32: 2e-6,  # 4.7e-7 observed, of a recomputed product; 4.3e-7 of a folded one
    torch.bfloat16: 8e-3,  # 0 observed; one rounding of a logit is 2^-8
}


def save_base(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **sizes: Any) -> Path:
    tiny(family, dtype, **sizes).save_pretrained(folder)
    return folder


def load_base(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def trained(base: Path, preset: str = "pissa", steps: int = 2, **overrides: Any) -> PeftModel:
    host = peft.get_peft_model(load_base(base), config(preset, **overrides))
    train(host, steps)
    return host


def saved(host: PeftModel, folder: Path, **options: Any) -> Path:
    host.save_pretrained(folder, **options)
    return folder


def plain(base: Path, folder: Path) -> PeftModel:
    """The exported adapter on its base, as plain PEFT loads it."""
    host = PeftModel.from_pretrained(load_base(base), folder).eval()
    assert type(host.peft_config["default"]) is LoraConfig
    return host


def distance(actual: Tensor, expected: Tensor) -> float:
    return ((actual.float() - expected.float()).abs().max() / expected.float().abs().max()).item()


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / TENSORS)


def settings(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_text())


@dataclass
class Case:
    """An adapter, its export, and the logits of both and of the base alone."""

    base: Path
    adapter: Path
    exported: Path
    expected: Tensor
    untrained: Tensor
    actual: Tensor | None = None


def logits_without_the_package(cases: dict[str, Case], folder: Path) -> None:
    """Fill in ``actual``: one process, which must never import offprincipal_peft, loads all of them."""
    given = [{"name": name, "base": str(c.base), "adapter": str(c.exported)} for name, c in cases.items()]
    (folder / "cases.json").write_text(json.dumps({"ids": IDS.tolist(), "cases": given}))
    command = [sys.executable, str(Path(__file__).with_name("plain_peft.py"))]
    command += [str(folder / "cases.json"), str(folder / "logits.safetensors")]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, found in load_file(folder / "logits.safetensors").items():
        cases[name].actual = found


def make_case(host: PeftModel, base: Path, adapter: Path, exported: Path) -> Case:
    with host.disable_adapter():
        untrained = logits(host)
    return Case(base, adapter, exported, logits(host), untrained)
