"""What a projection promises: the update stays off the top-k singular directions whatever the optimiser does."""

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from offprincipal_peft import OffPrincipalLoraConfig
from offprincipal_peft.tuners.offprincipal_lora import OffPrincipalLinear

K, R = 24, 8
SHAPES = {"square": (160, 160), "tall": (320, 160), "wide": (160, 320)}
# Largest leaks seen over the shapes and starts below, with their bars in the assertions:
# fp32 1.0e-7 (bar 1e-5), bf16 autocast 6.5e-4 (bar 1e-3), independent fp64 bases 8.5e-8 (bar 2e-5).


class Layers(nn.Module):
    """One layer of each shape, with a decaying spectrum whose gap at k is at least 1e-3 of the largest value."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        for name, (d_out, d_in) in SHAPES.items():
            layer = nn.Linear(d_in, d_out, bias=False)
            gauss = torch.randn(d_out, d_in, generator=generator, dtype=torch.float64)
            U, S, Vh = torch.linalg.svd(gauss, full_matrices=False)
            decay = 1.0 / (1 + torch.arange(len(S), dtype=torch.float64)) ** 0.5
            layer.weight.data = ((U * decay) @ Vh).to(dtype)
            setattr(self, name, layer)

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: getattr(self, name)(x) for name, x in inputs.items()}


def _data(seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    inputs = {name: torch.randn(32, d_in, generator=generator) for name, (_, d_in) in SHAPES.items()}
    targets = {name: torch.randn(32, d_out, generator=generator) for name, (d_out, _) in SHAPES.items()}
    return inputs, targets


def _train(
    model: nn.Module,
    *,
    steps: int = 50,
    autocast: bool = False,
    before_step: Callable[[nn.Module], None] | None = None,
) -> None:
    """50 AdamW steps at lr 1e-2 with weight decay 0.1: momentum and decay push the raw factors anywhere."""
    inputs, targets = _data()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs = model(inputs)
            loss = sum((outputs[name].float() - targets[name]).square().mean() for name in targets)
        loss.backward()
        if before_step is not None:
            before_step(model)
        optimizer.step()
        optimizer.zero_grad()


def _adapted(projection: str = "both", **overrides: object) -> nn.Module:
    settings: dict[str, object] = {
        "r": R,
        "lora_alpha": 2 * R,
        "target_modules": list(SHAPES),
        "projection": projection,
        "principal_rank": K if projection != "none" else 0,
    }
    return get_peft_model(Layers(), OffPrincipalLoraConfig(**{**settings, **overrides}))


def _layers(model: nn.Module) -> dict[str, OffPrincipalLinear]:
    return {n.rsplit(".", 1)[-1]: m for n, m in model.named_modules() if isinstance(m, OffPrincipalLinear)}


def _top(weight: Tensor, k: int = K) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    return U[:, :k], S, Vh[:k].T


def _leaks(delta: Tensor, U: Tensor, V: Tensor) -> tuple[float, float]:
    """Share of the update's norm inside the top-k columns and rows, in fp64."""
    delta = delta.detach().double()
    size = delta.norm()
    assert size > 0
    left, right = U.double().T @ delta, delta @ V.double()
    return float(left.norm() / size), float(right.norm() / size)


def _stored_bases(layer: OffPrincipalLinear) -> tuple[Tensor, Tensor]:
    return layer.lora_basis_U["default"].weight, layer.lora_basis_V["default"].weight


@pytest.mark.parametrize("start", ["bottom", "random", "kaiming"])
def test_fp32_update_stays_off_the_stored_bases(start: str) -> None:
    scale = "native" if start == "kaiming" else "unit"
    model = _adapted(init_subspace=start, init_scale=scale)
    _train(model)
    for layer in _layers(model).values():
        left, right = (f.detach().double() for f in layer.effective_factors("default"))
        assert max(_leaks(left @ right, *_stored_bases(layer))) <= 1e-5


def test_both_started_factors_stay_off_the_bases_too() -> None:
    model = _adapted(init_factors="both")
    _train(model)
    for layer in _layers(model).values():
        left, right = (f.detach().double() for f in layer.effective_factors("default"))
        assert max(_leaks(left @ right, *_stored_bases(layer))) <= 1e-5


def test_bf16_autocast_update_stays_off_the_stored_bases() -> None:
    model = _adapted()
    _train(model, autocast=True)
    for layer in _layers(model).values():
        left, right = (f.detach().bfloat16().double() for f in layer.effective_factors("default"))
        assert max(_leaks(left @ right, *_stored_bases(layer))) <= 1e-3


@pytest.mark.parametrize(("projection", "free"), [("output", 1), ("input", 0)])
def test_one_sided_projection_frees_the_other_side(projection: str, free: int) -> None:
    model = _adapted(projection)
    _train(model)
    for layer in _layers(model).values():
        U, _, V = _top(layer.original_weight())
        leaks = _leaks(layer.get_delta_weight("default"), U, V)
        assert leaks[1 - free] <= 1e-5
        assert leaks[free] > 1e-2  # seen 0.1 and more


