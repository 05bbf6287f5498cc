"""The weight under an adapter: plain, or quantised by bitsandbytes and then read as floats and never written.

A quantised weight cannot hold an update: requantising rounds it away and cannot be undone. A merge therefore puts a
float copy with the update in the layer's place, and an unmerge puts the quantised layer back, which nothing touched.
"""

from __future__ import annotations

import copy
import hashlib
import sys
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ..geometry.mask_storage import fingerprint


class DequantizedLinear(nn.Linear):
    """A quantised layer's values in floats, as an ``nn.Linear`` that takes inputs of any dtype, as the layer did."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(self.weight.dtype)
        return F.linear(x.to(self.weight.dtype), self.weight, bias).to(x.dtype)


class DequantizedConv1D(Conv1D):
    """The same for a quantised ``Conv1D``, which transformers stores (d_in, d_out)."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x.to(self.weight.dtype))
        return out.to(x.dtype)


def quantization(base: nn.Module) -> Literal["4bit", "8bit"] | None:
    """How bitsandbytes quantised a layer; None for every other layer, and where it is not installed."""
    bnb: Any = sys.modules.get("bitsandbytes")  # a layer of its kind exists only where it was imported
    if bnb is None:
        return None
    if isinstance(base, bnb.nn.Linear4bit):
        return "4bit"
    if isinstance(base, bnb.nn.Linear8bitLt) and not base.state.has_fp16_weights:
        return "8bit"
    return None


def is_quantized_yet(base: nn.Module) -> bool:
    """Whether the values are there: bitsandbytes quantises a layer when it is first moved to a device."""
    weight: Any = base.weight
    return weight.quant_state is not None if quantization(base) == "4bit" else weight.dtype == torch.int8


def weight_shape(base: nn.Module) -> tuple[int, int]:
    """(d_out, d_in), whatever the storage."""
    if quantization(base):
        return int(base.out_features), int(base.in_features)  # type: ignore[arg-type]
    rows, columns = _plain(base).shape
    return (columns, rows) if isinstance(base, Conv1D) else (rows, columns)


def float_weight(base: nn.Module) -> Tensor:
    """(d_out, d_in): a view of a plain weight, the dequantised values of a quantised one (a copy)."""
    kind = quantization(base)
    if kind == "4bit":
        return _dequantized_4bit(base)
    if kind == "8bit":
        codes, scales = _codes_and_scales_8bit(base)
        return codes.float() * (scales.float() / 127.0)[:, None]
    weight = _plain(base).detach()
    return weight.T if isinstance(base, Conv1D) else weight


def float_dtype(base: nn.Module, default: torch.dtype = torch.float32) -> torch.dtype:
    """The floating dtype that a layer's values stand for; ``default`` where int8 codes do not tell."""
    kind = quantization(base)
    if kind is None:
        return _plain(base).dtype
    if kind == "8bit":
        return default
    state: Any = base.weight.quant_state  # type: ignore[union-attr]
    dtype = state.original_dtype if getattr(state, "packing_format_for_cpu", False) else state.dtype
    assert isinstance(dtype, torch.dtype)
    return dtype


