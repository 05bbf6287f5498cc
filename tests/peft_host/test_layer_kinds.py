"""Layers other than nn.Linear: adapted, or refused by name before the model is touched."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import GraniteMoeConfig, GraniteMoeForCausalLM, MixtralConfig, MixtralForCausalLM

from helpers import SPECIAL_TOKENS, base_bytes, tiny_gpt2
from lifecycle import logits, train
from peft_host.surface import COLUMNS, OURS, tiny

by_method = pytest.mark.parametrize("key", OURS)
LINEAR_ONLY = "adapts torch.nn.Linear and transformers' Conv1D layers"


class Net(nn.Module):
    """One layer of each kind that PEFT's LoRA takes, and one that it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.conv1d = nn.Conv1d(16, 16, 3)
        self.conv2d = nn.Conv2d(1, 4, 3)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.linear = nn.Linear(16, 8)
        self.bilinear = nn.Bilinear(8, 8, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        return self.linear(self.attention(x, x, x, need_weights=False)[0])


def adapted_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if hasattr(module, "base_layer")]


def assert_refused(model: nn.Module, config, *says: str) -> None:
    before, names = base_bytes(model), [name for name, _module in model.named_modules()]
    with pytest.raises((ValueError, TypeError)) as caught:
        get_peft_model(model, config)
    assert all(part in str(caught.value) for part in says), caught.value
    assert [name for name, _module in model.named_modules()] == names and base_bytes(model) == before


@by_method
@pytest.mark.parametrize(
    ("target", "kind"),
    [
        ("embedding", "Embedding"),
        ("conv1d", "Conv1d"),
        ("conv2d", "Conv2d"),
        ("attention", "MultiheadAttention"),
        ("bilinear", "Bilinear"),
    ],
)
def test_another_kind_of_layer_is_refused_by_name(key, target, kind):
    config = COLUMNS[key].config(task_type=None, target_modules=[target])
    assert_refused(Net(), config, f"{target} is a torch.nn.modules.", f".{kind};", LINEAR_ONLY, "exclude_modules")


@by_method
@pytest.mark.parametrize("targets", [["out_proj"], "all-linear"], ids=str)
def test_a_layer_inside_an_attention_module_is_refused_by_name(key, targets):
    """Its weight is read past any adapter; with "all-linear" too, rather than left without effect."""
    config = COLUMNS[key].config(task_type=None, target_modules=targets)
    assert_refused(Net(), config, "attention.out_proj lies in a torch.nn.MultiheadAttention", "exclude_modules")
    host = get_peft_model(Net(), COLUMNS[key].config(task_type=None, exclude_modules=["out_proj"]))
    assert adapted_names(host) == ["base_model.model.linear"]


@by_method
def test_conv1d_of_transformers_is_adapted(key):
    torch.manual_seed(0)
    host = get_peft_model(tiny_gpt2(hidden=32, layers=1), COLUMNS[key].config())
    train(host, 2)
    assert len(adapted_names(host)) == 4  # c_attn, c_proj, c_fc, c_proj
    assert not torch.equal(logits(host), logits(tiny_gpt2(hidden=32, layers=1)))


# -- tied weights -----------------------------------------------------------------------------------------------------


@by_method
def test_all_linear_leaves_the_output_layer_out(key):
    for tie in (False, True):
        host = get_peft_model(tiny(tie=tie), COLUMNS[key].config())
        assert not [name for name in adapted_names(host) if "lm_head" in name]


@by_method
def test_tied_embeddings(key):
    """Low-rank factors stand beside the shared weight; a sparse update would be in it, and in the embeddings."""
    config = COLUMNS[key].config(target_modules=["q_proj", "lm_head"])
    if COLUMNS[key].is_sparse:
        assert_refused(tiny(tie=True), config, "lm_head", "shared with model.embed_tokens.weight", "untie")
        return
    torch.manual_seed(0)
    host = get_peft_model(tiny(tie=True), config)
    train(host, 2)
    want = logits(host)
    with pytest.warns(UserWarning, match="tie_word_embeddings"):  # a merge is in the embeddings too, as with LoRA
        host.merge_adapter()
    host.unmerge_adapter()
    assert torch.equal(logits(host), want)
    assert_refused(tiny(tie=True), COLUMNS[key].config(target_modules=["embed_tokens"]), "Embedding", LINEAR_ONLY)


# -- experts ----------------------------------------------------------------------------------------------------------


def _moe(config_class: type, model_class: type) -> nn.Module:
    sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    return model_class(config_class(**sizes, **heads, **SPECIAL_TOKENS)).eval()


MOE = {
    "mixtral": lambda: _moe(MixtralConfig, MixtralForCausalLM),
    "granite": lambda: _moe(GraniteMoeConfig, GraniteMoeForCausalLM),
}
by_family = pytest.mark.parametrize("family", MOE)


def experts(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if ".experts." in name and p.dim() == 3}


@by_method
@by_family
def test_all_linear_adapts_the_attention_of_a_mixture_of_experts(key, family):
    """Fused experts are one parameter of three dimensions each, no linear layer; they and the router stay frozen."""
    model = MOE[family]()
    held, before = experts(model), base_bytes(model)
    assert len(held) == 2
    host = get_peft_model(model, COLUMNS[key].config())
    parts = [f"base_model.model.model.layers.0.self_attn.{part}_proj" for part in "qkvo"]
    assert adapted_names(host) == parts
    assert not any(p.requires_grad for p in experts(host).values())
    bare = MOE[family]()
    assert torch.equal(logits(host), logits(bare))
    train(host, 2)
    assert not torch.equal(logits(host), logits(bare))
    host.disable_adapter_layers()
    assert base_bytes(host) == before


@by_method
@by_family
def test_experts_are_refused_by_name(key, family):
    assert_refused(MOE[family](), COLUMNS[key].config(target_modules=["experts"]), "experts is a ", LINEAR_ONLY)
    router = "gate" if family == "mixtral" else "router"
    assert_refused(MOE[family](), COLUMNS[key].config(target_modules=[router]), f"{router} is a ", LINEAR_ONLY)
    with pytest.raises((ValueError, TypeError), match="target_parameters"):
        COLUMNS[key].config(target_parameters=["mlp.experts.gate_up_proj"])


@by_method
def test_experts_that_are_linear_layers_are_adapted(key):
    """A mixture whose experts are modules of their own is a model of linear layers."""

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(16, 2)
            self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weights = self.router(x).softmax(-1)
            return sum(weights[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))

    host = get_peft_model(Mixture(), COLUMNS[key].config(task_type=None, exclude_modules=["router"]))  # of rank 2
    assert adapted_names(host) == [f"base_model.model.experts.{i}" for i in range(2)]
    host(torch.randn(3, 16)).sum().backward()


# -- beside the adapted layers ----------------------------------------------------------------------------------------


@by_method
def test_modules_to_save_come_back(tmp_path, key):
    from peft import PeftModel

    host = COLUMNS[key].host(modules_to_save=["embed_tokens", "lm_head"])
    host.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny(), tmp_path)), logits(host))


@pytest.mark.parametrize("key", [key for key in OURS if not COLUMNS[key].is_sparse])
def test_single_tokens_beside_an_adapter(tmp_path, key):
    from peft import PeftModel

    host = COLUMNS[key].host(trainable_token_indices=[5, 7])
    host.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(), tmp_path)
    assert torch.equal(logits(loaded), logits(host))
    changed = (host.get_input_embeddings()(torch.arange(128)) != tiny().get_input_embeddings().weight).any(1)
    assert set(changed.nonzero().flatten().tolist()) <= {5, 7}
