"""MaskedAdamW against torch's fused AdamW on dense fp32 parameters, and the guard on every other optimiser."""

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from helpers import relative_error
from offprincipal_peft.geometry.precision import join_master, split_master
from offprincipal_peft.kernels.layout import Layout, layout_of
from offprincipal_peft.kernels.masked_adamw import MaskedAdamW
from offprincipal_peft.kernels.packed_update import PackedMaster, Precision, master_of, register_master
from offprincipal_peft.kernels.reference import adamw_step

STRUCTURES = ("element", "row", "column", "block")
# Ragged for blocks of 16, but a multiple of 16 entries: what is left over, torch's kernel rounds otherwise.
SHAPE = (136, 70)
WIDE, NARROW = (torch.float32, torch.float64), (torch.bfloat16, torch.float16)
OUT_OF_RANGE = [{k: v} for k in ("lr", "eps", "weight_decay") for v in (-1e-8, math.nan)]
OUT_OF_RANGE += [{"betas": b} for b in ((1.0, 0.9), (0.9, -0.1), (0.9, math.nan))]
HYPERPARAMETERS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "decay": {"lr": 3e-3, "weight_decay": 0.1},
    "betas": {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.01},
    "no momentum": {"lr": 1e-4, "betas": (0.0, 0.0), "eps": 1e-3},
}


def _fused(value: Tensor, grad: Tensor, moments: list[Tensor], number: int, **options: float) -> None:
    """One step of torch's kernel on dense tensors of one dtype."""
    fixed = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False, "maximize": False}
    first, second, count = moments[0], moments[1], torch.tensor(float(number))
    torch._fused_adamw_([value], [grad], [first], [second], [], [count], **{**fixed, **options})


def _train(optimizer: Optimizer, parameters: list[nn.Parameter], first: int, last: int) -> None:
    for number in range(first, last + 1):
        for parameter in parameters:
            grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.grad = grad.to(parameter.dtype)
        optimizer.step()


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


