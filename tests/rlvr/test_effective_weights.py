"""The update of every kind of layer against real merged weights, before and after training, in fp64."""

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from helpers import relative_error, token_batch
from lifecycle import PRESETS, config, tiny
from offprincipal_peft import MaskedAdamW, PrincipalSparseConfig
from offprincipal_peft.rlvr.effective_weights import DenseUpdate, FactoredUpdate, factored_difference
from offprincipal_peft.rlvr.layer_geometry import LayerGeometry
from offprincipal_peft.rlvr.observers import LayerObserver, observe_layers

LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
PLAIN: dict[str, Any] = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}


def _sparse(**options: Any) -> PrincipalSparseConfig:
    return PrincipalSparseConfig(task_type="CAUSAL_LM", principal_rank=4, **options)


# name -> (config, the dtype in which the forward adds the update to the weight: "wide" or the base's own, kind)
METHODS: dict[str, tuple[Callable[[], Any], str, str]] = {
    "lora": (lambda: peft.LoraConfig(**LORA), "wide", "factors"),
    "rslora": (lambda: peft.LoraConfig(**LORA, use_rslora=True), "wide", "factors"),
    "peft-pissa": (lambda: peft.LoraConfig(**LORA, init_lora_weights="pissa"), "wide", "factors"),
    "dora": (lambda: peft.LoraConfig(**LORA, use_dora=True), "wide", "merged copy"),
    **{f"our {name}": (lambda name=name: config(name), "wide", "factors") for name in PRESETS},
    "sparse": (lambda: _sparse(mask="safe"), "own", "sparse"),
    "sparse rows": (lambda: _sparse(mask="random", random_density=0.2, structure="row"), "own", "sparse"),
    "sparse dense": (lambda: _sparse(mask="random", random_density=0.8), "own", "sparse"),
    "full": (lambda: None, "own", "weight"),
    "shira": (lambda: peft.ShiraConfig(r=4, **PLAIN), "own", "merged copy"),
    "ia3": (
        lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        "wide",
        "merged copy",
    ),
    "osf": (lambda: peft.OSFConfig(effective_rank=8, **PLAIN), "wide", "merged copy"),
    "loha": (lambda: peft.LoHaConfig(r=4, **PLAIN), "wide", "merged copy"),
    "oft": (lambda: peft.OFTConfig(oft_block_size=8, **PLAIN), "wide", "merged copy"),
    "adalora": (lambda: peft.AdaLoraConfig(init_r=4, total_step=10, **PLAIN), "wide", "merged copy"),
}
BF16_ONLY = {
    f"sparse {precision}": (lambda precision=precision: _sparse(precision=precision), "own", "sparse")
    for precision in ("split", "bf16", "bf16-stochastic")
}
CASES = [(name, torch.float32) for name in METHODS] + [(name, torch.bfloat16) for name in METHODS | BF16_ONLY]


def _host(method: str, dtype: torch.dtype, family: str = "llama") -> nn.Module:
    adapter = (METHODS | BF16_ONLY)[method][0]()
    model = tiny(family, dtype)
    return model.requires_grad_(True) if adapter is None else get_peft_model(model, adapter)


