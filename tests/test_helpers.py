"""The helpers' own promises, each with the broken case that must be caught."""

import os
import socket

import pytest
import torch
from peft import LoraConfig, get_peft_model

from helpers import (
    LOWEST_TOLERANCES,
    assert_same_base,
    base_bytes,
    relative_error,
    tiny_gpt2,
    tiny_llama,
    tiny_qwen2,
    token_batch,
    tolerances,
)
from loopback import is_loopback

MODELS = {"llama": tiny_llama, "qwen2": tiny_qwen2, "gpt2": tiny_gpt2}


@pytest.mark.parametrize("name", MODELS)
def test_models_are_deterministic_and_usable(name):
    first, second, other = MODELS[name](), MODELS[name](), MODELS[name](seed=1)
    assert_same_base(base_bytes(first), base_bytes(second))
    with pytest.raises(AssertionError, match="changed"):
        assert_same_base(base_bytes(first), base_bytes(other))
    assert not first.training
    logits = first(token_batch(128)).logits
    assert logits.shape == (2, 12, 128)
    assert torch.isfinite(logits).all()
    assert logits.std() > 0.1  # observed 0.38 (gpt2) to 0.40 (llama)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tie", [False, True])
def test_tied_heads_are_the_same_parameter(name, tie):
    model = MODELS[name](tie=tie)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tie


@pytest.mark.parametrize("name", MODELS)
def test_bf16_model_is_the_rounding_of_the_fp32_model(name):
    full, half = MODELS[name](), MODELS[name](dtype=torch.bfloat16)
    for (path, a), (_, b) in zip(full.named_parameters(), half.named_parameters(), strict=True):
        assert b.dtype == torch.bfloat16, path
        assert torch.equal(a.to(torch.bfloat16), b), path
    assert all(buffer.dtype != torch.bfloat16 for buffer in half.buffers())


@pytest.mark.parametrize("name", MODELS)
def test_spectra_are_not_degenerate(name):
    for path, weight in MODELS[name]().named_parameters():
        if weight.ndim == 2:
            values = torch.linalg.svdvals(weight.double())
            assert ((values[:-1] - values[1:]) / values[0]).min() > 1e-5, path  # observed 4.2e-4


def test_building_a_model_leaves_the_global_random_state():
    before = torch.get_rng_state()
    tiny_llama()
    assert torch.equal(before, torch.get_rng_state())


def test_token_batch():
    tokens = token_batch(128, batch=3, length=5)
    assert tokens.shape == (3, 5)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, token_batch(128, batch=3, length=5))
    assert not torch.equal(tokens, token_batch(128, batch=3, length=5, seed=1))
    assert tokens.min() >= 3
    assert tokens.max() < 128


def _random_lora(model):
    transposed = model.config.model_type == "gpt2"
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False, fan_in_fan_out=transposed)
    return get_peft_model(model, config)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tie", [False, True])
def test_base_bytes_survive_an_adapter(name, tie):
    model = MODELS[name](tie=tie)
    before = base_bytes(model)
    assert "lm_head.weight" in before
    adapted = _random_lora(model)
    assert_same_base(before, base_bytes(adapted))
    assert_same_base(before, base_bytes(adapted.unload()))


def test_base_bytes_look_through_modules_to_save():
    model = tiny_llama()
    before = base_bytes(model)
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert_same_base(before, base_bytes(get_peft_model(model, config)))


def test_a_merge_is_seen():
    model = tiny_llama()
    before = base_bytes(model)
    adapted = _random_lora(model)
    adapted.merge_adapter()
    with pytest.raises(AssertionError, match=r"changed: .*layers\.0\.mlp\.down_proj\.weight"):
        assert_same_base(before, base_bytes(adapted))


def test_one_flipped_bit_is_seen():
    model = tiny_llama()
    before = base_bytes(model)
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data.view(torch.int32)[3, 4] ^= 1
    with pytest.raises(AssertionError, match=r"differ: changed: model\.layers\.1\.mlp\.up_proj\.weight$"):
        assert_same_base(before, base_bytes(model))


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [({}, {}, "nothing"), ({"a": "1"}, {}, "gone: a"), ({"a": "1"}, {"a": "1", "b": "2"}, "new: b")],
)
def test_missing_and_added_tensors_are_named(before, after, message):
    with pytest.raises(AssertionError, match=message):
        assert_same_base(before, after)


def test_negative_zero_dtype_and_shape_count():
    module = torch.nn.Module()
    seen = set()
    for tensor in (torch.zeros(4), -torch.zeros(4), torch.zeros(4, dtype=torch.int32), torch.zeros(2, 2)):
        module.register_buffer("x", tensor)
        seen.add(base_bytes(module)["x"])
    assert len(seen) == 4


def test_tolerances():
    assert tolerances(torch.float32) == {"rtol": 2.0**-23, "atol": 2.0**-23}
    assert tolerances(torch.bfloat16, ulps=2, scale=8) == {"rtol": 2.0**-6, "atol": 2.0**-3}
    assert LOWEST_TOLERANCES[torch.float64] < LOWEST_TOLERANCES[torch.float32]


def test_relative_error():
    assert relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)
    assert relative_error(torch.tensor([0.5]), torch.zeros(1)) == 0.5
    with pytest.raises(ValueError, match="shapes differ"):
        relative_error(torch.zeros(2), torch.zeros(1, 2))


def test_the_network_is_refused():
    with socket.socket() as connection, pytest.raises(RuntimeError, match="reach the network"):
        connection.connect(("192.0.2.1", 80))
    with socket.socket() as connection, pytest.raises(RuntimeError, match="reach the network"):
        connection.connect_ex(("example.org", 80))


def test_the_own_machine_is_reachable():
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()[:2], timeout=5).close()


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("/tmp/socket", True),
        (("127.3.2.1", 1), True),
        (("::1", 1, 0, 0), True),
        (("localhost", 1), True),
        (("10.0.0.1", 1), False),
        (("fe80::1%eth0", 1, 0, 0), False),
        (("localhost.example.org", 1), False),
    ],
)
def test_loopback(address, expected):
    assert is_loopback(address) == expected


def test_the_cache_variable_is_gone():
    assert "OFFPRINCIPAL_CACHE" not in os.environ


def test_torch_is_seeded():
    assert torch.initial_seed() == 0
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(0)))
