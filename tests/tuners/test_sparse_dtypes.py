"""The dtypes a sparse adapter meets: a base in another one is named, an update that someone cast is fp32 again."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import BertConfig, BertForTokenClassification

from lifecycle import logits, tiny, train
from offprincipal_peft import OffPrincipalLoraConfig, PrincipalSparseConfig
from sparse_models import deltas, sparse_config

PAIRS = [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize(("trained", "loaded"), PAIRS, ids=["trained in bf16", "trained in fp32"])
def test_a_base_in_another_dtype_is_named(trained, loaded, tmp_path):
    """The same checkpoint, stored in bf16, loaded in one dtype to train and in another to use."""
    host = get_peft_model(tiny(dtype=torch.bfloat16).to(trained), sparse_config())
    train(host, 1)
    host.save_pretrained(tmp_path)
    other = tiny(dtype=torch.bfloat16).to(loaded)
    with pytest.raises(ValueError, match=rf"This one is {loaded}; it was trained on it in {trained}: load it so\."):
        PeftModel.from_pretrained(other, tmp_path)
    again = PeftModel.from_pretrained(tiny(dtype=torch.bfloat16).to(trained), tmp_path)
    assert torch.equal(logits(again), logits(host))


def test_other_weights_get_no_such_hint(tmp_path):
    get_peft_model(tiny(), sparse_config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="other bytes") as refused:
        PeftModel.from_pretrained(tiny(seed=1), tmp_path)
    assert "This one is" not in str(refused.value)


def test_an_update_that_was_cast_is_fp32_again():
    """As TRL casts what trains on a quantised base; steps of lr 1e-6 would stop at 2^-9 of a bf16 update."""
    host, twin = get_peft_model(tiny(), sparse_config()), get_peft_model(tiny(), sparse_config())
    for parameter in host.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    train(host, 3)
    train(twin, 3)
    for mine, other in zip(deltas(host).values(), deltas(twin).values(), strict=True):
        assert mine.weight.dtype == torch.float32 and torch.equal(mine.weight, other.weight)


@pytest.mark.parametrize(
    "config",
    [OffPrincipalLoraConfig(r=4, target_modules=["classifier"], task_type="TOKEN_CLS"),
     PrincipalSparseConfig(target_modules=["query", "classifier"], task_type="TOKEN_CLS")],
    ids=["off-principal", "sparse"],
)  # fmt: skip
def test_a_head_that_is_trained_whole_carries_no_adapter(config):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    model = BertForTokenClassification(BertConfig(**sizes, vocab_size=50))
    with pytest.raises(ValueError, match="classifier is trained and saved whole for task_type='TOKEN_CLS'"):
        get_peft_model(model, config)
    assert not any("Sparse" in type(m).__name__ or "OffPrincipal" in type(m).__name__ for m in model.modules())
