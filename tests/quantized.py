"""Tiny models that transformers loads with bitsandbytes' 4-bit and 8-bit layers, on the CPU."""

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from helpers import tiny_llama, tiny_qwen2

KINDS = ("nf4", "nf4 double", "int8")
_KEEP: list[tempfile.TemporaryDirectory[str]] = []


@functools.cache
def _folder(family: str, dtype: torch.dtype) -> Path:
    """The float model on disk, once per session."""
    _KEEP.append(tempfile.TemporaryDirectory())
    build = {"llama": tiny_llama, "qwen2": tiny_qwen2}[family]
    folder = Path(_KEEP[-1].name)
    build(dtype, hidden=64, intermediate=128).save_pretrained(folder)
    return folder


def quantization_config(kind: str, dtype: torch.dtype, **options: Any) -> BitsAndBytesConfig:
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, **options)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=kind == "nf4 double",
        **options,
    )


def quantized(kind: str, dtype: torch.dtype = torch.float32, family: str = "llama", **options: Any) -> PreTrainedModel:
    """A fresh quantised model; every call gives the same weights. Left in train mode (see the module's tests)."""
    model = AutoModelForCausalLM.from_pretrained(
        _folder(family, dtype),
        dtype=dtype,
        device_map="cpu",
        quantization_config=quantization_config(kind, dtype, **options),
    )
    return model.train()