def _train(host: nn.Module, steps: int = 2, lr: float = 1e-2) -> None:
    parameters = [p for p in host.parameters() if p.requires_grad]
    optimizer = MaskedAdamW(parameters, lr=lr)
    host.train()
    for step in range(steps):
        ids = token_batch(128, seed=step)
        host(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _merged(host: nn.Module, rounding: str) -> dict[str, Tensor]:
    """The weight (d_out, d_in) of every linear layer as PEFT merges it, in fp64."""
    twin = copy.deepcopy(host)
    if rounding == "wide":
        twin = twin.double()
    if isinstance(twin, peft.PeftModel):
        twin = twin.merge_and_unload()
    return {
        name: (module.weight.T if isinstance(module, Conv1D) else module.weight).detach().double()
        for name, module in twin.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }


def _truth(before: Tensor, after: Tensor, k: int) -> dict[str, float]:
    """Every figure from its definition, dense and in fp64."""
    delta = after - before
    U, S, Vh = torch.linalg.svd(before, full_matrices=False)
    U2, S2, Vh2 = torch.linalg.svd(after, full_matrices=False)
    total = float(delta.square().sum())
    values = torch.linalg.svdvals(delta)
    p = values / values.sum()
    changed = before.bfloat16() != after.bfloat16()

    def share(part: Tensor) -> float:
        return float(part.square().sum()) / total

    def angle(first: Tensor, second: Tensor) -> float:
        return float(torch.rad2deg(torch.arcsin(torch.linalg.matrix_norm(second - first @ (first.T @ second), 2))))

    return {
        "update_norm": total**0.5,
        "relative_norm": total**0.5 / float(before.norm()),
        "share_output": share(U[:, :k].T @ delta),
        "share_input": share(delta @ Vh[:k].T),
        "share_both": share(U[:, :k].T @ delta @ Vh[:k].T),
        "update_sparsity": 1 - float(changed.double().mean()),
        "spectral_shift": float((S2 - S).norm() / S.norm()),
        "angle_output": angle(U[:, :k], U2[:, :k]),
        "angle_input": angle(Vh[:k].T, Vh2[:k].T),
        "effective_rank": float(torch.exp(-(p[p > 0] * p[p > 0].log()).sum())),
        "stable_rank": total / float(values[0]) ** 2,
        "rows_std": float(changed.double().mean(1).std(correction=0)),
        "columns_std": float(changed.double().mean(0).std(correction=0)),
    }


def _reported(layer: LayerGeometry) -> dict[str, float]:
    report = layer.final()
    report["rows_std"], report["columns_std"] = report["row_ratios"]["std"], report["column_ratios"]["std"]
    return report


def _geometries(host: nn.Module, **options: Any) -> list[LayerGeometry]:
    observers, left_out = observe_layers(host, **options)
    assert not left_out
    return [LayerGeometry(observer, 5, 1000, None, 0) for observer in observers]


RELATIVE = 2e-6  # seen 3.6e-7, the spectral shift of a projected update whose factors are folded in fp32
DEGREES = 4e-4  # seen 1.2e-4, the same; the bases themselves are off by 2e-6


def _assert_close(layer: LayerGeometry, before: Tensor, after: Tensor) -> None:
    truth, found = _truth(before, after, layer.k), _reported(layer)
    for name, expected in truth.items():
        tolerance = RELATIVE * abs(expected)
        if name.startswith("share"):
            tolerance = RELATIVE
        elif name.startswith("angle"):
            tolerance = DEGREES
        elif name in ("update_sparsity", "rows_std", "columns_std"):
            tolerance = 1e-12
        assert abs(found[name] - expected) <= tolerance, (layer.name, name, found[name], expected)


@pytest.mark.parametrize("trained_before", [False, True], ids=["fresh", "trained before"])
@pytest.mark.parametrize(("method", "dtype"), CASES, ids=[f"{m}-{str(d).removeprefix('torch.')}" for m, d in CASES])
def test_figures_equal_those_of_merged_weights(method: str, dtype: torch.dtype, trained_before: bool) -> None:
    _, rounding, kind = (METHODS | BF16_ONLY)[method]
    host = _host(method, dtype)
    if trained_before:
        _train(host)
    before = _merged(host, rounding)
    layers = _geometries(host)
    assert {layer.observer.kind for layer in layers} == {kind}
    _train(host, lr=3e-3)
    after = _merged(host, rounding)
    moved = 0
    for layer in layers:
        was, now = before[layer.name], after[layer.name]
        assert layer.shape == tuple(was.shape)
        assert relative_error(layer.observer.start(), was) <= 1e-6
        _assert_close(layer, was, now)
        moved += int(not torch.equal(was, now))
        quick = layer.figures(layer.observe().tolist())  # the sample holds all rows here
        assert quick["update_sparsity"] == pytest.approx(layer.final()["update_sparsity"], abs=1e-12)
    assert moved > len(layers) // 2


@pytest.mark.parametrize("method", ["lora", "peft-pissa", "our offprincipal", "our geora", "sparse", "full"])
def test_conv1d_is_oriented(method: str) -> None:
    """GPT-2 stores weights as (d_in, d_out)."""
    host = _host(method, torch.float32, "gpt2")
    rounding = METHODS[method][1]
    before = _merged(host, rounding)
    layers = [layer for layer in _geometries(host) if layer.name.endswith(("c_attn", "mlp.c_fc"))]
    assert [layer.shape for layer in layers] == [(96, 32), (128, 32)] * 2
    _train(host)
    after = _merged(host, rounding)
    for layer in layers:
        _assert_close(layer, before[layer.name], after[layer.name])


def _norms(observers: list[LayerObserver]) -> list[float]:
    return [float(observer.update().dense().norm()) for observer in observers]


@pytest.mark.parametrize("method", ["lora", "dora", "our pissa", "sparse", "shira"])
def test_disabled_adapters_have_no_update(method: str) -> None:
    host = _host(method, torch.float32)
    base = _merged(_host("full", torch.float32), "own")
    _train(host)
    observers, _ = observe_layers(host, since="base")
    assert all(norm > 0 for norm in _norms(observers))
    with host.disable_adapter():
        off, _ = observe_layers(host)
        assert _norms(observers) == [0.0] * len(observers)
        for observer in off:
            assert relative_error(observer.start(), base[observer.name]) == 0.0
    for before, after in zip(_norms(observers), _norms(off), strict=True):  # the start of `off` was the base
        assert after == pytest.approx(before, rel=1e-5)  # seen 2e-7


@pytest.mark.parametrize("method", ["lora", "dora", "our pissa", "our offprincipal", "sparse", "loha"])
def test_merged_adapters_are_part_of_the_weight(method: str) -> None:
    host = _host(method, torch.float32)
    observers, _ = observe_layers(host)
    _train(host)
    unmerged = _norms(observers)
    host.merge_adapter()
    base = {name.replace(".base_layer", ""): p.detach().clone() for name, p in host.base_model.model.named_parameters()}
    for found, expected in zip(_norms(observers), unmerged, strict=True):
        assert found == pytest.approx(expected, rel=1e-4)  # seen 1e-5: PEFT's merged base is rounded
    merged, _ = observe_layers(host)
    for observer in merged:
        assert relative_error(observer.start(), base[f"{observer.name}.weight"]) <= 1e-6  # seen 8e-8
    assert max(_norms(merged)) <= 1e-6
    host.unmerge_adapter()
    assert _norms(observers) == pytest.approx(unmerged, rel=1e-4)


def test_another_active_adapter_is_another_update() -> None:
    host = _host("lora", torch.float32)
    _train(host)
    host.add_adapter("other", peft.LoraConfig(**{**LORA, "r": 2, "init_lora_weights": False}))
    before = _merged(host, "wide")
    layers = _geometries(host)
    host.set_adapter("other")
    after = _merged(host, "wide")
    for layer in layers:
        _assert_close(layer, before[layer.name], after[layer.name])


def test_since_base_measures_what_an_adapter_did_before() -> None:
    for method in ("lora", "sparse", "dora"):
        host = _host(method, torch.float32)
        base = _merged(_host("full", torch.float32), "own")
        _train(host)
        after = _merged(host, METHODS[method][1])
        for layer in _geometries(host, since="base"):
            _assert_close(layer, base[layer.name], after[layer.name])


def test_rank_stabilised_scaling_counts() -> None:
    """r = 4: the same factors weigh twice as much."""
    norms = []
    for method in ("lora", "rslora"):
        host = _host(method, torch.float32)
        observers, _ = observe_layers(host)
        for parameter in host.parameters():
            if parameter.requires_grad:
                parameter.data.fill_(0.01)
        norms.append(_norms(observers))
    assert norms[1] == pytest.approx([2 * norm for norm in norms[0]])


def test_a_small_update_of_large_factors_keeps_its_digits() -> None:
    """And the product of the two differences' broken twin, L R - L0 R0 in fp32, loses them."""
    generator = torch.Generator().manual_seed(0)
    L0, R0 = torch.randn(40, 4, generator=generator), torch.randn(4, 30, generator=generator)
    L, R = (L0 + 1e-6 * torch.randn(40, 4, generator=generator)), (R0 + 1e-6 * torch.randn(4, 30, generator=generator))
    truth = L.double() @ R.double() - L0.double() @ R0.double()
    update = factored_difference((L, R), (L0, R0))
    assert relative_error(update.dense(), truth) <= 1e-5  # seen 2e-16
    assert update.energies(torch.zeros(40, 0), torch.zeros(30, 0))[0].sqrt() == pytest.approx(float(truth.norm()))
    assert relative_error(L @ R - L0 @ R0, truth) > 1e-2  # seen 0.06


@pytest.mark.parametrize("form", [FactoredUpdate, lambda L, R: DenseUpdate(L @ R)], ids=["factors", "dense"])
def test_zero_and_empty_updates(form: Any) -> None:
    for rank in (0, 3):
        update = form(torch.zeros(6, rank), torch.zeros(rank, 5))
        assert update.energies(torch.eye(6, 2), torch.eye(5, 2)).tolist() == [0.0] * 4
        assert float(update.values().sum()) == 0.0
        assert update.rows(torch.tensor([1, 4])).shape == (2, 5)


def test_factors_that_do_not_multiply_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(6, 3\) and \(2, 5\) do not multiply"):
        FactoredUpdate(torch.zeros(6, 3), torch.zeros(2, 5))


# -- which layers ---------------------------------------------------------------------------------------------------


def test_names_are_those_of_the_bare_model() -> None:
    for method in ("lora", "full"):
        names = [observer.name for observer in observe_layers(_host(method, torch.float32))[0]]
        assert "model.layers.0.self_attn.q_proj" in names
    assert "lm_head" in names  # of the last, which trains everything


def test_modules_to_save_are_watched_by_their_own_weight() -> None:
    host = get_peft_model(
        tiny(), peft.LoraConfig(**{**LORA, "target_modules": ["q_proj"]}, modules_to_save=["lm_head"])
    )
    kinds = {observer.name: observer.kind for observer in observe_layers(host)[0]}
    assert kinds["lm_head"] == "weight"
    assert kinds["model.layers.1.self_attn.q_proj"] == "factors"
    assert len(kinds) == 3


def test_a_base_that_trains_beside_its_adapter_is_seen() -> None:
    host = _host("lora", torch.float32)
    host.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight.requires_grad_(True)
    before = _merged(host, "wide")
    layers = _geometries(host)
    _train(host)
    after = _merged(host, "wide")
    assert [layer.observer.kind for layer in layers].count("merged copy") == 1
    for layer in layers:
        _assert_close(layer, before[layer.name], after[layer.name])
    with pytest.raises(ValueError, match=r"since='base'.*layers\.0\.self_attn\.q_proj trains itself"):
        observe_layers(host, since="base")


def test_a_pattern_chooses_layers_and_one_without_a_match_raises() -> None:
    host = _host("lora", torch.float32)
    names = [observer.name for observer in observe_layers(host, r"layers\.1\..*(q|k)_proj$")[0]]
    assert names == ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"]
    with pytest.raises(ValueError, match=r"'query' matches none of the 14 layers.*down_proj.*v_proj"):
        observe_layers(host, "query")


def test_a_model_in_which_nothing_moves_is_refused() -> None:
    with pytest.raises(ValueError, match="no layer to observe"):
        observe_layers(tiny().requires_grad_(False))


def test_what_cannot_be_merged_is_named() -> None:
    host = get_peft_model(
        tiny(), peft.LoraConfig(**{**LORA, "target_modules": ["q_proj", "embed_tokens"]}, use_rslora=True)
    )
    observers, left_out = observe_layers(host)
    assert len(observers) == 2
    assert list(left_out) == ["model.embed_tokens"]
    assert "its base is a Embedding" in left_out["model.embed_tokens"]


def test_sharded_weights_are_refused() -> None:
    model = tiny().requires_grad_(True)
    model.lm_head.weight.data = torch.empty(0)  # what ZeRO-3 leaves in place
    with pytest.raises(ValueError, match="lm_head: its weight is sharded"):
        observe_layers(model)


def test_k_that_is_the_whole_space_is_refused_with_the_layer() -> None:
    observer = observe_layers(_host("lora", torch.float32))[0][0]
    with pytest.raises(ValueError, match=r"q_proj has shape 32 x 32: k=32"):
        LayerGeometry(observer, 32, 8, None, 0)


@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_a_quantised_base_is_read_dequantised(kind: str) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = tiny()
    dense = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name in [n for n, _ in model.named_modules() if n.endswith("q_proj")]:
        layer = getattr(bnb.nn, kind)(32, 32, bias=False, **({"has_fp16_weights": False} if "8" in kind else {}))
        weight = bnb.nn.Int8Params if "8" in kind else bnb.nn.Params4bit
        layer.weight = weight(dense[f"{name}.weight"].clone(), requires_grad=False)
        model.set_submodule(name, layer.to("cpu"))
    host = get_peft_model(model, peft.LoraConfig(**{**LORA, "target_modules": ["q_proj"], "init_lora_weights": False}))
    for layer in _geometries(host, since="base"):
        assert layer.observer.kind == "factors"
        assert (
            relative_error(layer.observer.start(), dense[f"{layer.name}.weight"]) <= 0.25
        )  # seen 0.006 (8 bit), 0.21 (4 bit)
        tuned = host.base_model.model.get_submodule(layer.name)
        update = 2 * tuned.lora_B["default"].weight @ tuned.lora_A["default"].weight
        assert layer.final()["update_norm"] == pytest.approx(float(update.norm()), rel=1e-6)