def model_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that a model was loaded in, as its config says; fp32 where it has none."""
    dtype = getattr(getattr(model, "config", None), "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def identity(base: nn.Module) -> Tensor:
    """Sixteen bytes (uint8) that tell base weights apart: of the stored matrix, or of codes and scales.

    bitsandbytes reorders 4-bit codes and rounds their scales to bf16 when a model first runs in eval mode on some
    CPUs: the codes are put in order and the scales rounded first, so that the identity stays what it was.
    """
    kind = quantization(base)
    if kind is None:
        return fingerprint(_plain(base).detach())
    codes, scales = _codes_and_scales_4bit(base) if kind == "4bit" else _codes_and_scales_8bit(base)
    digest = hashlib.blake2b(f"{kind} {weight_shape(base)}".encode(), digest_size=16)
    for part in (codes.reshape(-1, 1), scales.reshape(-1, 1)):
        digest.update(bytes(fingerprint(part).tolist()))
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)


def merged_copy(base: nn.Module, update: Tensor, dtype: torch.dtype) -> DequantizedLinear | DequantizedConv1D:
    """A frozen float layer that holds a quantised layer's values plus an update, rounded once.

    Args:
        base: the quantised layer, on whose device the copy is; its bias is copied.
        update: (d_out, d_in), in the dtype that the sum is formed in.
        dtype: of the result.
    """
    weight = float_weight(base).to(update.dtype).add_(update).to(dtype)
    bias: Any = base.bias
    rows, columns = weight.shape
    layer: DequantizedLinear | DequantizedConv1D
    with torch.device("meta"):
        if issubclass(getattr(base, "source_cls", nn.Linear), Conv1D):  # of transformers' own quantised GPT-2
            layer = DequantizedConv1D(rows, columns)
        else:
            layer = DequantizedLinear(columns, rows, bias=bias is not None)
    stored = weight.T if isinstance(layer, DequantizedConv1D) else weight
    layer.weight = nn.Parameter(stored.contiguous(), requires_grad=False)
    if isinstance(layer, DequantizedConv1D):
        bias = weight.new_zeros(rows) if bias is None else bias.to(dtype)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return layer.train(base.training)


def pristine_state(base: nn.Module) -> Any:
    """The scales of a 4-bit layer before bitsandbytes packs it for the CPU, None where there is nothing to keep."""
    state: Any = getattr(base.weight, "quant_state", None) if quantization(base) == "4bit" else None
    return None if state is None or getattr(state, "packing_format_for_cpu", False) else copy.copy(state)


def undo_packing(base: nn.Module, pristine: Any) -> None:
    """Put a 4-bit layer's codes and scales back as they were before bitsandbytes packed them for the CPU.

    Its own way back, which ``state_dict()`` takes, leaves the scales of a layer in another order or quantises them
    again: the layer computes with other weights from then on. And its backward does not know the packed order: it
    multiplies with other weights (both in 0.50.2). So this is done before a state dict and before a forward that a
    backward follows.
    """
    weight: Any = base.weight
    if quantization(base) != "4bit" or not getattr(weight.quant_state, "packing_format_for_cpu", False):
        return
    data, state = _flat_4bit(base)
    if pristine is not None:
        state = copy.copy(pristine)
        state.to(weight.device)
    weight.data, weight.quant_state = data, state
    base.quant_state = state


def finish_merge(model: nn.Module) -> None:
    """Give a model that float layers were merged into the marks it needs to be saved and loaded.

    transformers reads ``quantization_config`` when a saved model is loaded, and quantises the linear layers that it
    does not list. It goes where no layer is quantised any more, and lists what is not otherwise.
    """
    floats = any(isinstance(module, DequantizedLinear | DequantizedConv1D) for module in model.modules())
    config: Any = getattr(model, "config", None)
    settings = getattr(config, "quantization_config", None)
    if settings is None or not floats:
        return
    if any(quantization(module) for module in model.modules()):
        linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and not quantization(m)]
        settings.llm_int8_skip_modules = linear
        return
    _forget_conversions(model)
    del config.quantization_config
    for mark in ("hf_quantizer", "quantization_method"):
        if hasattr(model, mark):
            delattr(model, mark)
    for mark in ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        if getattr(model, mark, False):
            setattr(model, mark, False)


def _forget_conversions(model: Any) -> None:
    """transformers undoes on saving how a checkpoint was read; reading quantised tensors has no inverse."""
    quantizer, conversions = getattr(model, "hf_quantizer", None), getattr(model, "_weight_conversions", None)
    if quantizer is None or not conversions:
        return
    quantising = {type(step) for c in quantizer.get_weight_conversions() for step in getattr(c, "operations", [])}
    kept = [c for c in conversions if not any(type(step) in quantising for step in getattr(c, "operations", []))]
    model._weight_conversions = kept or None


def _plain(base: nn.Module) -> Tensor:
    weight = base.weight
    assert isinstance(weight, Tensor)
    return weight


def _codes_and_scales_8bit(base: nn.Module) -> tuple[Tensor, Tensor]:
    """int8 (d_out, d_in) and their row scales (d_out,), which bitsandbytes keeps in the weight until its first use."""
    weight: Any = base.weight
    state: Any = base.state
    scales = state.SCB if state.SCB is not None else weight.SCB
    return weight.data, scales.to(weight.device)


def _flat_4bit(base: nn.Module) -> tuple[Tensor, Any]:
    """4-bit codes in row-major order and a state with flat fp32 scales; the layer's own are not touched."""
    import bitsandbytes.functional as bnb

    weight: Any = base.weight
    data, state = weight.data, copy.copy(weight.quant_state)
    if getattr(state, "packing_format_for_cpu", False):
        scales = state.absmax.T.reshape(-1).float()
        state.original_nested = False  # the inverse would quantise the scales again
        data, state = bnb._convert_weight_packed_for_cpu_inverse(data, state)
        state.absmax = scales
    elif state.nested:
        state.absmax = (bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset).float()
        state.nested = False
    return data, state


def _codes_and_scales_4bit(base: nn.Module) -> tuple[Tensor, Tensor]:
    data, state = _flat_4bit(base)
    return data.view(torch.uint8), state.absmax.to(torch.bfloat16)


def _dequantized_4bit(base: nn.Module) -> Tensor:
    import bitsandbytes.functional as bnb

    data, state = _flat_4bit(base)
    weight: Tensor = bnb.dequantize_4bit(data, state)
    return weight.reshape(weight_shape(base))
