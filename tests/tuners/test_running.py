"""Running an adapted model: checkpointing, autocast, compilation, casts, dropout, copies."""

import copy
import io

import pytest
import torch
from peft import get_peft_model
from torch import nn

from helpers import assert_same_base, base_bytes, relative_error
from lifecycle import (
    DTYPES,
    FAMILIES,
    IDS,
    PRESETS,
    adapted,
    adapter_tensors,
    assert_same_tensors,
    config,
    count_folds,
    gradients,
    logits,
    off_layers,
    optimizer,
    tiny,
    train,
    trainable,
    update_as_written,
)
from offprincipal_peft import OffPrincipalLoraConfig

# One preset for each shape of forward: the raw factors, the difference to two starts, the projection.
FORWARDS = ("rlmo", "geora", "offprincipal")


# -- training ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("preset", PRESETS)
def test_two_equal_trainings_give_equal_bytes(preset, dtype):
    first, second = (adapted(preset, dtype=dtype, lora_dropout=0.1) for _ in range(2))
    for host in (first, second):
        torch.manual_seed(5)
        train(host, 3)
    assert_same_tensors(adapter_tensors(second), adapter_tensors(first))
    assert_same_base(base_bytes(first), base_bytes(second))


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("preset", FORWARDS)
def test_gradient_checkpointing_gives_the_same_gradients(preset, family, reentrant):
    host = adapted(preset, family)
    train(host, 1)
    host.train()
    want = gradients(host)
    host.enable_input_require_grads()
    host.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    calls = count_folds(host)
    assert_same_tensors(gradients(host), want)
    if preset != "rlmo":
        assert set(calls.values()) == {2}  # folded again when the layer is computed again


@pytest.mark.parametrize("base_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("preset", FORWARDS)
def test_a_training_step_under_bf16_autocast(preset, base_dtype):
    host = adapted(preset, dtype=base_dtype)
    host.train()
    with torch.autocast("cpu", torch.bfloat16):
        zero = host(input_ids=IDS).logits
        with host.disable_adapter():
            assert torch.equal(host(input_ids=IDS).logits, zero)  # still exactly zero at the start
        loss = host(input_ids=IDS, labels=IDS).loss
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in trainable(host).values())
    optimizer(host).step()
    with torch.autocast("cpu", torch.bfloat16):
        after = host(input_ids=IDS, labels=IDS).loss
    assert after < loss


@pytest.mark.parametrize("preset", FORWARDS)
def test_autocast_does_not_reach_the_update_as_a_matrix(preset):
    host = adapted(preset)
    train(host, 1)
    for layer in off_layers(host):
        want = layer.get_delta_weight("default")
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer.get_delta_weight("default"), want)


@pytest.mark.parametrize("preset", PRESETS)
def test_autocast_does_not_reach_a_start(preset, tmp_path):
    """Neither one that is made under autocast nor one that was postponed to the first training step."""
    want = adapter_tensors(adapted(preset))
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_tensors(adapter_tensors(adapted(preset)), want)
    adapted(preset).save_pretrained(tmp_path)
    host = get_peft_model(tiny(), OffPrincipalLoraConfig.from_pretrained(tmp_path))
    with torch.autocast("cpu", torch.bfloat16):
        host(input_ids=IDS)
    assert_same_tensors(adapter_tensors(host), want)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("preset", FORWARDS)
def test_a_compiled_layer_is_one_graph_with_the_same_values(preset, backend):
    host = adapted(preset)
    train(host, 1)
    layer = off_layers(host)[0].train()
    x = torch.randn(3, layer.in_features)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    found = {}
    for name, module in (("eager", layer), ("compiled", compiled)):
        out = module(x)
        out.square().sum().backward()
        found[name] = {"out": out.detach()} | {n: p.grad.clone() for n, p in trainable(layer).items()}
        layer.zero_grad()
    for name, tensor in found["eager"].items():
        torch.testing.assert_close(found["compiled"][name], tensor)  # observed: equal bits