class TestPlainParameters:
    @pytest.mark.parametrize("name", HYPERPARAMETERS)
    def test_fp32_is_torchs_fused_adamw_bit_for_bit(self, name: str) -> None:
        options = {"weight_decay": 0.0, **HYPERPARAMETERS[name]}
        start = [torch.randn(37, 29), torch.randn(300), torch.randn(2, 3, 5), torch.tensor(0.5), torch.empty(0)]
        ours, torchs = ([nn.Parameter(t.clone()) for t in start] for _ in range(2))
        _train(MaskedAdamW(ours, **options), ours, 1, 50)
        _train(torch.optim.AdamW(torchs, fused=True, **options), torchs, 1, 50)
        for one, other, before in zip(ours, torchs, start, strict=True):
            assert torch.equal(one, other)
            assert not before.numel() or not torch.equal(one, before)

    @pytest.mark.parametrize("dtype", WIDE, ids=str)
    @pytest.mark.parametrize("name", HYPERPARAMETERS)
    def test_within_rounding_of_the_formula(self, name: str, dtype: torch.dtype) -> None:
        options = HYPERPARAMETERS[name]
        start = torch.randn(37, 29).to(dtype)
        parameter, truth = nn.Parameter(start.clone()), start.double()
        moments = [torch.zeros_like(truth), torch.zeros_like(truth)]
        optimizer = MaskedAdamW([parameter], moments="bf16" if dtype == torch.float64 else "fp32", **options)
        for number in range(1, 51):
            _train(optimizer, [parameter], number, number)
            adamw_step(truth, parameter.grad.double(), *moments, number, **{"lr": 1e-3, **options})
        # seen 1.6e-7 (defaults) to 8.5e-7 (betas) in fp32, 5.3e-18 in fp64
        assert relative_error(parameter, truth) <= (2e-6 if dtype == torch.float32 else 1e-15)
        assert optimizer.state[parameter]["exp_avg"].dtype == dtype  # fp64 never gets narrower moments

    @pytest.mark.parametrize("moments", ["fp32", "bf16"])
    @pytest.mark.parametrize("dtype", [torch.float32, *NARROW], ids=str)
    def test_narrow_parameters_and_moments_are_rounded_fp32_steps(self, dtype: torch.dtype, moments: str) -> None:
        """The twin steps in fp32 and rounds to nearest what is stored, after every step."""
        start = torch.randn(33, 32).to(dtype)
        parameter, twin = nn.Parameter(start.clone()), start.clone()
        narrow = torch.bfloat16 if moments == "bf16" else torch.float32
        stored = [torch.zeros(33, 32, dtype=narrow) for _ in range(2)]
        optimizer = MaskedAdamW([parameter], lr=1e-2, weight_decay=0.1, moments=moments)  # type: ignore[arg-type]
        for number in range(1, 51):
            _train(optimizer, [parameter], number, number)
            value, wide = twin.float(), [m.float() for m in stored]
            _fused(value, parameter.grad.float(), wide, number, lr=1e-2, weight_decay=0.1)
            twin.copy_(value)
            stored = [m.to(narrow) for m in wide]
        assert torch.equal(parameter, twin) and not torch.equal(parameter, start)
        for key, expected in zip(("exp_avg", "exp_avg_sq"), stored, strict=True):
            torch.testing.assert_close(optimizer.state[parameter][key], expected, rtol=0, atol=0)  # the dtype too

    @pytest.mark.parametrize("dtype", [*WIDE, *NARROW], ids=str)
    @pytest.mark.parametrize("moments", ["fp32", "bf16"])
    def test_a_transposed_parameter_trains_as_its_copy(self, dtype: torch.dtype, moments: Any) -> None:
        start = torch.randn(6, 8).to(dtype).T
        strided, whole = nn.Parameter(start.clone()), nn.Parameter(start.contiguous())
        assert not strided.is_contiguous()
        for parameter in (strided, whole):
            _train(MaskedAdamW([parameter], lr=0.1, weight_decay=0.1, moments=moments), [parameter], 1, 5)
        assert torch.equal(strided, whole)

    def test_more_entries_than_a_chunk(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("offprincipal_peft.kernels.masked_adamw.CHUNK", 100)
        for dtype, moments in [(torch.bfloat16, "fp32"), (torch.float32, "bf16")]:
            self.test_narrow_parameters_and_moments_are_rounded_fp32_steps(dtype, moments)

    def test_no_learning_rate_no_gradient_and_the_closure(self) -> None:
        still, idle = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(5))
        before = [still.detach().clone(), idle.detach().clone()]
        optimizer = MaskedAdamW([still, idle], lr=0.0, weight_decay=0.5)

        def closure() -> Tensor:
            loss = (still**2).sum()
            loss.backward()  # needs gradients, which a step otherwise has switched off
            return loss

        assert optimizer.step(closure) == (before[0] ** 2).sum()
        assert optimizer.step() is None
        assert torch.equal(still, before[0]) and torch.equal(idle, before[1])
        assert idle not in optimizer.state and optimizer.state[still]["step"] == 2

    @pytest.mark.parametrize("options", OUT_OF_RANGE, ids=str)
    def test_hyperparameters_out_of_range(self, options: dict[str, Any]) -> None:
        parameters = [nn.Parameter(torch.ones(2))]
        for groups, given in [(parameters, options), ([{"params": parameters, **options}], {})]:
            with pytest.raises(ValueError, match=f"{next(iter(options))} must (not be negative|lie in)"):
                MaskedAdamW(groups, **given)

    def test_other_refusals(self) -> None:
        parameter = nn.Parameter(torch.ones(3, 2))
        with pytest.raises(ValueError, match="moments must be 'fp32' or 'bf16', got 'fp16'"):
            MaskedAdamW([parameter], moments="fp16")  # type: ignore[arg-type]
        optimizer = MaskedAdamW([parameter])
        parameter.grad = torch.ones(3, 2).to_sparse()
        with pytest.raises(RuntimeError, match="takes dense gradients"):
            optimizer.step()
        assert torch.equal(parameter, torch.ones(3, 2)) and not optimizer.state


class _Master(PackedMaster):
    """A layer without the layer: the matrix is always written with this adapter's values."""

    def __init__(self, matrix: Tensor, layout: Layout, precision: Precision) -> None:
        self.matrix, self.layout, self.precision = matrix, layout, precision
        self.kept, self.steps, self.merged = layout.gather(matrix), 0, False
        low = split_master(self.kept.float())[1].view(torch.bfloat16)
        self.parameter = nn.Parameter(low if precision == "split" else self.kept.clone())
        self.parameter.grad_dtype = torch.float32
        register_master(self.parameter, self)

    def original(self) -> Tensor:
        return self.kept

    def current(self) -> Tensor:
        if self.merged:
            raise RuntimeError("merged")
        return self.matrix

    def stepped(self) -> None:
        self.steps += 1

    def values(self) -> Tensor:
        """The trained values: fp32 of a split master, bf16 otherwise."""
        value, high = self.parameter.detach(), self.layout.gather(self.matrix)
        return join_master(high, value.view(torch.int16)) if self.precision == "split" else value


