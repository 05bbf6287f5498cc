"""Every combination of the axes, named as a preset or not: one formula, exactly nothing at the start, able to move."""

import itertools

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from helpers import relative_error
from offprincipal_peft import OffPrincipalLoraConfig

D, R, K, NULLITY = 24, 4, 2, 10
STARTS = [
    *itertools.product(("bottom", "top"), ("weight", "geora"), ("unit", "lora", "spectral", "native")),
    *itertools.product(("null", "random", "kaiming"), ("weight",), ("unit", "lora", "native")),
]
FACTORS = [pair for pair in itertools.product("AB2", "2AB") if pair not in {("A", "A"), ("B", "B")}]
PROJECTIONS = ("none", "output", "input", "both")


def weight(subspace: str) -> Tensor:
    """(D, D); with a null space on both sides where the start is to lie in it."""
    generator = torch.Generator().manual_seed(4)
    W = torch.randn(D, D, generator=generator, dtype=torch.float64)
    if subspace == "null":
        U, S, Vh = torch.linalg.svd(W)
        W = (U[:, :-NULLITY] * S[:-NULLITY]) @ Vh[:-NULLITY]
    return W


def adapted(subspace: str, source: str, scale: str, factors: str, trained: str, projection: str):
    config = OffPrincipalLoraConfig(
        r=R,
        lora_alpha=6,
        target_modules=["0"],
        init_subspace=subspace,
        init_source=source,
        init_scale=scale,
        init_factors=factors.replace("2", "both"),
        train_factors=trained.replace("2", "both"),
        projection=projection,
        principal_rank=K if projection != "none" else 0,
    )
    linear = nn.Linear(D, D, dtype=torch.float64)  # so that a null space is one to rounding
    linear.weight.data = weight(subspace)
    return get_peft_model(nn.Sequential(linear), config).base_model.model[0]


def values(layer: nn.Module) -> tuple[Tensor, Tensor]:
    return tuple(m["default"].weight.detach().double().clone() for m in (layer.lora_A, layer.lora_B))


def rows(factor: Tensor) -> Tensor:
    """(r, d), whichever of A (r, d_in) and B (d_out, r) it is."""
    return factor if factor.shape[0] == R else factor.T


def check_start(A: Tensor, B: Tensor, subspace: str, scale: str, factors: str) -> None:
    for factor, name in ((A, "A"), (B, "B")):
        if factors not in (name, "2"):
            assert not factor.any()
            continue
        gram = rows(factor) @ rows(factor).T
        if scale == "lora":
            gram = 3 * gram
        if scale in ("unit", "lora"):
            assert (gram.diagonal() - 1).abs().max() < 1e-12  # observed: 1.4e-15
        if scale != "spectral" and subspace != "kaiming":
            assert (gram - torch.eye(R).double()).abs().max() < 1e-12  # observed: 1.4e-15


@pytest.mark.parametrize(("subspace", "source", "scale"), STARTS, ids="-".join)
def test_one_formula(subspace, source, scale):
    W = weight(subspace)
    U, _, Vh = torch.linalg.svd(W)
    off_U = torch.eye(D).double() - U[:, :K] @ U[:, :K].T
    off_V = torch.eye(D).double() - Vh[:K].T @ Vh[:K]
    x = torch.randn(3, D, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    for (factors, trained), projection in itertools.product(FACTORS, PROJECTIONS):
        layer, case = adapted(subspace, source, scale, factors, trained, projection), (factors, trained, projection)
        A0, B0 = values(layer)
        check_start(A0, B0, subspace, scale, factors)
        y = layer(x)
        assert torch.equal(y, layer.get_base_layer()(x)), case
        y.square().sum().backward()
        parameters = {"A": layer.lora_A["default"].weight, "B": layer.lora_B["default"].weight}
        training = {name for name, p in parameters.items() if p.requires_grad}
        assert training == (set("AB") if trained == "2" else {trained}), case
        assert any(parameters[name].grad.any() for name in training), case
        for name in sorted(training):
            noise = torch.randn(parameters[name].shape, generator=generator, dtype=torch.float64)
            parameters[name].data += (0.3 * noise).to(parameters[name].dtype)
        A, B = values(layer)
        truth = 6 / R * (B @ A - B0 @ A0)
        truth = off_U @ truth if projection in ("output", "both") else truth
        truth = truth @ off_V if projection in ("input", "both") else truth
        # observed: at most 5.2e-16 and 2.5e-15
        assert relative_error(layer.get_delta_weight("default"), truth) < 1e-13, case
        assert relative_error(layer(x) - layer.get_base_layer()(x), x @ truth.T) < 1e-13, case


def test_the_combinations_are_all_there():
    assert (len(STARTS), len(FACTORS), len(PROJECTIONS)) == (25, 7, 4)


def test_the_lora_scale_is_the_norm_of_loras_own_rows():
    """Wide enough for the mean to be sharp: 64 rows of 512 uniform entries."""
    linear = nn.Linear(512, 80)
    config = {"r": 64, "target_modules": ["0"], "init_subspace": "kaiming"}
    norms = {}
    for scale in ("native", "lora"):
        model = get_peft_model(nn.Sequential(linear), OffPrincipalLoraConfig(init_scale=scale, **config))
        norms[scale] = values(model.base_model.model[0])[0].norm(dim=1)
    assert (norms["lora"] - 3**-0.5).abs().max() < 1e-6
    assert abs(norms["native"].mean() / norms["lora"].mean() - 1) < 0.01  # observed: 0.001
