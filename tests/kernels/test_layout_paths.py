"""The fast paths inside the layouts: scatters on several threads, block rows multiplied together, kept memory."""

import copy
import ctypes
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from helpers import relative_error
from offprincipal_peft.geometry.masks import expand_units
from offprincipal_peft.kernels import gradient_memory, layout_of, scatter
from offprincipal_peft.kernels.gradient_memory import GradientMemory
from offprincipal_peft.kernels.scatter import scatter_unique_

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int16, torch.bool]


@pytest.fixture(params=[1, 2, 3, 7])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def _positions(size: int, count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(size, generator=generator)[:count].sort().values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [0, 1, 2, 3, 31, 2000, 2001, 2006, 4096])
def test_scatter_is_plain_assignment(
    threads: int, count: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All counts around the cut into rows, up to every entry of the vector, in a view that starts off zero."""
    monkeypatch.setattr(scatter, "_PER_ROW", 2)
    positions = _positions(4096, count)
    buffer = torch.randn(5000).to(dtype)
    expected, kept = buffer.clone(), positions.clone()
    values = torch.randn(count).to(dtype)
    expected[positions + 100] = values
    scatter_unique_(buffer[100:4196], positions, values)
    assert torch.equal(buffer, expected)
    assert torch.equal(positions, kept)


def test_scatter_copies_bits() -> None:
    bits = torch.tensor([0x7FC1, 0x7F81, -32768, 0], dtype=torch.int16)  # NaNs with payloads, -0.0
    target = torch.zeros(9, dtype=torch.bfloat16)
    scatter_unique_(target, torch.tensor([1, 3, 4, 8]), bits.view(torch.bfloat16))
    assert torch.equal(target.view(torch.int16)[[1, 3, 4, 8]], bits)


def test_rows_counted_from_the_wrong_entry_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The broken variant: without each row's own origin the comparison above fails."""
    monkeypatch.setattr(scatter, "_PER_ROW", 2)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        positions, values = _positions(4096, 2000), torch.randn(2000)
        right, wrong = torch.zeros(4096), torch.zeros(4096)
        right[positions] = values
        rows = positions.view(2, 1000)
        wrong.as_strided((2, 4095), (1, 1)).scatter_(1, rows.clamp_max(4094), values.view(2, 1000))
        assert not torch.equal(right, wrong)
        scatter_unique_(wrong.zero_(), positions, values)
        assert torch.equal(right, wrong)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("density", [0.02, 0.15, 0.4, 0.9])
@pytest.mark.parametrize("shape", [(700, 330), (256, 64), (65, 1000), (1030, 200)], ids=str)
def test_blocks_multiplied_together_have_the_dense_gradient(shape: tuple[int, int], density: float) -> None:
    generator = torch.Generator().manual_seed(1)
    grid = (-(-shape[0] // 64), -(-shape[1] // 64))
    units = torch.rand(grid, generator=generator) < density
    units[-1, -1] = True  # the cut-off corner
    layout, mask = layout_of(units, shape, "block"), expand_units(units, shape, "block")
    x, grad = torch.randn(9, shape[1], generator=generator), torch.randn(9, shape[0], generator=generator)
    dense = torch.zeros(shape)
    layout.scatter_(dense, layout.gradient(grad, x))
    assert relative_error(dense, (grad.T @ x) * mask) < 1e-6  # seen 1.3e-7
    assert torch.equal(dense != 0, mask)
    assert torch.equal(layout.units(), units)


@pytest.mark.parametrize("structure", ["element", "row", "column", "block"])
def test_units_come_back(structure: str) -> None:
    shape = (130, 200)
    sizes = {"element": shape, "row": shape[:1], "column": shape[1:], "block": (3, 4)}
    units = torch.rand(sizes[structure], generator=torch.Generator().manual_seed(0)) < 0.4
    assert torch.equal(layout_of(units, shape, structure).units(), units)


def test_a_gradient_in_use_is_never_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_memory, "KEPT_BYTES", 64)
    memory, device = GradientMemory(), torch.device("cpu")
    first = memory.empty(100, device).fill_(1.0)
    view = first[10:]
    second = memory.empty(100, device).fill_(2.0)
    assert first.data_ptr() != second.data_ptr()
    pointer = first.data_ptr()
    del first
    third = memory.empty(100, device).fill_(3.0)
    assert view.eq(1.0).all(), "a view keeps the memory"
    assert second.eq(2.0).all()
    del view
    fourth = memory.empty(100, device)
    assert fourth.data_ptr() == pointer, "the memory is used again"
    assert third.eq(3.0).all()


def test_kept_gradients_of_two_steps_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through autograd: the gradient of the last step, kept by the user, survives the next backward."""
    monkeypatch.setattr(gradient_memory, "KEPT_BYTES", 64)
    layout = layout_of(torch.rand(40, 30, generator=torch.Generator().manual_seed(0)) < 0.5, (40, 30), "element")
    delta = torch.zeros(layout.count, requires_grad=True)
    kept, truth = [], []
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        x, grad = torch.randn(5, 30, generator=generator), torch.randn(5, 40, generator=generator)
        delta.grad = layout.gradient(grad, x)
        kept.append(delta.grad)
        truth.append(layout.gather(grad.T @ x))
        delta.grad = None
    for a, b in zip(kept, truth, strict=True):
        torch.testing.assert_close(a, b)


def test_small_gradients_and_copies_keep_nothing() -> None:
    memory = GradientMemory()
    memory.empty(100, torch.device("cpu"))
    assert not memory.free
    memory.free.append((ctypes.c_float * 3)())
    assert not copy.deepcopy(memory).free
    assert not pickle.loads(pickle.dumps(memory)).free
