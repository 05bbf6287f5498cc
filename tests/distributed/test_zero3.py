"""DeepSpeed ZeRO-3 is refused with an error that names it.

DeepSpeed is not run here. What its source does to a parameter is faked: ``ds_id``, ``ds_shape``, ``ds_tensor`` (this
rank's part) and an empty tensor as data, until a call of the owning module gathers it. A fake cannot show that training
works, so the tests show only that nothing computes with placeholders.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from peft import PeftConfig, get_peft_model
from torch import nn

from distributed.cases import CASES, batches
from lifecycle import config
from sparse_models import sparse_config

METHODS = {"projected": lambda: config("offprincipal"), "lora": lambda: config("lora"), "packed": sparse_config}


def partition(module: nn.Module) -> None:
    """As ``zero.Init`` and ``deepspeed.initialize`` leave every parameter between calls."""
    for number, parameter in enumerate(module.parameters()):
        parameter.ds_id, parameter.ds_shape = number, parameter.shape
        parameter.ds_tensor = parameter.data.flatten().chunk(2)[0].clone()
        parameter.data = torch.empty(0, dtype=parameter.dtype)


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """As ``deepspeed.zero.GatheredParameters``: the values are there, and gone afterwards, whatever was written."""
    whole = [torch.zeros(parameter.ds_shape, dtype=parameter.dtype) for parameter in module.parameters()]
    for parameter, values in zip(module.parameters(), whole, strict=True):
        parameter.data = values
    yield
    for parameter in module.parameters():
        parameter.data = torch.empty(0, dtype=parameter.dtype)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("within", [False, True], ids=["partitioned", "gathered"])
def test_an_adapter_on_a_partitioned_model_is_refused(method: str, within: bool) -> None:
    model = CASES["packed"].base()
    partition(model)
    adapter: PeftConfig = METHODS[method]()
    before = {name: id(module) for name, module in model.named_modules()}
    message = r"q_proj: DeepSpeed ZeRO-3 partitions the weight \(ds_id \d+, whole shape \(32, 32\)\).*Use FSDP2 or DDP"
    with pytest.raises(ValueError, match=message):
        if within:
            with gathered(model):
                get_peft_model(model, adapter)
        else:
            get_peft_model(model, adapter)
    assert {name: id(module) for name, module in model.named_modules()} == before


@pytest.mark.parametrize(("name", "what"), [("projected", "the adapter's factors"), ("packed", "the base weight")])
def test_a_forward_does_not_compute_with_placeholders(name: str, what: str) -> None:
    host = CASES[name].adapted()
    layer = next(module for path, module in host.named_modules() if path.endswith("layers.0.self_attn.q_proj"))
    kept = layer.get_base_layer().weight.data.clone()
    partition(layer)
    layer.get_base_layer().weight.data = kept  # the base layer's own call gathers it
    with pytest.raises(RuntimeError, match=f"q_proj: DeepSpeed ZeRO-3 partitions {what}"):
        host(input_ids=batches()[0])
    assert torch.equal(layer.get_base_layer().weight, kept)


def test_a_merge_does_not_write_a_gathered_weight() -> None:
    host = CASES["packed"].adapted()
    layer = next(module for path, module in host.named_modules() if path.endswith("layers.0.self_attn.q_proj"))
    partition(layer.get_base_layer())
    with gathered(layer.get_base_layer()), pytest.raises(RuntimeError, match="ZeRO-3 partitions the base weight"):
        layer.merge()
    assert layer.merged_adapters == []