@pytest.mark.slow
def test_a_compiled_model_trains_and_runs_without_gradients():
    base = tiny(layers=1)
    untouched = logits(base)
    host = get_peft_model(base, config())
    train(host, 1)
    want, gradient = logits(host), gradients(host)
    torch._dynamo.reset()
    compiled = torch.compile(host, backend="aot_eager")
    compiled(input_ids=IDS, labels=IDS).loss.backward()
    for name, p in trainable(host).items():
        torch.testing.assert_close(p.grad, gradient[name], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(logits(compiled), want, rtol=1e-5, atol=1e-5)
    for layer in off_layers(host):
        layer.lora_B["default"].weight.data.zero_()
    torch.testing.assert_close(logits(compiled), untouched, rtol=1e-5, atol=1e-5)


# -- casts and copies -------------------------------------------------------------------------------------------


CASTS = {
    "bfloat16": lambda host: host.to(torch.bfloat16),
    "half": lambda host: host.half(),
    "double": lambda host: host.double(),
    "there and back": lambda host: host.bfloat16().float(),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("preset", PRESETS)
def test_casting_the_whole_model_keeps_the_bases(preset, cast):
    host = adapted(preset)
    train(host, 1)
    before = {n: t for n, t in adapter_tensors(host).items() if "lora_basis_" in n}
    CASTS[cast](host)
    bases = {n: t for n, t in adapter_tensors(host).items() if "lora_basis_" in n}
    assert_same_tensors(bases, before)
    assert bool(bases) == (preset == "offprincipal")
    for basis in bases.values():
        gram = basis.double().T @ basis.double()
        assert (gram - torch.eye(len(gram))).abs().max() < 1e-6  # observed: 4e-8; rounded to bf16: 1.6e-3
    assert torch.isfinite(logits(host)).all()
    gradients(host)


@pytest.mark.parametrize("preset", FORWARDS)
def test_a_fresh_adapter_that_is_cast_is_still_exactly_zero(preset):
    host = adapted(preset).bfloat16()
    assert torch.equal(logits(host), logits(tiny().bfloat16()))


@pytest.mark.parametrize("preset", FORWARDS)
def test_a_deep_copy_is_its_own_model(preset):
    host = adapted(preset)
    train(host, 1)
    twin = copy.deepcopy(host)
    want = logits(host)
    assert torch.equal(logits(twin), want)
    assert {id(layer.scope) for layer in off_layers(twin)} == {id(twin.base_model.scope)}
    assert twin.base_model.scope is not host.base_model.scope
    with host.base_model.reuse_projected_factors():
        logits(host)
        train(twin, 1)
        assert not torch.equal(logits(twin), want)
        assert torch.equal(logits(host), want)


@pytest.mark.parametrize("preset", FORWARDS)
def test_a_state_dict_goes_through_torch_save(preset):
    host = adapted(preset)
    train(host, 2)
    buffer = io.BytesIO()
    torch.save(host.state_dict(), buffer)
    buffer.seek(0)
    fresh = adapted(preset)
    assert not torch.equal(logits(fresh), logits(host))
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert_same_tensors(adapter_tensors(fresh), adapter_tensors(host))
    assert torch.equal(logits(fresh), logits(host))


# -- dropout ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("preset", FORWARDS)
def test_one_dropout_sample_serves_the_whole_update(preset, family):
    """With two samples the parts of a difference would not cancel where they are meant to."""
    p = 0.4
    host = adapted(preset, family, lora_dropout=p)
    train(host, 1)
    layer = off_layers(host)[0].train()
    x = torch.randn(5, layer.in_features)
    torch.manual_seed(3)
    out = layer(x)
    torch.manual_seed(3)
    dropped = nn.functional.dropout(x, p)
    want = layer.get_base_layer()(x) + dropped @ update_as_written(layer).T
    torch.testing.assert_close(out, want.float(), rtol=1e-5, atol=1e-6)
    torch.manual_seed(4)
    assert not torch.allclose(layer(x), out, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("preset", PRESETS)
def test_the_update_is_the_formula(preset, family):
    host = adapted(preset, family)
    train(host, 2)
    for layer in off_layers(host):
        delta = layer.get_delta_weight("default")
        delta = delta.T if family == "gpt2" else delta
        assert relative_error(delta, update_as_written(layer)) < 1e-6  # observed: 1.3e-7
