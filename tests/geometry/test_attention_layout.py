"""Layouts of real models are found from the modules and from the names alone; what is not understood is refused."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, OlmoConfig, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from attention_models import COMMON, CONFIGS, GPT2, VOCAB, model_of, state_of
from offprincipal_peft.geometry import AttentionLayout, Intervention, find_layouts, haar_rotation

NUMBERS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
EXPECTED: dict[str, tuple[int, int, int]] = {  # query heads, key heads, head_dim
    "llama": (4, 2, 8),
    "llama, one head each, biases": (4, 4, 8),
    "llama, one key head": (4, 1, 8),
    "qwen2": (4, 2, 8),
    "qwen3": (4, 2, 8),
    "mistral, wide heads": (4, 2, 16),
    "gemma": (4, 1, 8),
    "gemma2": (4, 2, 16),
    "gemma3": (4, 2, 16),
    "gpt2": (4, 4, 8),
    "olmo2": (4, 2, 8),
    "phi3": (4, 2, 8),
    "gpt-oss, sinks": (4, 2, 8),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_and_its_state_dict_have_the_same_layouts(name: str) -> None:
    model = model_of(name)
    found = find_layouts(model)
    heads, kv_heads, head_dim = EXPECTED[name]
    assert [layout.layer for layout in found] == [0, 1]
    assert {(layout.n_heads, layout.n_kv_heads, layout.head_dim) for layout in found} == {EXPECTED[name]}
    shapes = {key: value.to("meta") for key, value in state_of(model).items()}
    options = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    assert find_layouts(shapes, **options) == found


def test_what_a_layout_names() -> None:
    first = find_layouts(model_of("gpt2"))[0]
    assert first == AttentionLayout(
        name="transformer.h.0.attn",
        n_heads=4,
        n_kv_heads=4,
        head_dim=8,
        query="transformer.h.0.attn.c_attn.weight",
        key="transformer.h.0.attn.c_attn.weight",
        value="transformer.h.0.attn.c_attn.weight",
        output="transformer.h.0.attn.c_proj.weight",
        query_bias="transformer.h.0.attn.c_attn.bias",
        key_bias="transformer.h.0.attn.c_attn.bias",
        value_bias="transformer.h.0.attn.c_attn.bias",
        output_bias="transformer.h.0.attn.c_proj.bias",
        fused=("q", "k", "v"),
        transposed=True,
        rotary=False,
    )
    qwen3, olmo2, gptoss = (find_layouts(model_of(name))[1] for name in ("qwen3", "olmo2", "gpt-oss, sinks"))
    assert (qwen3.norm_width, qwen3.query_norm) == ("head", "model.layers.1.self_attn.q_norm.weight")
    assert (olmo2.norm_width, olmo2.key_norm) == ("all", "model.layers.1.self_attn.k_norm.weight")
    assert gptoss.per_head == ("model.layers.1.self_attn.sinks",)
    assert gptoss.query_bias is not None
    assert (gptoss.rotary, gptoss.n_rep) == (True, 2)


def test_a_causal_mask_is_known_and_a_rotary_embedding_seen() -> None:
    block = "transformer.h.0.attn"
    tensors = {key: value for key, value in state_of(model_of("gpt2")).items() if key.startswith(f"{block}.")}
    masks = {f"{block}.bias": torch.ones(1, 1, 64, 64).tril().bool(), f"{block}.masked_bias": torch.tensor(-1e4)}
    (old,) = find_layouts(tensors | masks, num_attention_heads=4)  # as GPT-2 was saved for years
    assert not old.rotary
    (turning,) = find_layouts(tensors | {f"{block}.rotary_emb.inv_freq": torch.ones(4)}, num_attention_heads=4)
    assert turning.rotary
    with pytest.raises(ValueError, match="queries and keys pass a rotary embedding"):
        Intervention.rotate_queries_and_keys(turning, haar_rotation(8, 0))
    attention = nn.ModuleDict({name: Conv1D(size, 32) for name, size in (("c_attn", 96), ("c_proj", 32))})
    model = nn.ModuleDict({"attn": attention})
    for rotary in (False, True):  # a module without tensors
        if rotary:
            attention["rotary_emb"] = nn.Identity()
        assert find_layouts(model, num_attention_heads=4)[0].rotary == rotary


def test_a_block_alone_and_a_part_of_a_model() -> None:
    block = {key.removeprefix("model.layers.0.self_attn."): value for key, value in state_of(model_of("llama")).items()}
    alone = {key: value for key, value in block.items() if "_proj.weight" in key and "mlp" not in key}
    alone = {key: value for key, value in alone.items() if "." not in key.removesuffix(".weight")}
    (layout,) = find_layouts(alone, **NUMBERS)
    assert (layout.name, layout.layer, layout.query) == ("", None, "q_proj.weight")
    two = nn.ModuleDict({"text": model_of("llama"), "vision": Tower()})
    found = find_layouts(two, within="text")
    assert [each.name for each in found] == ["text.model.layers.0.self_attn", "text.model.layers.1.self_attn"]
    with pytest.raises(ValueError, match=r"vision\.attn: unknown layout \(qkv\)"):
        find_layouts(two)


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"qkv": nn.Linear(8, 24)})


# ---- refusals


def state(name: str = "llama", block: str = "model.layers.0.self_attn", **changes: Tensor | None) -> dict[str, Tensor]:
    """Of the first block, with tensors replaced, added or (None) left out; `__` stands for a dot."""
    found = {key: value for key, value in state_of(model_of(name, torch.float32)).items() if ".0." in key}
    for key, value in changes.items():
        path = f"{block}.{key.replace('__', '.')}"
        found = {k: v for k, v in found.items() if k != path} | ({} if value is None else {path: value})
    return found


REFUSED: dict[str, tuple[Callable[[], dict[str, Tensor]], str]] = {
    "latent": (
        lambda: state(kv_a_proj_with_mqa__weight=torch.zeros(8, 32)),
        r"self_attn: multi-head latent attention \(kv_a_proj_with_mqa\)",
    ),
    "half of the heads": (
        lambda: state(q_proj__weight=torch.zeros(16, 32)),
        r"q_proj\.weight: shape \(16, 32\), but 32 head channels on axis 0 .* tensor-parallel slice",
    ),
    "sliced output": (lambda: state(o_proj__weight=torch.zeros(32, 16)), r"o_proj\.weight: shape \(32, 16\), but 32"),
    "8-bit": (lambda: state(v_proj__weight=torch.zeros(16, 32, dtype=torch.int8)), r"v_proj.* stored as torch\.int8"),
    "fp8": (
        lambda: state(v_proj__weight=torch.zeros(16, 32, dtype=torch.float8_e4m3fn)),
        r"stored as torch\.float8_e4m3fn: a quantised weight",
    ),
    "GPTQ": (
        lambda: state(q_proj__weight=None, q_proj__qweight=torch.zeros(4, 32, dtype=torch.int32)),
        r"quantised: q_proj\.qweight",
    ),
    "compressed": (
        lambda: state(q_proj__weight=None, q_proj__weight_packed=torch.zeros(32, 4, dtype=torch.int32)),
        r"quantised: q_proj\.weight_packed",
    ),
    "scales": (lambda: state(k_proj__weight_scale_inv=torch.ones(1, 1)), r"quantised: k_proj\.weight_scale_inv"),
    "gate": (lambda: state(gate_proj__weight=torch.ones(4, 4)), r"unknown tensors gate_proj\.weight: they may not"),
    "a bias for each head": (
        lambda: state("gpt2", "transformer.h.0.attn", bias=torch.zeros(1, 4, 64, 64)),
        r"h\.0\.attn: unknown tensors bias: they may not commute",
    ),
    "a bias that is no mask": (lambda: state(bias=torch.zeros(4)), r"self_attn: unknown tensors bias: they may not"),
    "no output": (lambda: state(o_proj__weight=None), r"it has no o_proj\.weight"),
    "shared keys": (lambda: state(k_proj__weight=None, v_proj__weight=None), r"no k_proj\.weight, v_proj\.weight"),
    "norm": (
        lambda: state(q_norm__weight=torch.ones(4, 8), k_norm__weight=torch.ones(2, 8)),
        r"q_norm\.weight: shape \(4, 8\), but 32 head channels on axis 0 of 1",
    ),
    "sinks": (lambda: state(sinks=torch.ones(2)), r"sinks: shape \(2,\), but 4 head channels"),
    "subclass": (lambda: state(v_proj__weight=Packed(torch.zeros(16, 32))), "is a Packed: a quantised or distributed"),
    "c_attn of a linear layer": (
        lambda: {"h.c_attn.weight": torch.zeros(96, 32), "h.c_proj.weight": torch.zeros(32, 32)},
        r"c_attn\.weight \(96, 32\) is not \(d_in, 3 d_in\): .* write the AttentionLayout yourself",
    ),
    "cross attention": (
        lambda: {f"cross_attn.{n}_proj.weight": torch.zeros(32, 32) for n in "qkvo"},
        "cross_attn: cross attention: its keys and values are of another sequence",
    ),
    "fused per head": (
        lambda: {"a.query_key_value.weight": torch.zeros(96, 32)},
        r"unknown layout \(query_key_value\)",
    ),
    "heads that do not divide": (
        lambda: state(),
        "n_kv_heads must divide n_heads",
    ),
    "nothing": (lambda: {"lm_head.weight": torch.zeros(4, 4)}, r"no attention block under '' among 1 tensors: looked"),
}


class Packed(torch.Tensor):
    """A tensor subclass, as quantisers and tensor parallelism make them."""


@pytest.mark.parametrize("case", REFUSED)
def test_state_dicts_that_cannot_be_transformed_are_refused(case: str) -> None:
    tensors, message = REFUSED[case]
    kv_heads = 3 if case == "heads that do not divide" else 2
    with pytest.raises(ValueError, match=message):
        find_layouts(tensors(), num_attention_heads=4, num_key_value_heads=kv_heads)
    assert find_layouts(state(), **NUMBERS)


def test_numbers_must_be_known() -> None:
    with pytest.raises(ValueError, match="num_attention_heads is not known: give it as a number"):
        find_layouts(state())
    with pytest.raises(ValueError, match=r"k_proj\.weight: shape \(16, 32\), but 32"):  # as many as query heads
        find_layouts(state(), num_attention_heads=4)


def test_tied_tensors_are_refused() -> None:
    tensors = state()
    query = tensors["model.layers.0.self_attn.q_proj.weight"]
    for other in (query, query[4:6], query.T):
        with pytest.raises(ValueError, match=r"q_proj\.weight and lm_head\.weight share memory|lm_head.* and .*q_proj"):
            find_layouts(tensors | {"lm_head.weight": other}, **NUMBERS)
    flat = torch.zeros(64, 32)
    side_by_side = tensors | {
        "model.layers.0.self_attn.q_proj.weight": flat[:32],
        "model.layers.0.self_attn.o_proj.weight": flat[32:],
    }
    assert find_layouts(side_by_side, **NUMBERS)
    inside = {"flat": flat, "second": flat[1:2], "model.layers.0.self_attn.q_proj.weight": flat[32:]}
    with pytest.raises(ValueError, match=r"flat and model\.layers\.0\.self_attn\.q_proj\.weight share memory"):
        find_layouts(tensors | inside, **NUMBERS)  # `second` lies between the two
    model = model_of("llama")
    model.model.layers[1].self_attn.q_proj.weight = model.model.layers[0].self_attn.q_proj.weight
    with pytest.raises(ValueError, match="share memory"):
        find_layouts(model)


def config_of(kind: type[PreTrainedConfig], values: dict[str, Any]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        return AutoModelForCausalLM.from_config(kind(**values))


def test_models_that_cannot_be_transformed_are_refused() -> None:
    clipped = config_of(OlmoConfig, COMMON | {"clip_qkv": 8.0})
    with pytest.raises(ValueError, match=r"self_attn: clip_qkv = 8\.0: clipped values do not rotate"):
        find_layouts(clipped)
    with pytest.raises(ValueError, match=r"h\.0\.crossattention: cross attention"):
        find_layouts(config_of(GPT2Config, GPT2 | {"add_cross_attention": True, "vocab_size": VOCAB}))
    adapted = get_peft_model(model_of("llama"), LoraConfig(target_modules=["v_proj"]))
    with pytest.raises(ValueError, match=r"an adapter is on it \(v_proj\.base_layer\.weight"):
        find_layouts(adapted)
    model = model_of("llama")
    attention = model.model.layers[1].self_attn
    attention.v_norm = nn.LayerNorm(8, elementwise_affine=False)  # no tensor tells of it
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn: unknown modules v_norm: they may not commute"):
        find_layouts(model)
    del attention.v_norm
    attention.config = SimpleNamespace(**NUMBERS, num_kv_shared_layers=1)
    with pytest.raises(ValueError, match="other layers read this one's keys and values"):
        find_layouts(model)
    attention.config = SimpleNamespace(**NUMBERS, alibi=True)
    with pytest.raises(ValueError, match="ALiBi: every head has its own slope"):
        find_layouts(model)
    attention.config = SimpleNamespace(**NUMBERS)
    attention.is_cross_attention = True
    with pytest.raises(ValueError, match="cross attention"):
        find_layouts(model)


def test_layouts_that_contradict_themselves_are_refused() -> None:
    layout = find_layouts(model_of("llama"))[0]
    for change, message in [
        ({"n_kv_heads": 3}, "n_kv_heads must divide n_heads"),
        ({"fused": ("q", "k", "v")}, "which share one tensor"),
        ({"key": layout.query}, "four tensors where they are not fused"),
        ({"norm_width": "head"}, "must be given with the norms, and only then"),
        ({"query_norm": "a"}, "must be given with the norms, and only then"),
    ]:
        with pytest.raises(ValueError, match=message):
            replace(layout, **change)
