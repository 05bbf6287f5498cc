"""Adapters on bitsandbytes' 4-bit and 8-bit layers: exact at the start, never writing, equal to the float twin's.

Outputs are compared in one mode: in eval mode bitsandbytes computes 4-bit layers by another route on some CPUs.
"""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from torch import Tensor, nn

from helpers import assert_same_base, base_bytes, relative_error, token_batch
from lifecycle import (
    IDS,
    adapter_tensors,
    assert_same_tensors,
    config,
    gradients,
    logits,
    no_decomposition,
    off_layers,
    trainable,
)
from offprincipal_peft.tuners.base_weight import float_weight, identity, merged_copy
from quantized import (
    ADAPTERS,
    KINDS,
    OFF,
    SPARSE,
    by_bitsandbytes,
    float_twin,
    folder,
    is_repacked,
    quantization_config,
    quantized,
    quantized_layers,
)
from sparse_models import names, no_new_mask, packed_values, sparse_config

pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")
DTYPES = (torch.float32, torch.bfloat16)


def step(host: PeftModel, steps: int = 3, lr: float = 1e-2) -> None:
    """AdamW steps; the model stays in train mode."""
    by = torch.optim.AdamW(trainable(host).values(), lr=lr)
    for number in range(steps):
        ids = token_batch(host.config.vocab_size, seed=100 + number)
        host(input_ids=ids, labels=ids).loss.backward()
        by.step()
        by.zero_grad()


def trained(kind: str, adapter: str, dtype: torch.dtype = torch.float32, steps: int = 3, **options: Any) -> PeftModel:
    host = get_peft_model(quantized(kind, dtype, **options), ADAPTERS[adapter]())
    step(host, steps)
    return host


# -- the start --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("kind", KINDS)
def test_the_start_is_the_quantised_model_bit_for_bit(kind, dtype, adapter):
    bare, host = quantized(kind, dtype), get_peft_model(quantized(kind, dtype), ADAPTERS[adapter]())
    for training in (True, False):
        for mode in (nullcontext, torch.no_grad) if training else (torch.no_grad,):
            with mode():
                got = host.train(training)(input_ids=IDS).logits
                assert torch.equal(got, bare.train(training)(input_ids=IDS).logits), (training, mode)


@pytest.mark.parametrize("adapter", ["pissa", "offprincipal", "element"])
@pytest.mark.parametrize("kind", ["fp4", "nf4"])
def test_other_layouts_biases_and_storage(kind, adapter):
    options = {"family": "qwen2", "bnb_4bit_quant_storage": torch.bfloat16}
    bare, host = (quantized(kind, **options) for _ in range(2))
    host = get_peft_model(host, ADAPTERS[adapter]())
    assert torch.equal(logits(host), logits(bare))
    before = base_bytes(host)
    step(host)
    want = logits(host)
    assert not torch.equal(want, logits(bare))
    host.merge_adapter()
    # seen 5.0e-7
    assert relative_error(logits(host), want) < 1e-5
    host.unmerge_adapter()
    assert torch.equal(logits(host), want)
    assert_same_base(before, base_bytes(host))


@pytest.mark.parametrize("kind", KINDS)
def test_float_weight_is_bitsandbytes_dequantisation(kind):
    for layer in quantized_layers(quantized(kind)).values():
        # seen 0 for 4 bits, 4.5e-8 for int8, whose scales bitsandbytes multiplies by a rounded 1/127
        bar = 3e-7 if kind == "int8" else 0.0
        assert relative_error(float_weight(layer), by_bitsandbytes(layer)) <= bar
        nothing = torch.zeros(layer.out_features, layer.in_features)
        assert torch.equal(merged_copy(layer, nothing, torch.float32).weight, float_weight(layer))


@pytest.mark.parametrize("adapter", OFF)
@pytest.mark.parametrize("kind", KINDS)
def test_starts_and_bases_are_those_of_the_dequantised_weight(kind, adapter):
    got = adapter_tensors(get_peft_model(quantized(kind), ADAPTERS[adapter]()))
    want = adapter_tensors(get_peft_model(float_twin(kind), ADAPTERS[adapter]()))
    if kind != "int8":
        assert_same_tensors(got, want)
        return
    assert got.keys() == want.keys()
    for name, tensor in got.items():
        # seen 2.8e-6: of a singular vector, from values that differ in their last bit
        assert relative_error(tensor, want[name]) < 3e-5, name


