"""One configuration object for several models, and copies of it, start where a fresh one does."""

import dataclasses

import pytest
import torch
from peft import get_peft_model

from helpers import tiny_gpt2, tiny_llama, token_batch
from offprincipal_peft import OffPrincipalLoraConfig


def first_logits_agree(make, config: OffPrincipalLoraConfig) -> bool:
    ids = token_batch(128)
    base = make()
    expected = base(input_ids=ids).logits
    return torch.equal(get_peft_model(base, config)(input_ids=ids).logits, expected)


@pytest.mark.parametrize("targets", [r".*\.(q_proj|gate_proj|c_attn|c_fc)", "all-linear"])
def test_one_config_serves_two_architectures(targets):
    config = OffPrincipalLoraConfig.preset("pissa", r=4, target_modules=targets, task_type="CAUSAL_LM")
    for make in (tiny_llama, tiny_gpt2, tiny_llama):  # nn.Linear, Conv1D, nn.Linear
        assert first_logits_agree(make, config)


def test_one_config_serves_two_models_of_one_architecture():
    config = OffPrincipalLoraConfig.preset("offprincipal", r=4, task_type="CAUSAL_LM")
    starts = []
    for seed in (0, 1):
        model = get_peft_model(tiny_llama(seed=seed), config)
        starts.append({n: p.detach() for n, p in model.named_parameters() if "lora_A" in n})
    assert starts[0].keys() == starts[1].keys()
    assert not any(torch.equal(starts[0][n], starts[1][n]) for n in starts[0])
    again = get_peft_model(tiny_llama(seed=0), config)
    assert all(torch.equal(p, starts[0][n]) for n, p in again.named_parameters() if n in starts[0])


def test_a_later_change_of_the_config_does_not_reach_a_model():
    config = OffPrincipalLoraConfig.preset("pissa", r=4, task_type="CAUSAL_LM")
    ids = token_batch(128)
    model = get_peft_model(tiny_llama(), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data *= 1.1
    before = model(input_ids=ids).logits
    config.train_factors, config.projection, config.init_factors = "B", "both", "A"
    assert torch.equal(model(input_ids=ids).logits, before)


REBUILT = {
    "replace": dataclasses.replace,
    "from its dict": lambda config: OffPrincipalLoraConfig(**config.to_dict()),
}


def adapter_values(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


@pytest.mark.parametrize("rebuild", REBUILT)
@pytest.mark.parametrize("used", [False, True], ids=["at once", "after a forward"])
def test_a_rebuilt_config_starts_at_the_same_place(rebuild, used):
    config = OffPrincipalLoraConfig.preset("pissa", r=4, task_type="CAUSAL_LM")
    ids = token_batch(128)
    values = []
    for each in (config, REBUILT[rebuild](config)):
        model = get_peft_model(tiny_llama(), each)
        if used:
            model(input_ids=ids)
        values.append(adapter_values(model))
    assert values[0].keys() == values[1].keys()
    assert all(torch.equal(values[0][n], values[1][n]) for n in values[0])
