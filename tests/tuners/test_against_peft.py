"""The presets that PEFT has too, against PEFT's own: LoRA bit for bit, PiSSA over a training run, MiCA's start."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from helpers import assert_same_base, base_bytes, relative_error, tiny_gpt2, tiny_llama, token_batch
from offprincipal_peft import OffPrincipalLoraConfig

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
COMMON = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def adapter_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if hasattr(m, "lora_A") and "default" in m.lora_A}


# -- LoRA: the same arithmetic ------------------------------------------------------------------------------------


def logits_and_gradients(model: nn.Module, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(5)  # the same dropout masks
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    return out.logits, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@DTYPES
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True, "rank_pattern": {r".*\.1\..*": 6}, "alpha_pattern": {r".*\.0\..*": 3}}],
    ids=["plain", "patterns"],
)
def test_lora_is_pefts_lora(make, dtype, dropout, options):
    kwargs = {**COMMON, "lora_dropout": dropout, **options}
    ours = get_peft_model(make(dtype), OffPrincipalLoraConfig.preset("lora", **kwargs))
    theirs = get_peft_model(make(dtype), LoraConfig(**kwargs))
    generator = torch.Generator().manual_seed(1)
    for layer in adapter_layers(ours).values():
        weight = layer.lora_B["default"].weight
        weight.data = 0.05 * torch.randn(weight.shape, generator=generator)
    adapter = {n: p for n, p in ours.named_parameters() if "lora_" in n}
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data = adapter.pop(name).detach().clone()
    assert not adapter
    ours.train(), theirs.train()
    ids = token_batch(128)
    (y, g), (y_theirs, g_theirs) = logits_and_gradients(ours, ids), logits_and_gradients(theirs, ids)
    assert torch.equal(y, y_theirs)
    assert g.keys() == g_theirs.keys() and len(g) == 2 * len(adapter_layers(ours))
    for name in g:
        assert torch.equal(g[name], g_theirs[name]), name


# -- the kaiming draw ---------------------------------------------------------------------------------------------


class Stack(nn.Module):
    def __init__(self, d_in: int = 400, d_out: int = 24, kind: type[nn.Module] = nn.Linear) -> None:
        super().__init__()
        make = (lambda: nn.Linear(d_in, d_out)) if kind is nn.Linear else (lambda: Conv1D(d_out, d_in))
        self.first, self.second = make(), make()


def drawn(seed: int = 0, global_seed: int = 0, kind: type[nn.Module] = nn.Linear, **options) -> dict[str, Tensor]:
    torch.manual_seed(global_seed)
    config = OffPrincipalLoraConfig.preset(
        "lora", **{"r": 16, "target_modules": ["first", "second"], "seed": seed, **options}
    )
    model = get_peft_model(Stack(kind=kind), config)
    return {name: layer.lora_A["default"].weight.detach() for name, layer in adapter_layers(model).items()}


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_the_kaiming_draw_is_loras(kind):
    """kaiming_uniform_(a = sqrt(5)) over fan_in = d_in: uniform on (-1, 1) / sqrt(d_in)."""
    bound = 1 / math.sqrt(400)
    for A in drawn(kind=kind).values():
        assert A.shape == (16, 400) and A.dtype == torch.float32
        assert A.abs().max() <= bound
        ordered = ((A.double().flatten() / bound + 1) / 2).sort().values
        n = len(ordered)
        # Kolmogorov-Smirnov against the uniform law at its 1 % point, 0.020; observed: 0.0087 and 0.0095
        assert (ordered - (torch.arange(n) + 0.5) / n).abs().max() < 1.63 / math.sqrt(n)
        # observed: 0.8 standard errors
        assert abs(A.mean()) < 3 * bound / math.sqrt(3 * n)
    theirs = nn.Linear(400, 16, bias=False).weight  # PEFT draws with the same call
    assert relative_error(A.std(), theirs.std()) < 0.03  # observed: 0.001


def test_the_draw_differs_between_layers_and_seeds_and_only_there():
    first = drawn()
    names = list(first)
    assert len(names) == 2
    assert not torch.equal(*first.values())
    again, elsewhere = drawn(global_seed=123), drawn(seed=1)
    for name in names:
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], elsewhere[name])


def test_the_draw_of_a_layer_does_not_depend_on_the_other_layers():
    both, alone = drawn(), drawn(target_modules=["second"])
    ((name, A),) = alone.items()
    assert torch.equal(A, both[name])


@pytest.mark.parametrize("preset", ["lora", "offprincipal"])
def test_the_global_generator_is_where_pefts_lora_leaves_it(preset):
    """Batches drawn after the adapter was added are the same ones whether it is ours or PEFT's."""
    after = []
    for config in (OffPrincipalLoraConfig.preset(preset, **COMMON), LoraConfig(**COMMON)):
        torch.manual_seed(3)
        get_peft_model(tiny_llama(), config)
        after.append(torch.get_rng_state())
    assert torch.equal(*after)


# -- PiSSA: the same training run ---------------------------------------------------------------------------------


def effective_weights(model: nn.Module) -> dict[str, Tensor]:
    """Base plus update of every adapted layer, fp64."""
    return {
        name: layer.get_base_layer().weight.detach().double() + layer.get_delta_weight("default").detach().double()
        for name, layer in adapter_layers(model).items()
    }