def _weight(shape: tuple[int, int] = SHAPE) -> Tensor:
    return (0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).bfloat16()


def _layout(shape: tuple[int, int], structure: str = "element") -> Layout:
    rows, columns = shape
    grids = {"element": shape, "row": (rows,), "column": (columns,), "block": (-(-rows // 16), -(-columns // 16))}
    units = torch.rand(grids[structure], generator=torch.Generator().manual_seed(1)) < 0.3
    return layout_of(units, shape, structure, side=16)


def _gradient(shape: tuple[int, int], number: int) -> Tensor:
    """Of one sign more often than not in every entry, as gradients that move a weight are."""
    drift = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return drift + torch.randn(shape, generator=torch.Generator().manual_seed(number))


def _dense_master(weight: Tensor, mask: Tensor, steps: int, narrow: bool = False, **options: Any) -> Tensor:
    """The truth: a whole fp32 master under torch's AdamW with a masked gradient; decay of the update alone."""
    start, value = weight.float(), weight.float()
    moments = [torch.zeros_like(value), torch.zeros_like(value)]
    decay = options.pop("weight_decay", 0.0)
    for number in range(1, steps + 1):
        value -= (value - start) * (options["lr"] * decay)
        _fused(value, _gradient(value.shape, number) * mask, moments, number, **options)
        if narrow:
            moments = [m.bfloat16().float() for m in moments]
    return value


def _run(master: _Master, steps: int, optimizer: MaskedAdamW | None = None, first: int = 1, **options: Any) -> None:
    optimizer = optimizer or MaskedAdamW([master.parameter], **options)
    for number in range(first, first + steps):
        master.parameter.grad = master.layout.gather(_gradient(master.layout.shape, number))
        optimizer.step()


class TestSplitMaster:
    @pytest.mark.parametrize("moments", ["fp32", "bf16"])
    @pytest.mark.parametrize("options", [{"lr": 1e-6}, {"lr": 1e-4, "weight_decay": 10.0}], ids=str)
    @pytest.mark.parametrize("structure", STRUCTURES)
    def test_is_a_dense_fp32_master_bit_for_bit(self, structure: str, options: Any, moments: Any) -> None:
        weight, layout = _weight(), _layout(SHAPE, structure)
        master = _Master(weight.clone(), layout, "split")
        assert torch.equal(master.values(), layout.gather(weight).float())
        _run(master, 200, moments=moments, **options)
        truth = _dense_master(weight, layout.mask(), 200, narrow=moments == "bf16", **options)
        assert torch.equal(master.values(), layout.gather(truth))
        assert torch.equal(_bits(master.matrix), _bits(torch.where(layout.mask(), split_master(truth)[0], weight)))
        assert not torch.equal(master.matrix, weight) and master.steps == 200

    @pytest.mark.parametrize("structure", STRUCTURES)
    def test_chunks(self, structure: str, monkeypatch: pytest.MonkeyPatch) -> None:
        for module in ("layout", "masked_adamw"):
            monkeypatch.setattr(f"offprincipal_peft.kernels.{module}.CHUNK", 120)
        assert len(list(_layout(SHAPE, structure).chunks())) > 5
        self.test_is_a_dense_fp32_master_bit_for_bit(structure, {"lr": 1e-4, "weight_decay": 10.0}, "bf16")

    def test_decay_pulls_the_update_to_zero_and_not_the_weight(self) -> None:
        for precision in ("split", "bf16"):
            master = _Master(_weight(), _layout(SHAPE), precision)  # type: ignore[arg-type]
            optimizer = MaskedAdamW([master.parameter], lr=1e-3)
            _run(master, 20, optimizer)
            assert float((master.values() - master.kept).abs().mean()) > 0.005  # seen 0.011
            optimizer.param_groups[0].update(lr=1.0, weight_decay=1.0, eps=1e30)
            optimizer.step()
            torch.testing.assert_close(master.values().float(), master.kept.float(), rtol=0, atol=1e-8)

    def test_what_a_low_learning_rate_changes(self) -> None:
        """200 steps at lr 1e-6: nearest rounding loses nearly all of them, the split master none."""
        weight, layout = _weight((256, 256)), _layout((256, 256))
        before, truth = layout.gather(weight), layout.gather(_dense_master(weight, layout.mask(), 200, lr=1e-6))
        changed = {"dense": float((truth.bfloat16() != before).float().mean())}
        for precision in ("split", "bf16", "bf16-stochastic"):
            master = _Master(weight.clone(), layout, precision)  # type: ignore[arg-type]
            _run(master, 200, lr=1e-6)
            now = layout.gather(master.matrix) if precision == "split" else master.values()
            changed[precision] = float((now != before).float().mean())
            assert precision == "split" or torch.equal(master.matrix, weight)  # the owner writes those, not a step
        assert changed["split"] == changed["dense"] > 0.9  # seen 98.5 %
        assert changed["bf16"] < 0.03  # seen 1.9 %
        assert 0.7 < changed["bf16-stochastic"] < 0.8  # seen 75.9 %

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
    @pytest.mark.parametrize("precision", ["split", "bf16"])
    def test_a_gradient_of_another_dtype_is_taken_by_its_value(self, precision: Precision, dtype: torch.dtype) -> None:
        one, other = (_Master(_weight(), _layout(SHAPE), precision) for _ in range(2))
        grad = torch.randn(one.layout.count).bfloat16()
        one.parameter.grad_dtype, one.parameter.grad, other.parameter.grad = dtype, grad.to(dtype), grad.float()
        MaskedAdamW([one.parameter, other.parameter]).step()
        assert torch.equal(one.values(), other.values()) and not torch.equal(one.values(), one.kept)

    def test_a_weight_that_is_not_ready_is_refused_before_anything_changes(self) -> None:
        master = _Master(_weight(), _layout(SHAPE), "split")
        before, low = master.matrix.clone(), _bits(master.parameter).clone()
        master.merged, optimizer = True, MaskedAdamW([master.parameter])
        with pytest.raises(RuntimeError, match="merged"):
            _run(master, 1, optimizer)
        assert torch.equal(master.matrix, before) and torch.equal(_bits(master.parameter), low)
        assert not optimizer.state and master.steps == 0


def _stochastic(seed: int, before: int = 0) -> Tensor:
    """The values after three steps, `before` other parameters standing first in the optimiser."""
    master = _Master(_weight(), _layout(SHAPE), "bf16-stochastic")
    idle = [nn.Parameter(torch.ones(1)) for _ in range(before)]
    _run(master, 3, MaskedAdamW([*idle, master.parameter], lr=1e-5, seed=seed))
    return master.values()


class TestStochasticPrecision:
    def test_every_step_draws_anew(self) -> None:
        """Without momentum the same gradient from the same value gives the same sum: only the noise differs."""
        master = _Master(_weight(), _layout(SHAPE), "bf16-stochastic")
        optimizer, after = MaskedAdamW([master.parameter], lr=1e-5, betas=(0.0, 0.0)), []
        for _ in range(2):
            master.parameter.data.copy_(master.kept)
            _run(master, 1, optimizer)
            after.append(master.values().clone())
        assert not torch.equal(*after)

    @pytest.mark.parametrize(("seed", "before"), [(1, 0), (0, 1), (256, 0), (0, 256), (20260101, 0)])
    def test_seed_and_position_decide(self, seed: int, before: int) -> None:
        """All of both has to reach the 32 bits of its seed that a CPU generator takes."""
        first = _stochastic(0)
        torch.manual_seed(9)
        assert torch.equal(first, _stochastic(0))  # whatever the global generator holds
        assert not torch.equal(first, _stochastic(seed, before))


def _resumed(load: Callable[..., None], precision: Precision | None, moments: Any) -> tuple[Tensor, Tensor]:
    """The bits of a run of 20 steps, and of one that was saved after 10 and read from a file by ``load``."""
    results = []
    for resume in (False, True):
        master = _Master(_weight(), _layout(SHAPE), precision or "bf16")
        if precision is None:
            master.parameter = nn.Parameter(master.kept.float())  # not registered: an fp32 parameter
        options: Any = {"lr": 1e-4, "weight_decay": 0.1, "moments": moments}
        optimizer = MaskedAdamW([master.parameter], seed=5, **options)
        _run(master, 10, optimizer)
        if resume:
            torch.save(optimizer.state_dict(), file := io.BytesIO())
            optimizer = MaskedAdamW([master.parameter], **options)
            load(optimizer, torch.load(io.BytesIO(file.getvalue()), weights_only=True))
        _run(master, 10, optimizer, first=11)
        results.append(torch.cat([_bits(t).flatten().int() for t in (master.parameter, master.matrix)]))
    return results[0], results[1]


class TestStateDict:
    @pytest.mark.parametrize("moments", ["fp32", "bf16"])
    @pytest.mark.parametrize("precision", [None, "split", "bf16", "bf16-stochastic"], ids=str)
    def test_a_resumed_run_repeats_an_uninterrupted_one(self, precision: Precision | None, moments: str) -> None:
        assert torch.equal(*_resumed(MaskedAdamW.load_state_dict, precision, moments))

    @pytest.mark.parametrize(("precision", "moments"), [(None, "bf16"), ("split", "fp32"), ("bf16-stochastic", "fp32")])
    def test_torchs_own_load_does_not(self, precision: Precision | None, moments: str) -> None:
        """It keeps bf16 moments as fp32 and fp32 ones of a bf16 parameter as bf16."""
        assert not torch.equal(*_resumed(Optimizer.load_state_dict, precision, moments))

    def test_moments_keep_their_dtype_and_are_not_shared(self) -> None:
        parameter, other = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
        optimizer, second = (MaskedAdamW([p], moments="bf16") for p in (parameter, other))
        _train(optimizer, [parameter], 1, 2)
        saved = optimizer.state_dict()
        second.load_state_dict(saved)
        mine, theirs = optimizer.state[parameter]["exp_avg_sq"], second.state[other]["exp_avg_sq"]
        assert theirs.dtype == torch.bfloat16 and torch.equal(mine, theirs) and mine.data_ptr() != theirs.data_ptr()
        with pytest.raises(ValueError, match="the saved state has bf16 moments, this optimiser was made with fp32"):
            MaskedAdamW([other]).load_state_dict(saved)

    def test_a_copied_optimiser_steps(self) -> None:
        optimizer = copy.deepcopy(MaskedAdamW([nn.Parameter(torch.ones(4))], moments="bf16"))
        (parameter,) = optimizer.param_groups[0]["params"]
        _train(optimizer, [parameter], 1, 1)
        assert optimizer.state[parameter]["exp_avg"].dtype == torch.bfloat16


class _OwnOptimizer(Optimizer):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.zero_()


FOREIGN: dict[str, Any] = {
    **{f"AdamW {k}": lambda p, k=k: torch.optim.AdamW(p, **{k: True}) for k in ("foreach", "fused")},
    "AdamW": torch.optim.AdamW,
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "own": lambda p: _OwnOptimizer(p, {}),
}


class TestForeignOptimizers:
    @pytest.mark.parametrize("precision", ["split", "bf16", "bf16-stochastic"])
    @pytest.mark.parametrize("name", FOREIGN)
    def test_refused_and_nothing_changed(self, name: str, precision: Precision) -> None:
        master, plain = _Master(_weight(), _layout(SHAPE), precision), nn.Parameter(torch.ones(3))
        optimizer = FOREIGN[name]([plain, master.parameter])
        plain.grad, master.parameter.grad = torch.ones(3), torch.ones(master.layout.count)
        before, matrix = _bits(master.parameter).clone(), master.matrix.clone()
        with pytest.raises(RuntimeError, match=rf"^\S+{type(optimizer).__name__} cannot .*'{precision}'.*MaskedAdamW"):
            optimizer.step()
        assert torch.equal(_bits(master.parameter), before) and torch.equal(master.matrix, matrix)
        assert torch.equal(plain, torch.ones(3)) and not optimizer.state
        MaskedAdamW([plain, master.parameter]).step()
        assert not torch.equal(_bits(master.parameter), before)

    @pytest.mark.parametrize("name", FOREIGN)
    def test_other_parameters_are_theirs_and_a_dead_master_is_no_one(self, name: str) -> None:
        master, plain = _Master(_weight(), _layout(SHAPE), "bf16"), nn.Parameter(torch.ones(3))
        parameter, plain.grad = master.parameter, torch.ones(3)
        FOREIGN[name]([plain]).step()
        assert master_of(parameter) is master
        del master
        assert master_of(parameter) is None
        FOREIGN[name]([parameter, plain]).step()

    def test_without_the_guard_another_ruins_a_split_master(self, monkeypatch: pytest.MonkeyPatch) -> None:
        master = _Master(_weight(), _layout(SHAPE), "split")
        _run(master, 3, lr=1e-4)
        before = master.values()
        monkeypatch.setattr(_OwnOptimizer, "knows_packed_masters", True, raising=False)
        _OwnOptimizer([master.parameter], {}).step()
        assert not torch.equal(master.values(), before)
