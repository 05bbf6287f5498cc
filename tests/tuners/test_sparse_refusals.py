"""What a masked adapter refuses: the layer is named, a remedy is given, and the model is as it was."""

import copy
import warnings

import pytest
import torch
from peft import get_peft_model
from torch import nn

from helpers import assert_same_base, base_bytes
from lifecycle import DTYPES, FAMILIES, IDS, OTHER_IDS, assert_same_tensors, gradients, logits, tiny, trainable
from offprincipal_peft import MaskedAdamW, PrincipalSparseConfig
from sparse_models import (
    BF16_PRECISIONS,
    SOME,
    adapted,
    deltas,
    masked,
    names,
    packed_values,
    restored_bytes,
    sparse_config,
    sparse_layers,
    train_masked,
    trained,
)

# -- when an adapter is made ------------------------------------------------------------------------------------------


class Zoo(nn.Module):
    """One good layer and, after it, some that cannot be adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.good = nn.Linear(24, 24)
        self.table = nn.Embedding(10, 24)
        self.image = nn.Conv2d(3, 24, 3)
        self.strided = nn.Linear(24, 16)
        self.strided.weight = nn.Parameter(torch.randn(24, 16).T)
        self.tied = nn.Linear(24, 10)
        self.tied.weight = self.table.weight
        self.part = nn.Linear(24, 4)
        self.part.weight = nn.Parameter(self.strided.weight.data.T[:4])  # a view
        self.broken = nn.Linear(24, 16)
        self.broken.weight.data[3, 4] = torch.nan
        self.cube = nn.Linear(24, 16)
        self.cube.weight = nn.Parameter(torch.randn(2, 16, 24))
        self.integer = nn.Linear(24, 16)
        self.integer.weight = nn.Parameter(torch.zeros(16, 24, dtype=torch.int8), requires_grad=False)
        self.meta = nn.Linear(24, 16, device="meta")


def refuse(model: nn.Module, *words: str, **options) -> None:
    """get_peft_model raises with all the words and leaves types, flags and bytes as they were."""

    def state():
        values = {n.replace(".", "_"): p for n, p in model.named_parameters() if not p.is_meta}
        modules = [(name, type(module)) for name, module in model.named_modules()]
        return modules, {n: p.requires_grad for n, p in model.named_parameters()}, base_bytes(nn.ParameterDict(values))

    before = state()
    with pytest.raises(ValueError) as caught:
        get_peft_model(model, PrincipalSparseConfig(**{"principal_rank": 4} | options))
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert state() == before


ZOO = {
    "table": ["table is a torch.nn.modules.sparse.Embedding", "Conv1D", "exclude_modules"],
    "image": ["image is a torch.nn.modules.conv.Conv2d", "Conv1D", "exclude_modules"],
    "strided": ["strided", "(16, 24)", "strides (1, 16)", "weight.contiguous()"],
    "tied": ["tied", "shared with table.weight", "exclude_modules", "untie"],
    "part": ["part", "shared with strided.weight", "exclude_modules"],
    "broken": ["broken (weight 16 x 24)", "NaN"],
    "cube": ["cube", "(2, 16, 24)", "2-D parameter"],
    "integer": ["integer", "torch.int8", "float32, bfloat16"],
    "meta": ["meta (weight 16 x 24)", "meta device", "low_cpu_mem_usage"],
    "missing": ["target_modules entry 'missing' matches no module", "strided"],
}


@pytest.mark.parametrize("layer", ZOO)
def test_a_layer_that_cannot_be_adapted(layer):
    refuse(Zoo(), *ZOO[layer], target_modules=["good", layer])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mask": "low & ~low"}, ["selects no element of 1024"]),
        ({"mask": "low | ~low"}, ["selects every element of 1024"]),
        ({"mask": "random", "random_density": 1e-4}, ["selects no element of 1024"]),
        ({"mask": "low", "low_density": 0.01, "structure": "row"}, ["selects no row of 32"]),
        ({"mask": "low", "structure": "block"}, ["block of 1"]),
        ({"principal_rank": 33}, ["principal_rank gives k = 33", "1 to 32"]),
        ({"mask": "matched(low)", "low_density": 0.9}, ["matched pair of low", "under 20%"]),
    ],
    ids=names,
)
def test_a_mask_that_names_nothing_everything_or_cannot_be_made(options, words):
    refuse(tiny(), "model.layers.0.self_attn.q_proj (weight 32 x 32)", *words, **options)


@pytest.mark.parametrize("precision", BF16_PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=names)
def test_16_bit_values_need_a_bfloat16_weight(precision, dtype):
    words = ["model.layers.0.self_attn.q_proj", f"precision='{precision}'", str(dtype), "load the model in bfloat16"]
    refuse(tiny(dtype=dtype), *words, "precision='fp32'", precision=precision)
    mixed = tiny(dtype=torch.bfloat16)
    mixed.model.layers[-1].mlp.down_proj.float()  # the last layer is checked before the first is touched
    refuse(mixed, "model.layers.1.mlp.down_proj", "torch.float32", precision=precision)


def test_a_tied_head():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's notice of tied target modules
        refuse(tiny(tie=True), "lm_head", "model.embed_tokens.weight", "untie", target_modules=["q_proj", "lm_head"])


def test_a_refused_second_adapter_leaves_the_first_as_it_was():
    host = trained()
    want, before, values = logits(host), restored_bytes(host), packed_values(host)
    with pytest.raises(ValueError, match=r"q_proj \(weight 32 x 32\).*selects no element"):
        host.add_adapter("second", sparse_config(mask="low & ~low"))
    assert list(host.peft_config) == ["default"] and host.active_adapters == ["default"]
    assert_same_tensors(packed_values(host), values)
    assert torch.equal(logits(host), want)
    assert_same_base(before, restored_bytes(host))
    host.add_adapter("second", sparse_config())  # the name is free


# -- between a forward and its backward -------------------------------------------------------------------------------

BETWEEN = {
    "switching": (lambda host: host.set_adapter("second"), r"active adapters are \['second'\]"),
    "deleting": (lambda host: host.delete_adapter("default"), r"active adapters are \['second'\]"),
    "merging another": (lambda host: host.merge_adapter(["second"]), "adapter 'second' is merged"),
}


@pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted")
@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize(("dtype", "precision"), SOME, ids=names)
def test_a_backward_needs_the_adapter_of_its_forward(dtype, precision, between):
    host = trained(dtype=dtype, precision=precision)
    host.add_adapter("second", sparse_config(precision=precision, mask="low"))
    values = packed_values(host)
    want = {"default": logits(host), "second": logits(tiny(dtype=dtype))}
    act, words = BETWEEN[between]
    loss = host(input_ids=IDS, labels=IDS).loss
    act(host)
    with pytest.raises(
        RuntimeError, match=rf"the forward ran with adapter 'default', but now.*{words}.*run backward\(\)"
    ):
        loss.backward()
    if between == "merging another":
        host.unmerge_adapter()
    for name in set(want) & set(host.peft_config):
        host.set_adapter(name)
        assert torch.equal(logits(host), want[name])
        gradients(host)
    if "default" in host.peft_config:
        assert_same_tensors(packed_values(host), values)
    assert_same_base(base_bytes(tiny(dtype=dtype)), restored_bytes(host))


def disable_and_run(host) -> None:
    with host.disable_adapter():
        logits(host, OTHER_IDS)


@pytest.mark.parametrize(
    "between",
    [
        disable_and_run,
        lambda host: host.merge_adapter(),
        lambda host: (host.merge_adapter(), host.unmerge_adapter()),
        lambda host: host.state_dict(),
        lambda host: logits(host, OTHER_IDS),
        lambda host: (host.add_adapter("second", sparse_config(mask="low")), host.set_adapter("second"),
                      logits(host), host.set_adapter("default")),
    ],
    ids=["disable", "merge", "merge and unmerge", "state dict", "forward", "switch and return"],
)  # fmt: skip
@pytest.mark.parametrize(("family", "dtype", "precision"), [("llama", *SOME[2]), ("gpt2", *SOME[0])], ids=names)
def test_what_may_happen_between_a_forward_and_its_backward(family, dtype, precision, between):
    host = trained(family, dtype, precision=precision)
    want = gradients(host)
    loss = host(input_ids=IDS, labels=IDS).loss
    between(host)
    loss.backward()
    assert_same_tensors({name: p.grad for name, p in trainable(host).items()}, want)


# -- steps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", BF16_PRECISIONS)
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_foreign_optimizer_is_refused_before_it_writes(precision, kind):
    host = trained(dtype=torch.bfloat16, precision=precision)
    want, values = logits(host), packed_values(host)
    by = kind(trainable(host).values(), lr=1e-2)
    host(input_ids=IDS, labels=IDS).loss.backward()
    with pytest.raises(
        RuntimeError, match=rf"{kind.__name__} cannot train.*'{precision}'.*MaskedAdamW.*precision='fp32'"
    ):
        by.step()
    assert_same_tensors(packed_values(host), values)
    host.zero_grad()
    assert torch.equal(logits(host), want)
    train_masked(host, 1)


class HandWritten:
    """Subclasses nothing and writes ``p.data``: no hook of torch sees it."""

    def __init__(self, parameters) -> None:
        self.parameters = list(parameters)

    def step(self) -> None:
        for p in self.parameters:
            p.data.sub_(p.grad.to(p.dtype), alpha=0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hand_written_optimizer_is_noticed_at_the_next_forward(family):
    host = trained(family, torch.bfloat16, precision="split")
    before = base_bytes(tiny(family, torch.bfloat16))
    host(input_ids=IDS, labels=IDS).loss.backward()
    HandWritten(trainable(host).values()).step()
    host.zero_grad()
    with pytest.raises(
        RuntimeError, match=r"\.0\..*'default' was written from outside.*low 16 bits.*MaskedAdamW.*fp32"
    ):
        logits(host)
    assert_same_base(before, restored_bytes(host))


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_a_hand_written_optimizer_trains_an_fp32_update(dtype):
    host, by_torch = (trained(dtype=dtype) for _ in range(2))
    for model, by in ((host, HandWritten(trainable(host).values())),
                      (by_torch, torch.optim.SGD(trainable(by_torch).values(), lr=0.1))):  # fmt: skip
        model(input_ids=IDS, labels=IDS).loss.backward()
        by.step()
        model.zero_grad()
    assert_same_tensors(packed_values(host), packed_values(by_torch))
    assert torch.equal(logits(host), logits(by_torch))


def test_a_step_of_a_merged_split_adapter_is_refused():
    host = trained(dtype=torch.bfloat16, precision="split")
    want, values = logits(host), packed_values(host)
    by = masked(host)
    host(input_ids=IDS, labels=IDS).loss.backward()
    host.merge_adapter()
    merged = base_bytes(host)
    with pytest.raises(
        RuntimeError, match=r"layers\.0\.self_attn\.q_proj: adapter 'default' is merged.*unmerge_adapter"
    ):
        by.step()
    assert_same_base(merged, base_bytes(host))
    assert_same_tensors(packed_values(host), values)
    host.unmerge_adapter()
    assert torch.equal(logits(host), want)
    by.step()
    assert not torch.equal(logits(host), want)


STEPS = {
    "MaskedAdamW": lambda ps: MaskedAdamW(ps, lr=0.1),
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=0.1),
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.1),
}


@pytest.mark.parametrize("forward", [False, True], ids=["step", "step and forward"])
@pytest.mark.parametrize(
    ("dtype", "precision", "kind"), [*((*form, "MaskedAdamW") for form in SOME), (*SOME[0], "AdamW"), (*SOME[0], "SGD")]
)
def test_a_step_between_a_forward_and_its_backward(dtype, precision, kind, forward):
    """It is refused, or the gradient is that of the forward's weights; never that of the weights after the step."""
    host = trained(dtype=dtype, precision=precision)
    want = gradients(host, OTHER_IDS)
    by = STEPS[kind](list(trainable(host).values()))
    host(input_ids=IDS, labels=IDS).loss.backward()
    loss = host(input_ids=OTHER_IDS, labels=OTHER_IDS).loss
    by.step()
    by.zero_grad()
    if forward:
        logits(host)
    try:
        loss.backward()
    except RuntimeError as error:
        assert "modified in place" in str(error) and "before the optimiser's step" in str(error)
    else:
        assert_same_tensors({name: p.grad for name, p in trainable(host).items()}, want)


def test_a_copied_model_with_a_foreign_optimizer_is_refused_too():
    host = copy.deepcopy(trained(dtype=torch.bfloat16, precision="split"))
    host(input_ids=IDS, labels=IDS).loss.backward()
    with pytest.raises(RuntimeError, match="cannot train a parameter of precision 'split'"):
        torch.optim.AdamW(trainable(host).values()).step()
    assert all(delta.precision == "split" for delta in deltas(host).values()) and sparse_layers(host)
    adapted()  # the hook stays harmless for others
