"""Adapters from weighted sums: the sum of the dense updates, whatever the parts start from, and the guarantee kept."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.merge_utils import dare_linear, dare_ties, magnitude_prune, ties
from torch import Tensor

from grpo import kl_per_step, trainer_for
from helpers import assert_same_base, base_bytes, relative_error
from lifecycle import (
    PRESETS,
    adapter_tensors,
    assert_same_tensors,
    config,
    logits,
    off_layers,
    tiny,
    train,
    trainable,
    update_as_written,
)
from offprincipal_peft.tuners.offprincipal_lora.model import OffPrincipalLoraModel
from quantized import quantized

Parts = list[tuple[str, float]]


def two(
    first: dict[str, Any], second: dict[str, Any], base: Callable[[], Any] = tiny, steps: int = 2
) -> tuple[PeftModel, list[str]]:
    """A model with trained adapters "default" and "two", made from presets with overrides."""
    host = get_peft_model(base(), config(**{"preset": "lora"} | first))
    train(host, steps)
    host.add_adapter("two", config(**{"preset": "lora"} | second))
    host.set_adapter("two")
    train(host, steps)
    return host, ["default", "two"]


def dense(host: PeftModel, adapter: str) -> dict[str, Tensor]:
    """(d_out, d_in) fp64 of an adapter's layers, by its formula."""
    found = {}
    for layer in off_layers(host):
        if adapter in layer.lora_A:
            other = Renamed(layer, adapter)
            found[next(iter(layer.geometry.values())).request.name] = update_as_written(other).double()
    assert found
    return found


class Renamed:
    """A layer's adapter as if its name were "default"."""

    def __init__(self, layer: Any, adapter: str) -> None:
        for part in ("lora_A", "lora_B", "lora_start_A", "lora_start_B", "lora_basis_U", "lora_basis_V"):
            container = getattr(layer, part)
            held = {"default": container[adapter]} if adapter in container else {}
            if part.startswith("lora_start") and not layer.geometry[adapter].difference:
                held = {}
            setattr(self, part, held)
        self.scaling = {"default": layer.scaling[adapter]}


def wanted(host: PeftModel, parts: Parts) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for adapter, weight in parts:
        for name, update in dense(host, adapter).items():
            total[name] = total.get(name, torch.zeros_like(update)) + weight * update
    return total


def worst(host: PeftModel, adapter: str, parts: Parts) -> float:
    """The largest relative error over the layers of the sum; there are no other layers."""
    got, want = dense(host, adapter), wanted(host, parts)
    assert got.keys() == want.keys()
    return max(relative_error(got[name], want[name]) for name in want)


def add(host: PeftModel, parts: Parts, name: str = "sum", kind: str = "cat", **options: Any) -> None:
    host.add_weighted_adapter([a for a, _ in parts], [w for _, w in parts], name, combination_type=kind, **options)