def train(model: nn.Module, optimizer_cls: type[torch.optim.Optimizer], lr: float, steps: int = 20) -> list[float]:
    optimizer = optimizer_cls([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    losses = []
    for step in range(steps):
        ids = token_batch(128, batch=4, seed=step % 4)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def pissa_runs(optimizer_cls: type[torch.optim.Optimizer], lr: float, **changed) -> tuple[float, float]:
    """(largest relative difference of the effective weights, of the updates) after 20 steps of ours and PEFT's.

    `changed`: options of ours that differ from PEFT's.
    """
    original = {n: p.detach().double() for n, p in tiny_llama().named_parameters()}
    configs = (
        OffPrincipalLoraConfig.preset("pissa", **COMMON | changed),
        LoraConfig(**COMMON, init_lora_weights="pissa"),
    )
    weights = []
    for config in configs:
        model = get_peft_model(tiny_llama(), config)
        losses = train(model, optimizer_cls, lr)
        assert losses[-1] < 0.95 * losses[0]  # observed: 4.89 to 4.40 (SGD) and 4.02 (AdamW)
        weights.append(effective_weights(model))
    ours, theirs = weights
    assert ours.keys() == theirs.keys() and len(ours) == 14
    W0 = {n: original[n.removeprefix("base_model.model.") + ".weight"] for n in ours}
    of_weights = max(relative_error(ours[n], theirs[n]) for n in ours)
    of_updates = max(relative_error(ours[n] - W0[n], theirs[n] - W0[n]) for n in ours)
    return of_weights, of_updates


def test_pissa_trains_as_pefts_does_under_sgd():
    of_weights, of_updates = pissa_runs(torch.optim.SGD, lr=0.3)
    assert of_weights <= 1e-5  # observed: 3.9e-6
    assert of_updates <= 1e-4  # observed: 2.3e-5; two fp32 bases, two SVDs, 20 steps


def test_pissa_trains_as_pefts_does_under_adamw():
    """Adam divides by a gradient's own size, so no bound follows from the arithmetic; this is what is seen."""
    of_weights, of_updates = pissa_runs(torch.optim.AdamW, lr=5e-3)
    assert of_weights <= 1e-4  # observed: 8.1e-6
    assert of_updates <= 1e-3  # observed: 2.4e-5


def test_a_slightly_other_pissa_would_be_seen():
    """One per cent more alpha moves the starts and the steps by half a per cent."""
    of_weights, of_updates = pissa_runs(torch.optim.SGD, lr=0.3, lora_alpha=8.08)
    assert of_weights > 1e-4 and of_updates > 1e-3  # observed: 8.3e-3, 2.2e-2


def test_pissa_leaves_the_base_alone_and_pefts_does_not():
    ours, theirs = tiny_llama(), tiny_llama()
    before = base_bytes(ours)
    adapted = get_peft_model(ours, OffPrincipalLoraConfig.preset("pissa", **COMMON))
    assert_same_base(before, base_bytes(adapted))
    train(adapted, torch.optim.SGD, lr=0.3, steps=2)
    assert_same_base(before, base_bytes(adapted))
    assert_same_base(before, base_bytes(adapted.unload()))
    changed = get_peft_model(theirs, LoraConfig(**COMMON, init_lora_weights="pissa"))
    after = base_bytes(changed)
    assert {n for n in before if before[n] != after[n]} == {
        f"{n.removeprefix('base_model.model.')}.weight" for n in adapter_layers(changed)
    }


# -- MiCA: the same start, and the null space that a thin SVD does not reach --------------------------------------

R = 6
MICA = [("square", (32, 32)), ("wide", (24, 40)), ("tall", (40, 24))]


def mica_starts(shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """(the weight, B0 of ours, B0 of PEFT's) in fp64."""
    starts = []
    for config in (OffPrincipalLoraConfig.preset("mica"), LoraConfig(init_lora_weights="mica")):
        config.r, config.target_modules = R, ["0"]
        torch.manual_seed(2)
        linear = nn.Linear(shape[1], shape[0], bias=False)
        model = get_peft_model(nn.Sequential(linear), config)
        layer = model.base_model.model[0]
        assert not layer.lora_A["default"].weight.any()
        assert [p.requires_grad for p in (layer.lora_A["default"].weight, layer.lora_B["default"].weight)] == [1, 0]
        starts.append(layer.lora_B["default"].weight.detach().double())
    return linear.weight.detach().double(), *starts


@pytest.mark.parametrize(("name", "shape"), MICA[:2], ids=["square", "wide"])
def test_mica_starts_where_pefts_does(name, shape):
    _, ours, theirs = mica_starts(shape)
    # observed: 3.2e-7 (square), 8.9e-7 (wide)
    assert (ours @ ours.T - theirs @ theirs.T).abs().max() < 2e-5


def test_mica_on_a_tall_weight_lies_in_the_null_space():
    W, ours, theirs = mica_starts(MICA[2][1])
    # observed: 9.7e-9
    assert (W.T @ ours).norm() < 1e-7 * W.norm()
    # The thin SVD's last left vectors are not null; observed: 0.23
    assert (W.T @ theirs).norm() > 0.1 * W.norm()
