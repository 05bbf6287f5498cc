"""Tiny models that transformers loads with bitsandbytes' 4-bit and 8-bit layers, on the CPU, and their float twins."""

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from peft import PeftConfig
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from helpers import tiny_gpt2, tiny_llama, tiny_qwen2
from lifecycle import config
from sparse_models import sparse_config

KINDS = ("nf4", "nf4 double", "int8")
# Every form of update: plain, with a subtracted start, one factor trained, projected; every structure of masks. Some
# take a part of the layers. Blocks of 64 x 64 need a layer that has two.
OFF: dict[str, Callable[[], PeftConfig]] = {
    "lora": lambda: config("lora"),
    "pissa": lambda: config("pissa"),
    "mica": lambda: config("mica", target_modules=["q_proj", "v_proj", "down_proj"]),
    "offprincipal": lambda: config("offprincipal"),
}
SPARSE: dict[str, Callable[[], PeftConfig]] = {
    "element": sparse_config,
    "row": lambda: sparse_config(mask="low", low_density=0.3, structure="row"),
    "column": lambda: sparse_config(mask="random(low)", low_density=0.3, structure="column"),
    "block": lambda: sparse_config(mask="principal", structure="block", target_modules=["up_proj", "down_proj"]),
}
ADAPTERS = OFF | SPARSE
_KEEP: list[tempfile.TemporaryDirectory[str]] = []


@functools.cache
def folder(family: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """The float model on disk, once per session."""
    _KEEP.append(tempfile.TemporaryDirectory())
    path = Path(_KEEP[-1].name)
    sizes = {} if family == "gpt2" else {"intermediate": 128}
    build = {"llama": tiny_llama, "qwen2": tiny_qwen2, "gpt2": tiny_gpt2}[family]
    build(dtype, hidden=64, seed=seed, **sizes).save_pretrained(path)
    return path


def quantization_config(kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> BitsAndBytesConfig:
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, **options)
    settings = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": kind.split()[0],
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_use_double_quant": kind.endswith("double"),
    }
    return BitsAndBytesConfig(**settings | options)


def quantized(
    kind: str, dtype: torch.dtype = torch.float32, family: str = "llama", seed: int = 0, **options: Any
) -> PreTrainedModel:
    """A fresh quantised model; every call gives the same weights.

    In train mode: in eval mode bitsandbytes reorders 4-bit weights on some CPUs and computes in bf16 from then on.
    """
    model = AutoModelForCausalLM.from_pretrained(
        folder(family, dtype, seed),
        dtype=dtype,
        device_map="cpu",
        quantization_config=quantization_config(kind, dtype, **options),
    )
    return model.train()


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    found = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    assert found, "no quantised layer in the model"
    return found


def by_bitsandbytes(layer: Any) -> Tensor:
    """(d_out, d_in): a layer's values by bitsandbytes' own functions, in the dtype that those give."""
    if isinstance(layer, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    codes = layer.weight.CB if layer.state.CB is None else layer.state.CB
    scales = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
    return bnb.functional.int8_vectorwise_dequant(codes, scales)


def float_twin(kind: str, dtype: torch.dtype = torch.float32, family: str = "llama") -> PreTrainedModel:
    """The same model with an `nn.Linear` of the dequantised values, in `dtype`, for every quantised layer."""
    model = quantized(kind, dtype, family)
    for name, layer in quantized_layers(model).items():
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        plain.weight = nn.Parameter(by_bitsandbytes(layer).to(dtype), requires_grad=False)
        if layer.bias is not None:
            plain.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, plain)
    del model.config.quantization_config
    return model.train()


def is_repacked(model: nn.Module) -> bool:
    """Whether bitsandbytes reordered 4-bit weights for this CPU."""
    states = [getattr(layer.weight, "quant_state", None) for layer in quantized_layers(model).values()]
    return any(getattr(state, "packing_format_for_cpu", False) for state in states)