# -- the sum ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("second", PRESETS)
@pytest.mark.parametrize("first", PRESETS)
def test_every_pair_of_presets(first, second):
    host, names = two({"preset": first}, {"preset": second, "r": 6, "lora_alpha": 3, "seed": 3}, steps=1)
    parts = list(zip(names, (0.7, -0.4), strict=True))
    add(host, parts)
    assert worst(host, "sum", parts) < 2e-5  # seen 1.1e-7
    both = first == second == "offprincipal"
    assert host.peft_config["sum"].projection == ("both" if both else "none")


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rslora": ({"preset": "pissa", "use_rslora": True}, {"preset": "rlmo", "r": 2, "lora_alpha": 32}),
    "rank pattern": (
        {"preset": "pissa", "rank_pattern": {"q_proj": 2, "layers.1.mlp.*": 7}, "alpha_pattern": {"up_proj": 1}},
        {"preset": "mica", "rank_pattern": {"layers.0.*down_proj": 1}},
    ),
    "other layers": (
        {"preset": "geora", "target_modules": ["q_proj", "up_proj"]},
        {"preset": "offprincipal", "target_modules": ["up_proj", "down_proj"], "r": 3},
    ),
    "patterns": (
        {"preset": "pissa", "target_modules": r".*layers\.0.*(q|v)_proj"},
        {"preset": "lora", "target_modules": r".*layers\.1.*mlp\.up_proj"},
    ),
    "a list and a pattern": (
        {"preset": "pissa", "target_modules": ["q_proj"]},
        {"preset": "lora", "target_modules": r".*layers\.0.*(q|up)_proj"},
    ),
    "other transformer layers": (
        {"preset": "pissa", "target_modules": ["q_proj"], "layers_to_transform": [0]},
        {"preset": "rlmo", "target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
    ),
    "the first leaves some out": (
        {"preset": "pissa", "target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]},
        {"preset": "rlmo", "target_modules": ["v_proj"]},
    ),
    "dropout": ({"preset": "pissa", "lora_dropout": 0.5}, {"preset": "mica", "lora_dropout": 0.1}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_configs_that_differ(kind, case, tmp_path):
    host, names = two(*CASES[case])
    parts = list(zip(names, (-1.5, 0.25), strict=True))
    add(host, parts, kind=kind, **({"svd_rank": 32} if kind == "svd" else {}))
    assert worst(host, "sum", parts) < 2e-5  # seen 8.1e-7
    host.set_adapter("sum")
    want = logits(host.eval())  # PEFT makes dropouts in train mode
    host.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(tiny(), tmp_path / "sum")
    assert torch.equal(logits(loaded), want)


@pytest.mark.parametrize(
    "base",
    [lambda: tiny("gpt2"), lambda: tiny(dtype=torch.bfloat16), lambda: quantized("nf4"), lambda: quantized("int8")],
    ids=["Conv1D", "bf16", "nf4", "int8"],
)
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_every_kind_of_base(base, tmp_path):
    host, names = two({"preset": "pissa"}, {"preset": "offprincipal", "seed": 1}, base)
    parts = list(zip(names, (0.5, 2.0), strict=True))
    before = base_bytes(host)
    add(host, parts)
    add(host, parts, "small", "svd", svd_rank=2)
    assert worst(host, "sum", parts) < 2e-5  # seen 1.4e-7
    host.set_adapter("sum")
    want = logits(host.train())
    host.save_pretrained(tmp_path, selected_adapters=["sum"])
    assert torch.equal(logits(PeftModel.from_pretrained(base(), tmp_path / "sum").train()), want)
    host.merge_adapter(["sum"])
    merged = logits(host)
    host.unmerge_adapter()
    assert torch.equal(logits(host), want)
    # in bf16: seen 7.8e-3
    assert relative_error(merged, want) < (5e-2 if want.dtype == torch.bfloat16 else 1e-5)
    assert_same_base(before, base_bytes(host))


@pytest.mark.parametrize("weights", [[1.0], [-3.0], [0.0], [2], [0.2, -0.5, 1.3], [0.0, 0.0, 0.0], [1, 1, 1]], ids=str)
@pytest.mark.parametrize("kind", ["cat", "svd", "linear"])
def test_one_and_three_adapters(kind, weights):
    host, names = two({"preset": "pissa"}, {"preset": "offprincipal"})
    host.add_adapter("three", config("mica", r=2))
    host.set_adapter("three")
    train(host, 1)
    parts = list(zip([*names, "three"], weights, strict=False))
    if kind == "linear" and len(parts) > 1:
        with pytest.raises(ValueError, match="combines lora_A and lora_B separately"):
            add(host, parts, kind=kind)
        return
    add(host, parts, kind=kind, **({"svd_rank": 30} if kind == "svd" else {}))
    assert worst(host, "sum", parts) < 2e-5  # seen 9.9e-7


def test_the_same_adapter_twice():
    host, _ = two({"preset": "pissa"}, {"preset": "mica"})
    parts = [("default", 1.0), ("two", 1.0), ("default", 0.5)]
    add(host, parts)
    assert worst(host, "sum", parts) < 2e-5  # seen 3.9e-8


# -- truncation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 3, 6, 8, 1000])
@pytest.mark.parametrize("second", ["rlmo", "offprincipal"])
def test_svd_is_the_best_of_its_rank(second, rank):
    host, names = two({"preset": "pissa"}, {"preset": second, "seed": 3})
    parts = list(zip(names, (0.7, -0.4), strict=True))
    add(host, parts, kind="svd", svd_rank=rank)
    got, want = dense(host, "sum"), wanted(host, parts)
    for name, target in want.items():
        S = torch.linalg.svdvals(target)
        assert torch.linalg.matrix_rank(got[name], rtol=1e-5) <= rank
        lost, least = (got[name] - target).norm() / S.norm(), S[rank:].norm() / S.norm()
        assert lost <= least + 5e-6, name  # seen 1.0e-6 more than the least
    assert host.peft_config["sum"].r == min(rank, 12)  # pissa's update has rank 8, the other 4
    assert host.peft_config["sum"].lora_alpha == host.peft_config["sum"].r


def test_svd_rank_is_the_largest_of_the_parts_by_default():
    host, names = two({"preset": "lora", "r": 3}, {"preset": "rlmo", "r": 2, "rank_pattern": {"q_proj": 5}})
    host.add_weighted_adapter(names, [1.0, 1.0], "sum")
    assert host.peft_config["sum"].r == 5
    with pytest.raises(ValueError, match="svd_rank must be a positive integer, got 0"):
        add(host, [("two", 1.0)], "other", "svd", svd_rank=0)


ELEMENTWISE = {
    "ties_svd": lambda updates, weights: ties(updates, weights, 0.4, "frequency"),
    "dare_linear_svd": lambda updates, weights: dare_linear(updates, weights, 0.4),
    "dare_ties_svd": lambda updates, weights: dare_ties(updates, weights, 0.4, "frequency"),
    "magnitude_prune_svd": lambda updates, weights: magnitude_prune(updates, weights, 0.4),
}


@pytest.mark.parametrize("kind", ["ties_svd", "magnitude_prune_svd"])
def test_kinds_on_dense_updates_are_pefts(kind):
    """On plain updates: PEFT's own adapter from the same values. (Its dare kinds draw after the new factors' start.)"""
    host, names = two({"preset": "lora"}, {"preset": "lora", "seed": 3, "r": 5})
    twin = get_peft_model(tiny(), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    twin.add_adapter("two", LoraConfig(r=5, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    twin.load_state_dict({k: v for k, v in host.state_dict().items() if "lora_" in k}, strict=False)
    options = {"density": 0.4, "majority_sign_method": "frequency", "svd_rank": 6}
    made = []
    for model in (host, twin):
        add(model, [(names[0], 0.6), (names[1], 0.8)], kind=kind, **options)
        layers = {n: m for n, m in model.named_modules() if hasattr(m, "get_delta_weight")}
        made.append({n: m.get_delta_weight("sum").detach() for n, m in layers.items()})
    for name, update in made[1].items():
        assert relative_error(made[0][name], update) < 2e-5, name  # seen 2.0e-6


@pytest.mark.parametrize("kind", ELEMENTWISE)
def test_kinds_on_dense_updates_with_starts(kind):
    host, names = two({"preset": "pissa"}, {"preset": "mica", "target_modules": ["q_proj"]})
    each = [dense(host, name) for name in names]
    torch.manual_seed(7)
    add(host, [(names[0], 0.6), (names[1], 0.8)], kind=kind, density=0.4, majority_sign_method="frequency", svd_rank=32)
    torch.manual_seed(7)
    got = dense(host, "sum")
    for name in each[0]:
        present = [i for i in (0, 1) if name in each[i]]
        want = ELEMENTWISE[kind]([each[i][name].float() for i in present], torch.tensor([0.6, 0.8])[present])
        assert relative_error(got[name], want) < 2e-5  # seen 1.0e-6
    with pytest.raises(ValueError, match=rf"{kind}.*needs density"):
        add(host, [("default", 1.0)], "other", kind=kind)


def test_svd_clamp_clamps_the_factors_at_a_quantile():
    host, names = two({"preset": "pissa"}, {"preset": "lora"})
    parts = list(zip(names, (1.0, 1.0), strict=True))
    add(host, parts, "free", "svd", svd_rank=5)
    add(host, parts, "clamped", "svd", svd_rank=5, svd_clamp=0.9)
    for layer in off_layers(host):
        B, A = layer.lora_B["free"].weight, layer.lora_A["free"].weight
        bound = torch.quantile(torch.cat([B.flatten(), A.flatten()]), 0.9)
        assert torch.equal(layer.lora_B["clamped"].weight, B.clamp(-bound, bound))
        assert torch.equal(layer.lora_A["clamped"].weight, A.clamp(-bound, bound))


# -- the guarantee ----------------------------------------------------------------------------------------------------


def leak(host: PeftModel, adapter: str, k: int) -> float:
    """The largest share of an update inside the top-k directions, against fp64 bases of the bare model's weights."""
    bare, found = tiny(), []
    for name, update in dense(host, adapter).items():
        U, _, Vh = torch.linalg.svd(bare.get_submodule(name).weight.double())
        found += [(U[:, :k].T @ update).norm() / update.norm(), (update @ Vh[:k].T).norm() / update.norm()]
    return max(found).item()


@pytest.mark.parametrize("options", [{"kind": "cat"}, {"svd_rank": 3}, {"svd_rank": 3, "svd_clamp": 0.8}], ids=str)
def test_a_sum_of_projected_adapters_is_projected(options, tmp_path):
    host, names = two({"preset": "offprincipal"}, {"preset": "offprincipal", "init_factors": "both", "seed": 1})
    add(host, list(zip(names, (1.0, -2.0), strict=True)), **{"kind": "svd"} | options)
    assert leak(host, "sum", 5) < 2e-5  # seen 2.4e-8
    host.set_adapter("sum")
    host.set_requires_grad("sum", True)
    train(host, 5, by=torch.optim.AdamW(trainable(host).values(), lr=1e-2, weight_decay=0.1))
    assert leak(host, "sum", 5) < 2e-5
    host.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(tiny(), tmp_path / "sum", is_trainable=True)
    train(loaded, 2)
    assert leak(loaded, "default", 5) < 2e-5
    assert leak(loaded, "default", 8) > 1e-2  # seen 0.5: the measurement sees what is not projected


def test_projections_that_differ_are_not_claimed():
    host, names = two({"preset": "offprincipal"}, {"preset": "offprincipal", "principal_rank": 3})
    parts = list(zip(names, (1.0, 1.0), strict=True))
    add(host, parts)
    assert worst(host, "sum", parts) < 2e-5
    assert (host.peft_config["sum"].projection, host.peft_config["sum"].principal_rank) == ("none", 0)


# -- refusals ---------------------------------------------------------------------------------------------------------

REFUSED = {
    "unknown": ((["default", "nobody"], [1.0, 1.0], "sum"), {}, "nobody does not exist; the model has default, two"),
    "taken": ((["default"], [1.0], "two"), {}, "'two' exists already.*delete_adapter"),
    "lengths": ((["default", "two"], [1.0], "sum"), {}, "2 adapters and 1 weights"),
    "none": (([], [], "sum"), {}, "0 adapters"),
    "nan": ((["default"], [float("nan")], "sum"), {}, "finite numbers, got nan"),
    "kind": ((["default"], [1.0], "sum"), {"combination_type": "mean"}, "'svd', 'cat', 'ties_svd'.*got 'mean'"),
    "raw": ((["default", "two"], [1, 1], "sum"), {"combination_type": "ties"}, "Use 'cat' .*exact.*or 'svd'"),
    "pruned": (
        (["default", "two"], [1, 1], "sum"),
        {"combination_type": "dare_ties_svd", "density": 0.5},
        "projected adapter 'two' back into the leading.*Use 'cat' or 'svd'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_leaves_the_model_as_it_was(case):
    host, _ = two({"preset": "pissa"}, {"preset": "offprincipal"})
    want, state = logits(host), dict(host.state_dict())
    arguments, options, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        host.add_weighted_adapter(*arguments, **options)
    assert list(host.peft_config) == ["default", "two"] and host.active_adapters == ["two"]
    assert_same_tensors(dict(host.state_dict()), state)
    assert torch.equal(logits(host), want)


def test_a_failing_injection_leaves_the_model_as_it_was(monkeypatch):
    host, names = two({"preset": "pissa"}, {"preset": "mica"})
    want, state, made = logits(host), dict(host.state_dict()), []
    real = OffPrincipalLoraModel._create_and_replace

    def failing(self, *args, **kwargs):
        made.append(kwargs["current_key"])
        if len(made) == 4:
            raise MemoryError("no memory left")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(OffPrincipalLoraModel, "_create_and_replace", failing)
    with pytest.raises(MemoryError):
        add(host, [(name, 1.0) for name in names])
    monkeypatch.undo()
    assert list(host.peft_config) == names
    assert_same_tensors(dict(host.state_dict()), state)
    assert torch.equal(logits(host), want)
    add(host, [(name, 1.0) for name in names])  # the name is free


# -- the result in use ------------------------------------------------------------------------------------------------


def test_modules_that_one_adapter_trained_whole_are_copied(tmp_path):
    targets = {"target_modules": ["q_proj", "up_proj"]}
    host, names = two({"preset": "pissa", "modules_to_save": ["lm_head"], **targets}, {"preset": "mica", **targets})
    add(host, [(name, 1.0) for name in reversed(names)])
    assert host.peft_config["sum"].modules_to_save == ["lm_head"]
    copies = host.base_model.model.lm_head.modules_to_save
    assert torch.equal(copies["sum"].weight, copies["default"].weight)
    host.set_adapter("sum")
    want = logits(host)
    host.save_pretrained(tmp_path, selected_adapters=["sum"])
    assert torch.equal(logits(PeftModel.from_pretrained(tiny(), tmp_path / "sum")), want)
    host.add_adapter("three", config("lora", modules_to_save=["lm_head"], **targets))
    with pytest.raises(ValueError, match=r"lm_head was trained by default, three"):
        add(host, [("default", 1.0), ("three", 1.0)], "other")


def test_the_sum_is_frozen_and_becomes_a_policy(tmp_path):
    host, names = two({"preset": "pissa"}, {"preset": "offprincipal"})
    add(host, [(name, 0.5) for name in names])
    assert host.active_adapters == ["two"] and not [n for n in trainable(host) if ".sum." in n]
    values = adapter_tensors(host, "sum")
    train(host, 1)
    assert_same_tensors(adapter_tensors(host, "sum"), values)
    host.save_pretrained(tmp_path, selected_adapters=["sum"])
    policy = PeftModel.from_pretrained(tiny(), tmp_path / "sum", is_trainable=True)
    kl = kl_per_step(trainer_for(policy, tmp_path / "run"))
    assert kl[0] == 0.0 and kl[1] != 0.0
