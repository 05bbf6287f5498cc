"""An adapter that was just added changes no bit of the logits, whatever the preset, dtype, dropout and autocast."""

import functools

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from helpers import relative_error, tiny_gpt2, tiny_llama, token_batch
from offprincipal_peft import OffPrincipalLoraConfig
from offprincipal_peft.tuners.offprincipal_lora import fold
from offprincipal_peft.tuners.offprincipal_lora.presets import PRESETS

VOCAB = 128
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def logits(model: nn.Module, autocast: bool) -> Tensor:
    torch.manual_seed(7)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return model(input_ids=token_batch(VOCAB)).logits


@functools.cache
def base_logits(make, dtype: torch.dtype, training: bool, autocast: bool) -> Tensor:
    found = logits(make(dtype).train(training), autocast)
    assert found.std() > 0.01
    return found


def adapted(make, dtype: torch.dtype, preset: str, dropout: float = 0.0, autocast_adapter_dtype: bool = True):
    config = OffPrincipalLoraConfig.preset(preset, r=4, lora_alpha=8, lora_dropout=dropout, task_type="CAUSAL_LM")
    return get_peft_model(make(dtype), config, autocast_adapter_dtype=autocast_adapter_dtype)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_the_first_logits_are_the_bases(make, dtype, preset, dropout, autocast_adapter_dtype):
    model = adapted(make, dtype, preset, dropout, autocast_adapter_dtype)
    for training in (False, True):
        model.train(training)
        for autocast in (False, True):
            expected, actual = base_logits(make, dtype, training, autocast), logits(model, autocast)
            assert actual.dtype == expected.dtype
            assert torch.equal(actual, expected), (training, autocast)
            if not training:  # without gradients the folded factors are reused
                with torch.no_grad():
                    assert torch.equal(logits(model, autocast), expected), autocast


@pytest.mark.parametrize("preset", PRESETS)
def test_the_first_gradient_is_not_zero(preset):
    """What starts at zero must still be able to leave it."""
    model = adapted(tiny_llama, torch.float32, preset)
    logits(model, autocast=False).square().sum().backward()
    adapters = {n for n, p in model.named_parameters() if p.requires_grad}
    moving = {n for n in adapters if model.get_parameter(n).grad.any()}
    both_start = OffPrincipalLoraConfig.preset(preset).init_factors == "both"
    assert moving == (adapters if both_start or preset == "mica" else {n for n in adapters if "lora_B" in n})


# -- the form of the difference -----------------------------------------------------------------------------------


def test_the_fused_naive_form_is_seen(monkeypatch):
    """[B, -B0] [A; A0] is BA - B0 A0 as well, but its rounding does not cancel."""

    def naive(B: Tensor, A: Tensor, B0: Tensor, A0: Tensor, train: str) -> tuple[Tensor, Tensor]:
        return torch.cat([B, -B0], dim=1), torch.cat([A, A0], dim=0)

    model, base = adapted(tiny_llama, torch.float32, "pissa"), tiny_llama()
    assert torch.equal(logits(model, False), logits(base, False))
    monkeypatch.setattr(fold, "_differences", naive)
    error = relative_error(logits(model, False), logits(base, False))
    assert 1e-8 < error < 1e-4  # observed: 3.3e-7


def moved_layer(preset: str, step: float) -> tuple[nn.Module, Tensor]:
    """(an adapter layer whose base holds zeros by now, its update in fp64) after a small step from the start."""
    torch.manual_seed(0)
    config = OffPrincipalLoraConfig.preset(preset, r=8, lora_alpha=8, target_modules=["0"])
    layer = get_peft_model(nn.Sequential(nn.Linear(96, 64, bias=False)), config).base_model.model[0]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    A0, B0 = A.detach().double(), B.detach().double()
    A.data += step * A.std() * torch.randn(A.shape)
    B.data += step * B.std() * torch.randn(B.shape)
    layer.get_base_layer().weight.data.zero_()  # so that the layer's output is the update alone
    return layer, B.detach().double() @ A.detach().double() - B0 @ A0


@pytest.mark.parametrize("preset", ["pissa", "milora", "olora-tail"])
def test_a_small_update_survives_bf16(preset):
    """Under autocast a product in bf16 is right to 2^-9, which two large products lose and one difference keeps."""
    layer, delta = moved_layer(preset, step=1e-3)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    A0, B0 = layer.lora_start_A["default"].weight, layer.lora_start_B["default"].weight
    x = torch.randn(32, 96)
    expected = x.double() @ delta.T
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours = layer(x)
        naive = F.linear(F.linear(x, A), B) - F.linear(F.linear(x, A0), B0)
    assert relative_error(ours, expected) < 1e-2  # observed: 3.6e-3 to 3.7e-3
    assert relative_error(naive, expected) > 0.5  # observed: 2.4 to 2.7
