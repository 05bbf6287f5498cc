"""A layer that cannot carry the adapter is refused by name, with its shape and the option, and nothing was changed."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from helpers import assert_same_base, base_bytes, tiny_gpt2, tiny_llama, token_batch
from offprincipal_peft import OffPrincipalLoraConfig
from offprincipal_peft.tuners.offprincipal_lora.presets import PRESETS


class Zoo(nn.Module):
    """One good layer and, after it, many that are hard to adapt."""

    def __init__(self) -> None:
        super().__init__()
        self.good = nn.Linear(24, 24)
        self.tall = nn.Linear(12, 20)  # weight 20 x 12
        self.wide = nn.Linear(20, 12)
        self.transposed = Conv1D(12, 20)
        self.table = nn.Embedding(10, 24)
        self.image = nn.Conv2d(3, 24, 3)
        self.attention = nn.MultiheadAttention(24, 4)
        self.broken = nn.Linear(24, 16)
        self.infinite = nn.Linear(24, 16)
        self.zero = nn.Linear(24, 16)
        self.flat = nn.Linear(24, 16)
        self.meta = nn.Linear(24, 16, device="meta")
        self.broken.weight.data[3, 4] = torch.nan
        self.infinite.weight.data[1, 2] = -torch.inf
        self.zero.weight.data.zero_()
        self.flat.weight = nn.Parameter(torch.zeros(16, 24, dtype=torch.int8), requires_grad=False)


def state_of(model: nn.Module) -> tuple[dict[str, str], list[tuple[str, type]], dict[str, bool], set[str]]:
    values = {n: t for n, t in model.named_parameters() if not t.is_meta}
    return (
        base_bytes(nn.ParameterDict({n.replace(".", "_"): p for n, p in values.items()})),
        [(name, type(module)) for name, module in model.named_modules()],
        {n: p.requires_grad for n, p in model.named_parameters()},
        set(vars(model)),
    )


def refuse(model: nn.Module, preset: str, *words: str, **options) -> str:
    """The message with which the adapter is refused; `words` are in it and the model is as it was."""
    before = state_of(model)
    config = OffPrincipalLoraConfig.preset(preset, **{"r": 4, **options})
    with pytest.raises(ValueError) as caught:
        get_peft_model(model, config)
    message = str(caught.value)
    for word in words:
        assert word in message, message
    after = state_of(model)
    assert_same_base(before[0], after[0])
    assert before[1:] == after[1:]
    return message


PROJECTED = {"projection": "both", "init_subspace": "random", "init_factors": "A", "init_scale": "unit"}
SIZES = {
    "k too large": (
        "rlmo",
        ["tall (weight 20 x 12)", "principal_rank", "k = 12", "min(weight.shape) = 12"],
        {"target_modules": ["good", "tall"], "principal_rank": 12, **PROJECTED},
    ),
    "k too large, Conv1D": (
        "rlmo",
        ["transposed (weight 12 x 20)", "principal_rank", "k = 15", "= 12"],
        {"target_modules": ["good", "transposed"], "principal_rank": 15, **PROJECTED},
    ),
    "paired top, r too large": (
        "pissa",
        ["tall (weight 20 x 12)", "init_subspace='top'", "r = 13", "min(weight.shape) is 12", "rank_pattern"],
        {"target_modules": ["good", "tall"], "r": 13},
    ),
    "top, r too large": (
        "rlpo",
        ["wide (weight 12 x 20)", "init_subspace='top'", "init_factors='A'", "r = 13", "min(weight.shape) is 12"],
        {"target_modules": ["good", "wide"], "r": 13},
    ),
    "paired bottom, r too large": (
        "milora",
        ["wide (weight 12 x 20)", "init_subspace='bottom'", "init_factors='both'", "r = 13", "is 12"],
        {"target_modules": ["good", "wide"], "r": 13},
    ),
    "bottom A, r too large": (
        "rlmo",
        ["tall (weight 20 x 12)", "init_subspace='bottom'", "r = 13", "d_in is 12"],
        {"target_modules": ["good", "tall"], "r": 13},
    ),
    "bottom B, r too large": (
        "mica",
        ["wide (weight 12 x 20)", "init_subspace='bottom'", "init_factors='B'", "r = 13", "d_out is 12"],
        {"target_modules": ["good", "wide"], "r": 13},
    ),
    "r + k too large": (
        "offprincipal",
        ["tall (weight 20 x 12)", "r + k = 9 + 4 = 13", "d_in is 12", "Lower r or principal_rank"],
        {"target_modules": ["good", "tall"], "r": 9, "principal_rank": 4},
    ),
    "r + k too large, paired": (
        "milora",
        ["wide (weight 12 x 20)", "r + k = 9 + 4 = 13", "min(weight.shape) is 12", "principal_rank"],
        {"target_modules": ["good", "wide"], "r": 9, "principal_rank": 4, "projection": "input"},
    ),
    "r of a pattern too large": (
        "pissa",
        ["tall (weight 20 x 12)", "r = 13", "rank_pattern"],
        {"target_modules": ["good", "tall"], "r": 2, "rank_pattern": {"tall": 13}},
    ),
}


@pytest.mark.parametrize("case", SIZES)
def test_sizes_that_do_not_fit(case):
    preset, words, options = SIZES[case]
    refuse(Zoo(), preset, *words, **options)


@pytest.mark.parametrize(
    ("preset", "layer", "options"),
    [
        ("rlmo", "wide", {"r": 20}),
        ("mica", "tall", {"r": 20}),
        ("pissa", "tall", {"r": 12}),
        ("milora", "wide", {"r": 8, "principal_rank": 4, "projection": "both"}),
        ("offprincipal", "wide", {"r": 9, "principal_rank": 11}),
        ("offprincipal", "tall", {"r": 8, "principal_rank": 4}),
        ("rlmo", "tall", {"principal_rank": 11, "init_subspace": "random", "projection": "output"}),
        ("lora", "tall", {"r": 30}),
    ],
)
def test_the_largest_sizes_that_fit(preset, layer, options):
    zoo = Zoo()
    x = torch.randn(2, getattr(zoo, layer).in_features)
    expected = getattr(zoo, layer)(x)
    model = get_peft_model(zoo, OffPrincipalLoraConfig.preset(preset, **{"r": 4, "target_modules": [layer], **options}))
    assert torch.equal(getattr(model.base_model.model, layer)(x), expected)


NAMES = {
    "target_modules": ({"target_modules": ["good", "missing"]}, ["target_modules", "'missing'", "good", "wide"]),
    "rank_pattern": (
        {"target_modules": ["good", "tall"], "rank_pattern": {"good": 2, "wide": 3}},
        ["rank_pattern", "'wide'", "2 targeted layers", "good", "tall"],
    ),
    "alpha_pattern": (
        {"target_modules": ["good", "tall"], "alpha_pattern": {r".*\.good": 2}},
        ["alpha_pattern", r"'.*\\.good'", "good", "tall"],
    ),
}


@pytest.mark.parametrize("case", NAMES)
@pytest.mark.parametrize("preset", ["lora", "pissa"])
def test_a_name_that_matches_nothing(case, preset):
    options, words = NAMES[case]
    refuse(Zoo(), preset, *words, **options)


def test_a_regex_that_matches_nothing():
    refuse(Zoo(), "rlmo", "missing_", target_modules="missing_.*")


UNSUPPORTED = {
    "table": "torch.nn.modules.sparse.Embedding",
    "image": "torch.nn.modules.conv.Conv2d",
    "attention": "torch.nn.modules.activation.MultiheadAttention",
}


@pytest.mark.parametrize("layer", UNSUPPORTED)
@pytest.mark.parametrize("preset", ["lora", "rlmo"])
def test_a_class_that_cannot_be_adapted(layer, preset):
    refuse(Zoo(), preset, f"{layer} is a {UNSUPPORTED[layer]}", "Linear", "Conv1D", target_modules=["good", layer])


@pytest.mark.parametrize("preset", ["lora", "rlmo"])
def test_layers_whose_parent_reads_the_weight_itself(preset):
    """nn.MultiheadAttention, and nn.TransformerEncoderLayer's fast path, never call these layers' forward."""
    words = ["attention.out_proj", "MultiheadAttention", "bypass", "exclude_modules"]
    refuse(Zoo(), preset, *words, target_modules=["good", "out_proj"])
    encoder = nn.Sequential(nn.TransformerEncoderLayer(24, 4))
    refuse(encoder, preset, "0.linear1", "TransformerEncoderLayer", "bypass", target_modules=["linear1"])


@pytest.mark.parametrize("preset", ["lora", "rlmo"])
def test_a_quantised_weight(preset):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    zoo = Zoo()
    zoo.int8 = bitsandbytes.nn.Linear8bitLt(24, 24)
    words = ["int8", "Linear8bitLt", "Int8Params", "(24, 24)", "float32, bfloat16"]
    refuse(zoo, preset, *words, target_modules=["good", "int8"])


@pytest.mark.parametrize("preset", ["lora", "rlmo"])
def test_a_weight_of_integers(preset):
    refuse(Zoo(), preset, "flat", "torch.int8", "(16, 24)", "float32, bfloat16", target_modules=["good", "flat"])


def test_a_layer_that_carries_another_adapter():
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"])).base_model.model
    with pytest.warns(UserWarning, match="for a second time"):
        refuse(model, "rlmo", "q_proj", "already carries", "unload", target_modules=["q_proj"])


READS_THE_WEIGHT = [preset for preset in PRESETS if preset != "lora"]


@pytest.mark.parametrize("preset", READS_THE_WEIGHT)
@pytest.mark.parametrize("layer", ["broken", "infinite"])
def test_a_weight_with_nan_or_infinity(layer, preset):
    refuse(Zoo(), preset, layer, "(16, 24)", "1 NaN or infinite", target_modules=["good", layer])


@pytest.mark.parametrize("preset", READS_THE_WEIGHT)
def test_a_weight_without_values(preset):
    refuse(Zoo(), preset, "meta (weight 16 x 24)", "meta device", target_modules=["good", "meta"])


def test_a_null_space_that_is_too_small():
    for layer, factors, words in (
        ("good", "A", ["(24, 24)", "dimension 0", "input side", "4 were asked"]),
        ("tall", "A", ["(20, 12)", "dimension 0", "input side"]),
        ("wide", "B", ["(12, 20)", "dimension 0", "output side"]),
    ):
        options = {"init_subspace": "null", "init_factors": factors}
        refuse(Zoo(), "rlmo", layer, "null space", *words, target_modules=[layer], **options)
    refuse(Zoo(), "rlmo", "wide", "(12, 20)", "dimension 8", r=9, target_modules=["wide"], init_subspace="null")


@pytest.mark.parametrize(("layer", "factors"), [("wide", "A"), ("tall", "B")])
def test_a_null_space_that_is_large_enough(layer, factors):
    config = OffPrincipalLoraConfig(
        r=8, lora_alpha=8, target_modules=[layer], init_subspace="null", init_factors=factors
    )
    adapted = getattr(get_peft_model(Zoo(), config).base_model.model, layer)
    W = adapted.get_base_layer().weight.detach()
    started = adapted.lora_A["default"].weight.T if factors == "A" else adapted.lora_B["default"].weight
    along = W @ started if factors == "A" else W.T @ started
    assert along.norm() < 3e-7 * W.norm()  # observed: 3.0e-8 and 3.7e-8


SPECTRAL = ["pissa", "milora", "geora"]


@pytest.mark.parametrize("preset", SPECTRAL)
def test_a_zero_weight_under_a_spectral_start(preset):
    words = ["zero (weight 16 x 24)", "init_scale='spectral'", "init_scale='unit'"]
    refuse(Zoo(), preset, *words, target_modules=["good", "zero"])


@pytest.mark.parametrize("preset", [preset for preset in PRESETS if preset not in SPECTRAL])
def test_a_zero_weight_under_any_other_start(preset):
    model = get_peft_model(Zoo(), OffPrincipalLoraConfig.preset(preset, r=4, target_modules=["zero"]))
    layer = model.base_model.model.zero
    layer(torch.randn(3, 24)).sum().backward()
    assert any(p.grad.any() for p in layer.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("preset", "projection", "k"), [("rlpo", "input", 4), ("rlpo", "both", 6), ("pissa", "both", 4)]
)
def test_a_projection_that_removes_the_whole_start(preset, projection, k):
    words = ["good (weight 24 x 24)", f"projection='{projection}'", f"k = {k}", "init_subspace='top'"]
    refuse(Zoo(), preset, *words, target_modules=["good"], projection=projection, principal_rank=k)


@pytest.mark.parametrize(("projection", "k"), [("output", 4), ("input", 3)])
def test_a_projection_that_leaves_some_of_the_start(projection, k):
    options = {"target_modules": ["good"], "projection": projection, "principal_rank": k}
    model = get_peft_model(Zoo(), OffPrincipalLoraConfig.preset("rlpo", r=4, **options))
    layer = model.base_model.model.good
    layer(torch.randn(3, 24)).square().sum().backward()
    assert layer.lora_B["default"].weight.grad.any()


# -- on real architectures ----------------------------------------------------------------------------------------


def test_the_message_names_the_layer_in_its_model():
    words = ["model.layers.0.self_attn.k_proj (weight 32 x 64)", "r = 40"]
    refuse(tiny_llama(), "pissa", *words, r=40, task_type="CAUSAL_LM")
    words = ["target_modules", "'q_proj'", "c_attn"]
    refuse(tiny_gpt2(), "rlmo", *words, target_modules=["c_attn", "q_proj"], task_type="CAUSAL_LM")


def test_the_last_layer_of_a_model_is_checked_before_the_first_is_touched():
    model = tiny_llama()
    model.model.layers[-1].mlp.down_proj.weight.data[0, 0] = torch.nan
    refuse(model, "rlmo", "model.layers.1.mlp.down_proj", "NaN", task_type="CAUSAL_LM")


def test_a_refused_second_adapter_leaves_the_first_as_it_was():
    model = get_peft_model(tiny_llama(), OffPrincipalLoraConfig.preset("rlmo", r=4, task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    ids = token_batch(128)
    before: Tensor = model(input_ids=ids).logits
    state = {n: p.detach().clone() for n, p in model.named_parameters()}
    second = OffPrincipalLoraConfig.preset("pissa", r=40, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="k_proj"):
        model.add_adapter("second", second)
    assert list(model.peft_config) == ["default"] and model.active_adapters == ["default"]
    now = dict(model.named_parameters())
    assert now.keys() == state.keys() and all(torch.equal(now[n], state[n]) for n in state)
    assert torch.equal(model(input_ids=ids).logits, before)
    second.r = 4  # the name is free again
    model.add_adapter("second", second)
    assert torch.equal(model(input_ids=ids).logits, before)


def test_a_refused_model_can_be_adapted_afterwards():
    model = tiny_llama()
    expected = copy.deepcopy(model)(input_ids=token_batch(128)).logits
    refuse(model, "pissa", "k_proj", r=40, task_type="CAUSAL_LM")
    assert not any(isinstance(m, BaseTunerLayer) for m in model.modules())
    adapted = get_peft_model(model, OffPrincipalLoraConfig.preset("pissa", r=4, task_type="CAUSAL_LM"))
    assert torch.equal(adapted(input_ids=token_batch(128)).logits, expected)
