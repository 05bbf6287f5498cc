"""Each preset against its papers' formulas, written out here with a full fp64 SVD and explicit projectors.

Nothing below calls the package's own starts or bases: what is compared is the layer as PEFT built it.
"""

from typing import NamedTuple

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from helpers import relative_error
from offprincipal_peft import OffPrincipalLoraConfig

# (d_out, d_in). In the nearly square ones the null space is smaller than every rank used here, in the others
# it is empty or larger.
SHAPES = {
    "square": (24, 24),
    "tall": (44, 20),
    "wide": (20, 44),
    "nearly_tall": (28, 25),
    "nearly_wide": (25, 28),
}
RANK, ALPHA, FRACTION = 5, 8, 0.2
OPTIONS = {
    "plain": {},
    "patterns": {"rank_pattern": {"tall": 7, "nearly_.*": 4}, "alpha_pattern": {"wide": 3, "square": 20.5}},
    "rslora": {"use_rslora": True, "rank_pattern": {"nearly_wide": 6}},
}
RANKS = {
    "plain": {},
    "patterns": {"tall": 7, "nearly_tall": 4, "nearly_wide": 4},
    "rslora": {"nearly_wide": 6},
}
ALPHAS = {"plain": {}, "patterns": {"wide": 3, "square": 20.5}, "rslora": {}}


class Start(NamedTuple):
    """What a paper starts from; None where it is a free draw."""

    A: Tensor | None  # (r, d_in), fp64
    B: Tensor  # (d_out, r), fp64


class Full(NamedTuple):
    """W = U[:, :n] diag(S) V[:, :n]^T with n = min(shape), fp64."""

    U: Tensor  # (d_out, d_out)
    S: Tensor  # (n,), descending
    V: Tensor  # (d_in, d_in)


def full_svd(W: Tensor) -> Full:
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=True)
    return Full(U, S, Vh.T)


def zeros(W: Tensor, r: int) -> Start:
    return Start(torch.zeros(r, W.shape[1]).double(), torch.zeros(W.shape[0], r).double())


def pair(svd: Full, kept: slice, scale: Tensor | float) -> Start:
    """Triplets `kept` of the thin SVD, each factor times `scale`."""
    n = len(svd.S)
    return Start((svd.V[:, :n][:, kept] * scale).T, svd.U[:, :n][:, kept] * scale)


def masked_for_geora(W: Tensor, r: int) -> Tensor:
    """W on the fifth of its entries with the smallest |rank-r reconstruction| and on the fifth with smallest |W|."""
    U, S, V = full_svd(W)
    reconstruction = U[:, :r] @ torch.diag(S[:r]) @ V[:, :r].T
    kept = torch.zeros(W.numel(), dtype=torch.bool)
    for score in (reconstruction.abs(), W.double().abs()):
        kept[score.flatten().sort(stable=True).indices[: round(0.2 * W.numel())]] = True
    return W.double() * kept.view(W.shape)


def paper_start(preset: str, W: Tensor, r: int, s: float) -> Start:
    """The start in the papers' terms; W (d_out, d_in), s the LoRA scaling."""
    svd = full_svd(W)
    first, last, n = slice(None, r), slice(len(svd.S) - r, None), len(svd.S)
    match preset:
        case "lora" | "offprincipal-random":  # drawn
            return Start(None, torch.zeros(W.shape[0], r).double())
        case "pissa":
            return pair(svd, first, (svd.S[first] / s).sqrt())
        case "milora":
            return pair(svd, last, (svd.S[last] / s).sqrt())
        case "olora-tail":
            return pair(svd, last, 1.0)
        case "mica":
            return Start(zeros(W, r).A, svd.U[:, -r:])
        case "rlpo":
            return Start(svd.V[:, :r].T, zeros(W, r).B)
        case "rlmo" | "offprincipal":
            return Start(svd.V[:, -r:].T, zeros(W, r).B)
        case "geora":
            masked = full_svd(masked_for_geora(W, r))
            assert len(masked.S) == n
            return pair(masked, first, (masked.S[first] / s).sqrt())
    raise AssertionError(f"no transcription of {preset}")