@pytest.mark.parametrize("adapter", SPARSE)
@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_those_of_the_dequantised_weight(kind, adapter):
    got = packed_values(get_peft_model(quantized(kind), ADAPTERS[adapter]()))
    want = packed_values(get_peft_model(float_twin(kind), ADAPTERS[adapter]()))
    entries = [name for name in got if name.endswith(".entries")]
    assert entries and got.keys() == want.keys()
    for name in entries:
        assert torch.equal(got[name], want[name]), name


# -- the identity of a weight -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_identity_outlives_the_first_eval_forward(kind):
    model = quantized(kind)
    before = {name: identity(layer) for name, layer in quantized_layers(model).items()}
    assert len({bytes(value.tolist()) for value in before.values()}) == len(before)
    logits(model)
    logits(model.eval())
    if kind != "int8" and not is_repacked(model):
        pytest.skip("bitsandbytes does not reorder 4-bit weights on this CPU (no AVX512-BF16)")
    for name, layer in quantized_layers(model).items():
        assert torch.equal(identity(layer), before[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_identity_sees_other_codes_and_other_scales(kind):
    model, other = quantized(kind), quantized(kind, seed=1)
    for name, layer in quantized_layers(model).items():
        assert not torch.equal(identity(layer), identity(other.get_submodule(name))), name
    layer = model.model.layers[0].mlp.down_proj
    before = identity(layer)
    layer.weight.data.view(torch.uint8).view(-1)[7] ^= 1
    changed = identity(layer)
    assert not torch.equal(changed, before)
    layer.weight.data.view(torch.uint8).view(-1)[7] ^= 1
    assert torch.equal(identity(layer), before)
    if kind == "int8":
        layer.weight.SCB[3] *= 1.01
    else:
        layer.weight.quant_state.absmax[3] += 64 if kind == "nf4 double" else 1.0  # codes of a second quantisation
    assert not torch.equal(identity(layer), before)


# -- the quantised bytes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_quantised_bytes_never_change(kind, adapter):
    host = get_peft_model(quantized(kind), ADAPTERS[adapter]())
    logits(host)  # bitsandbytes moves int8 codes at the first forward
    before = base_bytes(host)
    scales = scales_of(host)
    step(host)
    with host.disable_adapter():
        logits(host)
    want = logits(host)
    for _ in range(20):
        host.merge_adapter()
        host.unmerge_adapter()
    assert torch.equal(logits(host), want)
    assert_same_base(before, base_bytes(host))
    assert_same_tensors(scales_of(host), scales)
    host.add_adapter("second", ADAPTERS[adapter]())
    host.set_adapter("second")
    step(host, 1)
    host.delete_adapter("second")
    host.set_adapter("default")
    assert torch.equal(logits(host), want)
    bare = host.unload()
    assert_same_base(before, base_bytes(bare))
    assert_same_tensors(scales_of(bare), scales)
    assert torch.equal(logits(bare), logits(quantized(kind)))
    assert getattr(bare.config, "quantization_config", None) is not None


def scales_of(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, layer in quantized_layers(model).items():
        plain = name.replace(".base_layer", "").removeprefix("base_model.model.")
        state = getattr(layer.weight, "quant_state", None)
        scales = state.absmax if state is not None else layer.state.SCB
        found[plain] = scales.detach().clone()
    return found


@pytest.mark.parametrize("adapter", ["pissa", "element"])
@pytest.mark.parametrize("kind", KINDS)
def test_saving_after_evaluation_leaves_the_base_as_it_was(kind, adapter, tmp_path):
    """bitsandbytes undoes its reordering when a state dict is made."""
    host = trained(kind, adapter)
    values = {name: float_weight(layer) for name, layer in quantized_layers(host).items()}
    want = logits(host.eval())
    host.save_pretrained(tmp_path)
    assert torch.equal(logits(host), want)
    for name, layer in quantized_layers(host).items():
        # seen 1.9e-3 (the scales of 4-bit layers are rounded to bf16 by the eval forward), 0 for int8
        assert relative_error(float_weight(layer), values[name]) < 4e-3, name
    host.load_adapter(tmp_path, "again")
    host.set_adapter("again")
    assert torch.equal(logits(host), want)


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_and_steps_are_those_of_the_float_twin(kind, adapter):
    host, twin = (get_peft_model(m, ADAPTERS[adapter]()) for m in (quantized(kind), float_twin(kind)))
    for model in (host, twin):
        step(model, 1)
    got, want = gradients(host), gradients(twin)
    assert got.keys() == want.keys()
    for name, gradient in got.items():
        # seen 4.6e-6
        assert relative_error(gradient, want[name]) < 5e-5, name
    for model in (host, twin):
        step(model, 4)
    # seen 3.9e-5
    assert relative_error(logits(host), logits(twin)) < 4e-4


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("adapter", ["lora", "pissa", "offprincipal", "element", "row"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_evaluation_leaves_gradients_as_they_were(kind, adapter, training):
    """bitsandbytes reorders 4-bit weights in a no-grad eval forward, and its backward reads them in the old order."""
    host = trained(kind, adapter)
    want = gradients(host.train(training))
    logits(host.eval())
    got = gradients(host.train(training))
    for name, gradient in want.items():
        # the scales may be rounded to bf16 by then
        assert relative_error(got[name], gradient) < 2e-2, name


@pytest.mark.parametrize("kind", KINDS)
def test_the_guarantee_holds_against_the_dequantised_weight(kind):
    host = get_peft_model(quantized(kind), config("offprincipal"))
    step(host, 10)
    bare = quantized(kind)
    for layer in off_layers(host):
        name = layer.geometry["default"].request.name
        U, S, Vh = torch.linalg.svd(by_bitsandbytes(bare.get_submodule(name)).double(), full_matrices=False)
        assert (S[4] - S[5]) / S[0] > 1e-4
        left, right = (f.detach().double() for f in layer.effective_factors("default"))
        delta = left @ right
        leaks = (U[:, :5].T @ delta).norm() / delta.norm(), (delta @ Vh[:5].T).norm() / delta.norm()
        # seen 2.8e-7
        assert max(leaks) < 2e-5, name


# -- saving and loading -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("adapter", ["pissa", "mica", "offprincipal", "element", "row"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_on_a_fresh_base(kind, adapter, low_cpu_mem_usage, tmp_path):
    host = trained(kind, adapter)
    want = logits(host)
    host.save_pretrained(tmp_path)
    base = quantized(kind)
    with no_new_mask() if adapter in SPARSE else no_decomposition():
        loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(logits(loaded.train()), want)
    step(PeftModel.from_pretrained(quantized(kind), tmp_path, is_trainable=True), 1)


@pytest.mark.parametrize("adapter", ["pissa", "element"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_auto_class(kind, adapter, tmp_path):
    host = trained(kind, adapter)
    host.peft_config["default"].base_model_name_or_path = str(folder())
    host.save_pretrained(tmp_path)
    loaded = AutoPeftModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=quantization_config(kind), device_map="cpu", dtype=torch.float32
    )
    assert quantized_layers(loaded)
    assert torch.equal(logits(loaded.train()), logits(host))


@pytest.mark.parametrize("other", ["seed", "kind", "float"])
@pytest.mark.parametrize("adapter", SPARSE)
def test_masks_of_another_base_are_refused(adapter, other, tmp_path):
    trained("nf4", adapter, steps=1).save_pretrained(tmp_path)
    base = {
        "seed": lambda: quantized("nf4", seed=1),
        "kind": lambda: quantized("int8"),
        "float": lambda: float_twin("nf4"),
    }[other]()
    with pytest.raises(ValueError, match="mask was made for a base weight with other bytes"):
        PeftModel.from_pretrained(base, tmp_path)


def packed_keys(state: dict[str, Tensor]) -> list[str]:
    return [key for key in state if ".princsparse_delta." in key]


@pytest.mark.parametrize("adapter", ["pissa", "element"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_goes_back_where_it_came_from(kind, adapter):
    """With `strict=False`: bitsandbytes' layers call their own scales unexpected. int8 ones refuse theirs after use."""
    host = trained(kind, adapter)
    want, state = logits(host), {key: value.clone() for key, value in host.state_dict().items()}
    if kind == "int8":
        state = {key: value for key, value in state.items() if ".base_layer." not in key}
    step(host, 1)
    assert not torch.equal(logits(host), want)
    host.load_state_dict(state, strict=False)
    assert torch.equal(logits(host), want)
    if adapter in SPARSE:
        other = trained(kind, adapter, steps=1, seed=1)
        want = logits(other)
        with pytest.raises(ValueError, match="base weight with other bytes"):
            other.load_state_dict({key: state[key] for key in packed_keys(state)}, strict=False)
        assert torch.equal(logits(other), want)


def test_configs_of_one_base_share_starts_and_masks():
    host = get_peft_model(quantized("nf4"), config("offprincipal"))
    with no_decomposition():
        host.add_adapter("second", config("offprincipal"))
    assert_same_tensors(adapter_tensors(host, "second"), adapter_tensors(host))
    host = get_peft_model(quantized("nf4"), sparse_config())
    with no_new_mask():
        host.add_adapter("second", sparse_config())
    assert_same_tensors(packed_values(host, "second"), packed_values(host))
