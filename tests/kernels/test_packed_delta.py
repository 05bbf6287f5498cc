"""The product with a packed update alone against the same product with a dense matrix."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from helpers import relative_error
from offprincipal_peft.kernels import packed_delta_linear
from offprincipal_peft.kernels.layout import Layout, layout_of

SHAPES = {"square": (96, 96), "tall": (600, 40), "wide": (40, 600), "ragged": (130, 70)}
STRUCTURES = ("element", "dense element", "row", "column", "block")
# seen 2.1e-7 (fp32), 2.6e-8 (fp64: layouts deliver the gradient of delta in fp32), 0 (bf16)
BOUNDS = {torch.float32: 5e-7, torch.float64: 2e-7, torch.bfloat16: 4e-3}


def _layout(shape: tuple[int, int], structure: str) -> Layout:
    grid = {"row": shape[:1], "column": shape[1:], "block": (-(-shape[0] // 16), -(-shape[1] // 16))}.get(
        structure, shape
    )
    units = torch.rand(grid, generator=torch.Generator().manual_seed(0)) < 0.4
    units.view(-1)[-1] = True
    return layout_of(units, shape, structure.removeprefix("dense "), side=16, dense=structure.startswith("dense"))


def _values(layout: Layout, dtype: torch.dtype) -> Tensor:
    values = torch.randn(layout.count, generator=torch.Generator().manual_seed(1)).to(dtype)
    return layout.expand(values).requires_grad_()


def _by_hand(values: Tensor, layout: Layout) -> Tensor:
    """The dense update, entry by entry."""
    dense = torch.zeros(layout.shape, dtype=values.dtype)
    positions = torch.arange(layout.shape[0] * layout.shape[1]).view(layout.shape)
    for place, value in zip(layout.compress(layout.gather(positions)), layout.compress(values.detach()), strict=True):
        dense.view(-1)[place] = value
    return dense


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_product_and_gradients(shape: tuple[int, int], structure: str, dtype: torch.dtype) -> None:
    layout = _layout(shape, structure)
    delta = _values(layout, torch.promote_types(dtype, torch.float32))
    x = torch.randn(2, 9, shape[1], dtype=dtype).requires_grad_()
    x_twin = x.detach().clone().requires_grad_()
    dense = _by_hand(delta, layout).to(dtype).requires_grad_()
    out, truth = packed_delta_linear(x, delta, layout), F.linear(x_twin, dense)
    assert out.dtype == dtype and relative_error(out, truth) <= BOUNDS[dtype]
    grad = torch.randn_like(out)
    out.backward(grad)
    truth.backward(grad)
    assert delta.grad is not None and dense.grad is not None and x.grad is not None and x_twin.grad is not None
    assert relative_error(x.grad, x_twin.grad) <= BOUNDS[dtype]
    masked = layout.gather(torch.where(layout.mask(), dense.grad, 0))
    assert relative_error(delta.grad, masked) <= BOUNDS[dtype]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_parameter_keeps_its_values(structure: str) -> None:
    layout = _layout((96, 96), structure)
    delta = _values(layout, torch.float32)
    before = delta.detach().clone()
    packed_delta_linear(torch.randn(3, 96, requires_grad=True), delta, layout).sum().backward()
    assert torch.equal(delta, before)


def test_autocast_computes_in_its_dtype() -> None:
    layout = _layout((96, 96), "element")
    delta, x = _values(layout, torch.float32), torch.randn(3, 96)
    with torch.autocast("cpu", torch.bfloat16):
        out = packed_delta_linear(x, delta, layout)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, packed_delta_linear(x.bfloat16(), delta, layout))
    out.sum().backward()
    assert delta.grad is not None and delta.grad.dtype == torch.float32


def test_a_write_between_forward_and_backward_is_refused() -> None:
    layout = _layout((96, 96), "element")
    delta = _values(layout, torch.float32)
    out = packed_delta_linear(torch.randn(3, 96, requires_grad=True), delta, layout)
    with torch.no_grad():
        delta.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_no_dense_matrix_stays_for_the_backward() -> None:
    """What autograd holds between the two is the input and the packed values."""
    layout, saved = _layout((96, 96), "element"), []
    delta, x = _values(layout, torch.float32), torch.randn(3, 96, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        packed_delta_linear(x, delta, layout)
    assert max(saved) < 96 * 96, saved


def test_zero_values_add_nothing() -> None:
    layout = _layout((96, 96), "row")
    delta = torch.zeros(layout.slots, requires_grad=True)
    y = torch.randn(3, 96)
    assert torch.equal(y + packed_delta_linear(torch.randn(3, 96), delta, layout), y)