def paper_delta(preset: str, W: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """dW (d_out, d_in) in fp64 for the factors A (r, d_in), B (d_out, r)."""
    A, B = A.double(), B.double()
    if preset in ("lora", "mica", "rlpo", "rlmo"):
        return s * B @ A
    if preset.startswith("offprincipal"):
        U, S, V = full_svd(W)
        k = max(1, int(FRACTION * len(S)))
        off_U = torch.eye(W.shape[0]).double() - U[:, :k] @ U[:, :k].T
        off_V = torch.eye(W.shape[1]).double() - V[:, :k] @ V[:, :k].T
        return s * off_U @ B @ A @ off_V
    # The original writes the residual W - s B0 A0 into the base and adds s B A.
    start = paper_start(preset, W, A.shape[0], s)
    residual = W.double() - s * start.B @ start.A
    return residual + s * B @ A - W.double()


TRAINED = {"mica": {"lora_A"}}  # the others train both
STORED = {
    "lora": {"lora_A", "lora_B"},
    "pissa": {"lora_A", "lora_B", "lora_start_A", "lora_start_B"},
    "milora": {"lora_A", "lora_B", "lora_start_A", "lora_start_B"},
    "olora-tail": {"lora_A", "lora_B", "lora_start_A", "lora_start_B"},
    "mica": {"lora_A", "lora_B"},
    "rlpo": {"lora_A", "lora_B", "lora_start_A"},
    "rlmo": {"lora_A", "lora_B", "lora_start_A"},
    "geora": {"lora_A", "lora_B", "lora_start_A", "lora_start_B"},
    "offprincipal": {"lora_A", "lora_B", "lora_start_A", "lora_basis_U", "lora_basis_V"},
    "offprincipal-random": {"lora_A", "lora_B", "lora_basis_U", "lora_basis_V"},
}


class Host(nn.Module):
    """One linear layer of each shape."""

    def __init__(self, kind: type[nn.Module], dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        for name, (d_out, d_in) in SHAPES.items():
            layer = nn.Linear(d_in, d_out) if kind is nn.Linear else Conv1D(d_out, d_in)
            weight = torch.randn(d_out, d_in, generator=generator) / d_in**0.5
            layer.weight.data = (weight if kind is nn.Linear else weight.T.contiguous()).to(dtype)
            layer.bias.data = torch.randn(d_out, generator=generator).to(dtype)
            self.add_module(name, layer)


def adapted(preset: str, kind: type[nn.Module] = nn.Linear, dtype: torch.dtype = torch.float32, **options):
    """(the PEFT model, its adapter layers by shape name)"""
    if preset.startswith("offprincipal"):
        options.setdefault("principal_rank", FRACTION)
    config = OffPrincipalLoraConfig.preset(
        preset, **{"r": RANK, "lora_alpha": ALPHA, "target_modules": list(SHAPES), **options}
    )
    model = get_peft_model(Host(kind, dtype), config)
    return model, {name: getattr(model.base_model.model, name) for name in SHAPES}


def weight_of(layer: nn.Module) -> Tensor:
    weight = layer.get_base_layer().weight.detach().clone()
    return weight.T if isinstance(layer.get_base_layer(), Conv1D) else weight


def factors(layer: nn.Module) -> tuple[Tensor, Tensor]:
    return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()


def rank_and_scaling(options: str, name: str) -> tuple[int, float]:
    r, alpha = RANKS[options].get(name, RANK), ALPHAS[options].get(name, ALPHA)
    return r, alpha / r**0.5 if options == "rslora" else alpha / r


KINDS = pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
WITH_OPTIONS = pytest.mark.parametrize("options", OPTIONS)
PRESETS = pytest.mark.parametrize("preset", STORED)


def assert_same_directions(actual: Tensor, expected: Tensor, spectrum: Tensor, where: str) -> None:
    """Rows `actual`, `expected` (r, d) are orthonormal and span one subspace, as far as the spectrum settles it.

    `spectrum` (d,): the squared norm that each direction of this side of W has, with a zero for every null direction.
    Inside a null space larger than r any r directions are as good as any others.
    """
    r, d = expected.shape
    assert actual.shape == (r, d)
    actual = actual.double()
    # observed: at most 4.4e-8
    assert (actual @ actual.T - torch.eye(r).double()).abs().max() < 3e-7, where
    if spectrum[-r - 1] > 0:
        # observed: at most 4.4e-8
        assert (actual.T @ actual - expected.T @ expected).abs().max() < 3e-7, where


def side_spectrum(W: Tensor, side: int) -> Tensor:
    S = torch.linalg.svdvals(W.double())
    return torch.cat([S, torch.zeros(W.shape[side] - len(S)).double()])


@WITH_OPTIONS
@DTYPES
@KINDS
@pytest.mark.parametrize("preset", ["pissa", "milora", "olora-tail", "geora"])
def test_paired_starts(preset, kind, dtype, options):
    _, layers = adapted(preset, kind, dtype, **OPTIONS[options])
    for name, layer in layers.items():
        W, (A, B) = weight_of(layer), factors(layer)
        r, s = rank_and_scaling(options, name)
        assert layer.scaling["default"] == s
        truth = paper_start(preset, W, r, s)
        assert A.shape == truth.A.shape and B.shape == truth.B.shape
        # Paired flips of sign are all that is free: each row of A times its sign, and B's column times the same.
        sign = (A.double() * truth.A).sum(1).sign()
        # observed: at most 7.6e-8 for each factor and 1.4e-7 for the product: the fp32 in which they are kept
        assert relative_error(A * sign[:, None], truth.A) < 5e-7, name
        assert relative_error(B * sign, truth.B) < 5e-7, name
        assert relative_error(s * B.double() @ A.double(), s * truth.B @ truth.A) < 1e-6, name


@DTYPES
@KINDS
@pytest.mark.parametrize(("preset", "part"), [("pissa", slice(0, RANK)), ("milora", slice(-RANK, None))])
def test_a_spectral_start_is_the_truncated_weight(preset, part, kind, dtype):
    """s B0 A0 = U_r S_r V_r^T whatever s is, so the update starts where the paper's does."""
    for alpha in (1, 64):
        _, layers = adapted(preset, kind, dtype, lora_alpha=alpha)
        for name, layer in layers.items():
            W, (A, B) = weight_of(layer), factors(layer)
            U, S, V = full_svd(W)
            n = len(S)
            truncated = (U[:, :n][:, part] * S[part]) @ V[:, :n][:, part].T
            # observed: at most 1.3e-7
            assert relative_error(alpha / RANK * B.double() @ A.double(), truncated) < 1e-6, name


@WITH_OPTIONS
@DTYPES
@KINDS
@pytest.mark.parametrize("preset", ["rlpo", "rlmo", "offprincipal", "mica"])
def test_one_sided_starts(preset, kind, dtype, options):
    _, layers = adapted(preset, kind, dtype, **OPTIONS[options])
    for name, layer in layers.items():
        W, (A, B) = weight_of(layer), factors(layer)
        r, s = rank_and_scaling(options, name)
        assert layer.scaling["default"] == s
        truth = paper_start(preset, W, r, s)
        if preset == "mica":
            started, expected, zero, side = B.T, truth.B.T, A, 0
        else:
            started, expected, zero, side = A, truth.A, B, 1
        assert zero.shape == (truth.A if preset == "mica" else truth.B).shape
        assert not zero.any()
        if preset == "rlpo":
            signs = (started.double() * expected).sum(1).sign()
            # observed: at most 3.1e-8
            assert relative_error(started * signs[:, None], expected) < 3e-7, name
            continue
        spectrum = side_spectrum(W, side)
        assert_same_directions(started, expected, spectrum, name)
        # The energy of W in these directions is the smallest that r orthonormal directions can have.
        along = W.double() @ started.double().T if side else W.double().T @ started.double().T
        least = spectrum[-r:].norm()
        # observed: at most 2.9e-8 sigma_1 above it
        assert along.norm() <= least + 3e-7 * spectrum[0], name


@WITH_OPTIONS
@DTYPES
@KINDS
def test_a_random_start_has_loras_norm_and_no_direction(kind, dtype, options):
    """Orthonormal rows times 1 / sqrt(3) from the seed and the layer's name, whatever the weight is."""
    starts = {}
    for seed in (0, 0, 1):
        _, layers = adapted("offprincipal-random", kind, dtype, seed=seed, **OPTIONS[options])
        for name, layer in layers.items():
            (A, B), (r, _) = factors(layer), rank_and_scaling(options, name)
            assert A.shape[0] == r and not B.any()
            # observed: at most 1.1e-8
            assert (A.double() @ A.double().T - torch.eye(r).double() / 3).abs().max() < 1e-7, name
            starts.setdefault((seed, name), []).append(A)
    for name in SHAPES:
        assert torch.equal(*starts[0, name])
        assert not torch.equal(starts[0, name][0], starts[1, name][0])


def perturb(layers: dict[str, nn.Module], scale: float) -> None:
    """Noise of `scale` times a factor's typical entry on every factor that trains."""
    generator = torch.Generator().manual_seed(11)
    for layer in layers.values():
        for container in (layer.lora_A, layer.lora_B):
            parameter = container["default"].weight
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data += scale / max(parameter.shape) ** 0.5 * noise


@WITH_OPTIONS
@DTYPES
@KINDS
@PRESETS
def test_the_update_of_a_moved_adapter(preset, kind, dtype, options):
    model, layers = adapted(preset, kind, dtype, **OPTIONS[options])
    model.eval()
    perturb(layers, scale=0.5)
    for name, layer in layers.items():
        W, (A, B) = weight_of(layer), factors(layer)
        r, s = rank_and_scaling(options, name)
        assert (A.dtype, A.shape, B.shape) == (torch.float32, (r, W.shape[1]), (W.shape[0], r))
        truth = paper_delta(preset, W, A, B, s)
        delta = layer.get_delta_weight("default")
        assert delta.shape == layer.get_base_layer().weight.shape
        # observed: at most 2e-7
        assert relative_error(delta.T if kind is Conv1D else delta, truth) < 1e-6, name
        x = torch.randn(3, 6, W.shape[1], generator=torch.Generator().manual_seed(5)).to(dtype)
        expected = x.double() @ (W.double() + truth).T + layer.get_base_layer().bias.double()
        y = layer(x)
        assert y.dtype == dtype
        # observed: at most 1.3e-7 in fp32; in bf16 2.6e-3, from rounding the base's output and then the sum
        assert relative_error(y, expected) < (1e-6 if dtype == torch.float32 else 4e-3), name


@pytest.mark.parametrize("preset", ["pissa", "offprincipal"])
def test_another_formula_would_be_seen(preset):
    """The tolerances above tell the start, the scaling and the projection apart from their absence."""
    model, layers = adapted(preset)
    model.eval()
    perturb(layers, scale=0.5)
    for layer in layers.values():
        W, (A, B), s = weight_of(layer), factors(layer), ALPHA / RANK
        delta = layer.get_delta_weight("default")
        wrong = [paper_delta("rlmo", W, A, B, s), paper_delta(preset, W, A, B, 1.01 * s)]
        # observed: 0.0099 to 0.020 for one per cent of scaling, 0.37 to 0.83 without the start or the projection
        assert min(relative_error(delta, other) for other in wrong) > 5e-3


@PRESETS
def test_which_factors_train(preset):
    model, _ = adapted(preset)
    trained = {(name.split(".")[-4], name.split(".")[-3]) for name, p in model.named_parameters() if p.requires_grad}
    expected = TRAINED.get(preset, {"lora_A", "lora_B"})
    assert trained == {(shape, factor) for shape in SHAPES for factor in expected}


@PRESETS
def test_what_is_stored(preset):
    model, _ = adapted(preset)
    keys = {tuple(key.split(".")[-3:]) for key in get_peft_model_state_dict(model)}
    assert keys == {(shape, part, "weight") for shape in SHAPES for part in STORED[preset]}


@PRESETS
def test_a_step_moves_what_trains_and_nothing_else(preset):
    model, layers = adapted(preset)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):  # where B starts at zero, A gets its first gradient in the second step
        loss = sum(layer(torch.ones(1, layer.in_features)).square().sum() for layer in layers.values())
        loss.backward()
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3).step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    assert moved


def test_the_projection_share_of_the_preset():
    """k is a fraction of min(shape), rounded down and at least 1."""
    _, layers = adapted("offprincipal", principal_rank=OffPrincipalLoraConfig.preset("offprincipal").principal_rank)
    assert {layer.lora_basis_U["default"].weight.shape[1] for layer in layers.values()} == {1}
    _, layers = adapted("offprincipal")
    for name, layer in layers.items():
        d_out, d_in = SHAPES[name]
        k = int(0.2 * min(SHAPES[name]))
        assert layer.lora_basis_U["default"].weight.shape == (d_out, k)
        assert layer.lora_basis_V["default"].weight.shape == (d_in, k)
