"""`inject_adapter_in_model` without a PeftModel: no forward scope is ever opened, and the results are the same."""

import pytest
import torch
from peft import PeftConfig, functional, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict

from helpers import assert_same_base, base_bytes, token_batch
from lifecycle import logits, no_decomposition, train, trainable
from peft_host.surface import COLUMNS, EVERY, OURS, tiny
from sparse_models import no_new_mask

by_method = pytest.mark.parametrize("key", EVERY)


def injected(key: str, steps: int = 0, **overrides):
    torch.manual_seed(0)
    model = inject_adapter_in_model(COLUMNS[key].config(**overrides), tiny())
    if steps:
        train(model, steps)
    return model


@by_method
def test_training_is_that_of_a_peft_model(key):
    model, host = injected(key, 3), COLUMNS[key].host(3)
    assert set(trainable(model)) == {n.removeprefix("base_model.model.") for n in trainable(host)}
    assert torch.equal(logits(model), logits(host))
    assert not torch.equal(logits(model), logits(tiny()))


@pytest.mark.parametrize("key", OURS)
def test_a_write_to_a_parameter_is_seen_by_the_next_forward(key):
    """A trainer may write parameters in ways that leave no trace; nothing here may be remembered between forwards."""
    model = injected(key, 2)
    before = logits(model)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.data.mul_(0.5)
    after = logits(model)
    assert not torch.equal(before, after)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.data.mul_(2.0)
    assert torch.equal(logits(model), before)


@by_method
def test_generating_is_greedy_by_hand(key):
    model = injected(key, 3)
    ids = token_batch(128, batch=1, length=4)
    tokens = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    for _step in range(3):
        ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(tokens, ids)


@pytest.mark.parametrize("low", [False, True], ids=["filled", "empty"])
@by_method
def test_a_state_dict_comes_back(tmp_path, key, low):
    model = injected(key, 2)
    values = get_peft_model_state_dict(model)
    COLUMNS[key].config().save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)  # read from a file: its values are about to come
    with no_decomposition(), no_new_mask():
        other = inject_adapter_in_model(config, tiny(), low_cpu_mem_usage=low, state_dict=values)
        result = set_peft_model_state_dict(other, values, low_cpu_mem_usage=low)
        assert not result.unexpected_keys and not any(p.is_meta for p in other.parameters())
        torch.testing.assert_close(logits(other), logits(model), rtol=1e-5, atol=1e-6)  # 0.0 seen
    assert set(trainable(other)) == set(trainable(model))
    train(model, 2)
    train(other, 2)
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-4, atol=1e-5)  # 0.0 seen


@pytest.mark.parametrize("key", OURS)
def test_a_state_dict_names_the_layers(key):
    values = get_peft_model_state_dict(injected(key, 1, target_modules=["q_proj"]))
    other = inject_adapter_in_model(COLUMNS[key].config(target_modules="all-linear"), tiny(), state_dict=values)
    adapted = [name for name, module in other.named_modules() if hasattr(module, "base_layer")]
    assert adapted == ["model.layers.0.self_attn.q_proj"]


@by_method
def test_a_second_adapter_beside_the_first(key):
    model = injected(key, 2)
    want = logits(model)
    inject_adapter_in_model(COLUMNS[key].config(), model, adapter_name="two")  # which activates it
    assert torch.equal(logits(model), logits(tiny()))
    functional.set_adapter(model, "default")
    assert torch.equal(logits(model), want)
    names = {name for name, _p in model.named_parameters() if ".two." in name}
    assert names == {name.replace(".default.", ".two.") for name, _p in model.named_parameters() if ".default." in name}


@pytest.mark.parametrize("key", OURS)
def test_a_model_that_is_not_of_transformers(key):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.ReLU(), torch.nn.Linear(40, 24)).requires_grad_(False)
    before, x = base_bytes(net), torch.randn(5, 24)
    want = net(x)
    inject_adapter_in_model(COLUMNS[key].config(task_type=None, target_modules=["0", "2"]), net)
    assert torch.equal(net(x), want)
    by = torch.optim.AdamW(trainable(net).values(), lr=1e-2)
    losses = []
    for _step in range(5):
        loss = (net(x) - x).square().mean()
        loss.backward()
        by.step()
        by.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for layer in net.modules():
        if hasattr(layer, "base_layer"):
            layer.enable_adapters(False)
    assert torch.equal(net(x), want)
    assert_same_base(before, base_bytes(net))