def test_update_stays_off_independent_fp64_bases() -> None:
    model = _adapted()
    _train(model)
    for layer in _layers(model).values():
        U, S, V = _top(layer.original_weight())
        assert (S[K - 1] - S[K]) / S[0] >= 1e-3
        left, right = (f.detach().double() for f in layer.effective_factors("default"))
        assert max(_leaks(left @ right, U, V)) <= 2e-5


def test_top_singular_values_survive_while_the_rest_stays_below_them() -> None:
    model = _adapted()
    _train(model, steps=10)
    for layer in _layers(model).values():
        weight = layer.original_weight().double()
        U, S, V = _top(weight)
        left, right = (f.detach().double() for f in layer.effective_factors("default"))
        rest = weight - (U * S[:K]) @ V.T
        delta = left @ right
        delta = delta * (0.95 * S[K - 1] - torch.linalg.matrix_norm(rest, 2)) / torch.linalg.matrix_norm(delta, 2)
        assert torch.linalg.matrix_norm(rest + delta, 2) < S[K - 1]
        after = torch.linalg.svdvals(weight + delta)
        assert ((after[:K] - S[:K]).abs() / S[:K]).max() <= 1e-5  # seen 2e-9


@pytest.mark.parametrize(("size", "least", "most"), [(1e-1, 2e-3, 4e-2), (1e-2, 2e-2, 2e-1), (1e-3, 1e-1, 4e-1)])
def test_leak_of_a_merged_bf16_weight_is_that_of_rounding(size: float, least: float, most: float) -> None:
    """Measured, not promised: rounding W + dW to bf16 is not low-rank and puts a part of the change anywhere.

    ``size`` is ||dW|| / ||W||; the bounds bracket what was seen. A random direction has sqrt(k / d), 0.39 here.
    """
    model = get_peft_model(
        Layers(torch.bfloat16),
        OffPrincipalLoraConfig(r=R, target_modules=list(SHAPES), projection="both", principal_rank=K, lora_alpha=R),
    )
    _train(model, steps=5, autocast=True)
    for layer in _layers(model).values():
        before = layer.original_weight().double()
        U, _, V = _top(before)
        with torch.no_grad():
            layer.lora_B["default"].weight.mul_(size * before.norm() / layer.get_delta_weight("default").norm())
        assert max(_leaks(layer.get_delta_weight("default"), U, V)) <= 1e-5
        layer.merge()
        merged = max(_leaks(layer.get_base_layer().weight.double() - before, U, V))
        layer.unmerge()
        print(f"merged bf16 leak at |dW|/|W| = {size}: {merged}")
        assert least <= merged <= most


class TestGuardsHaveTeeth:
    """The same measurements on what does not keep the promise."""

    def test_without_projection_it_leaks(self) -> None:
        model = _adapted("none")
        _train(model)
        for layer in _layers(model).values():
            U, _, V = _top(layer.original_weight())
            assert max(_leaks(layer.get_delta_weight("default"), U, V)) > 1e-2

    def test_plain_lora_leaks(self) -> None:
        model = get_peft_model(Layers(), LoraConfig(r=R, target_modules=list(SHAPES)))
        _train(model)
        for name in SHAPES:
            layer = model.base_model.model.get_submodule(name)
            U, _, V = _top(layer.base_layer.weight)
            assert min(_leaks(layer.get_delta_weight("default"), U, V)) > 1e-1

    def test_projecting_gradients_only_leaks(self) -> None:
        """Gradients off the bases do not keep AdamW's elementwise steps off them."""
        model = _adapted("none", init_subspace="bottom")
        bases = {n: _top(m.original_weight()) for n, m in _layers(model).items()}

        def project_gradients(model: nn.Module) -> None:
            for name, layer in _layers(model).items():
                U, _, V = (b.float() for b in bases[name])
                A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                A.grad -= (A.grad @ V) @ V.T
                B.grad -= U @ (U.T @ B.grad)

        _train(model, before_step=project_gradients)
        for name, layer in _layers(model).items():
            U, _, V = bases[name]
            assert max(_leaks(layer.get_delta_weight("default"), U, V)) > 1e-2

    def test_bases_rounded_to_bf16_leak(self) -> None:
        """Why bases stay in fp32 when a model is cast."""
        model = _adapted()
        for layer in _layers(model).values():
            for container in (layer.lora_basis_U, layer.lora_basis_V):
                container["default"].weight.data = container["default"].weight.bfloat16().float()
        _train(model)
        for layer in _layers(model).values():
            U, _, V = _top(layer.original_weight())
            assert max(_leaks(layer.get_delta_weight("default"), U, V)) > 1e-4


def test_projectors_do_not_depend_on_the_signs_of_the_bases() -> None:
    one, other = _adapted(), _adapted()
    for layer in _layers(other).values():
        for container in (layer.lora_basis_U, layer.lora_basis_V):
            container["default"].weight.data[:, ::2] *= -1
    for a, b in zip(_layers(one).values(), _layers(other).values(), strict=True):
        with torch.no_grad():
            a.lora_B["default"].weight.normal_(generator=torch.Generator().manual_seed(1))
            b.lora_B["default"].weight.copy_(a.lora_B["default"].weight)
        torch.testing.assert_close(a.get_delta_weight("default"), b.get_delta_weight("default"))
