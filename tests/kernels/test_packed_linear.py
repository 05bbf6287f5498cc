"""Layouts, the packed linear and the packed write against the dense truth of `reference.py`."""

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from helpers import relative_error
from offprincipal_peft.geometry.masks import MaskOptions, build_mask
from offprincipal_peft.kernels import layout_of, packed_linear, rewritten_linear, write_sum_
from offprincipal_peft.kernels.layout import CHUNK, ElementLayout, Layout
from offprincipal_peft.kernels.reference import masked_linear, masked_weight_gradient, written_weight

SHAPES = {"square": (96, 96), "tall": (600, 40), "wide": (40, 600), "ragged": (130, 70), "one row": (1, 50)}
STRUCTURES = ("element", "row", "column", "block")
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def _units(shape: tuple[int, int], structure: str, density: float = 0.3, seed: int = 0) -> Tensor:
    grid = {
        "element": shape,
        "row": shape[:1],
        "column": shape[1:],
        "block": (-(-shape[0] // 16), -(-shape[1] // 16)),
    }[structure]
    units = torch.rand(grid, generator=torch.Generator().manual_seed(seed)) < density
    units.view(-1)[-1] = True
    return units


def _layout(shape: tuple[int, int], structure: str, **options: float) -> Layout:
    return layout_of(_units(shape, structure, **options), shape, structure, side=16)


def _expanded(shape: tuple[int, int], structure: str) -> Tensor:
    """The mask, written down without any layout."""
    units = _units(shape, structure)
    mask = torch.zeros(shape, dtype=torch.bool)
    for i in range(shape[0]):
        for j in range(shape[1]):
            key = {"element": (i, j), "row": (i,), "column": (j,), "block": (i // 16, j // 16)}[structure]
            mask[i, j] = units[key]
    return mask


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_layout_names_the_entries_of_its_mask(shape: tuple[int, int], structure: str) -> None:
    layout, mask = _layout(shape, structure), _expanded(shape, structure)
    assert torch.equal(layout.mask(), mask)
    assert layout.count == int(mask.sum())
    matrix = torch.arange(shape[0] * shape[1]).view(shape)
    packed = layout.gather(matrix)
    assert torch.equal(packed.sort().values, matrix[mask])
    copy = torch.full_like(matrix, -1)
    layout.scatter_(copy, packed)
    assert torch.equal(copy, torch.where(mask, matrix, -1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gradient_is_the_masked_dense_one(shape: tuple[int, int], structure: str, dtype: torch.dtype) -> None:
    layout, mask = _layout(shape, structure), _expanded(shape, structure)
    x, grad = torch.randn(33, shape[1]).to(dtype), torch.randn(33, shape[0]).to(dtype)
    packed = layout.gradient(layout.needed_left(grad), layout.needed_right(x))
    dense = torch.zeros(shape, dtype=torch.float32)
    layout.scatter_(dense, packed)
    assert packed.dtype == torch.float32
    # seen 1.6e-7 (fp32, fp64: the packed values are fp32) and 1.5e-3 (bf16: another blocking rounds elsewhere)
    truth = masked_weight_gradient(x, grad, mask)
    assert relative_error(dense, truth) <= (4e-3 if dtype == torch.bfloat16 else 5e-7)


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_linear_and_its_gradients(structure: str, bias: bool, kind: type) -> None:
    d_out, d_in = 70, 40
    transposed = kind is Conv1D
    dense = torch.randn(d_in, d_out) if transposed else torch.randn(d_out, d_in)
    b = torch.randn(d_out) if bias else None
    stored_shape = (dense.shape[0], dense.shape[1])
    layout, mask = _layout(stored_shape, structure), _expanded(stored_shape, structure)
    x1 = torch.randn(3, 5, d_in, requires_grad=True)
    x2 = x1.detach().clone().requires_grad_()
    delta = torch.zeros(layout.count, requires_grad=True)
    out = packed_linear(x1, delta, dense, b, layout, transposed=transposed)
    twin_weight = dense.clone().requires_grad_()
    logical, logical_mask = (twin_weight.T, mask.T) if transposed else (twin_weight, mask)
    twin = masked_linear(x2, logical, b, logical_mask)
    torch.testing.assert_close(out, twin)
    upstream = torch.randn_like(out)
    out.backward(upstream)
    twin.backward(upstream)
    torch.testing.assert_close(x1.grad, x2.grad)
    torch.testing.assert_close(delta.grad, layout.gather(twin_weight.grad))
    assert not dense.requires_grad


def test_fp32_bits_equal_the_dense_layer_where_the_arithmetic_is_the_same() -> None:
    """One row block: the same product of the same operands, so the same bits."""
    weight, x, upstream = torch.randn(64, 48), torch.randn(20, 48), torch.randn(20, 64)
    layout = _layout((64, 48), "element")
    delta = torch.zeros(layout.count, requires_grad=True)
    packed_linear(x, delta, weight, None, layout).backward(upstream)
    assert torch.equal(delta.grad, layout.gather(upstream.T @ x))


def test_autocast_runs_in_its_dtype() -> None:
    weight, x = torch.randn(64, 48), torch.randn(20, 48, requires_grad=True)
    layout = _layout((64, 48), "element")
    delta = torch.zeros(layout.count, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = packed_linear(x, delta, weight, None, layout)
        assert torch.equal(out, nn.functional.linear(x, weight))
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert x.grad.dtype == torch.float32
    assert delta.grad.dtype == torch.float32


@pytest.mark.parametrize("structure", STRUCTURES)
def test_what_is_saved_for_the_backward(structure: str) -> None:
    """Column stripes save only the columns of x that they need; nothing of the weight's size is saved."""
    saved: list[int] = []
    layout = _layout((96, 96), structure)
    delta = torch.zeros(layout.count, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        packed_linear(torch.randn(7, 96), delta, torch.randn(96, 96), None, layout)
    columns = len(layout.stripes) if structure == "column" else 96
    assert saved == [7 * columns]


def test_before_backward_is_called_before_the_weight_is_read() -> None:
    weight, x = torch.randn(8, 6), torch.randn(4, 6, requires_grad=True)
    right = weight.clone()
    layout = _layout((8, 6), "element")
    delta = torch.zeros(layout.count, requires_grad=True)
    out = packed_linear(x, delta, weight, None, layout, before_backward=lambda: weight.copy_(right))
    weight.zero_()  # another adapter wrote its values in between
    out.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(4, 8) @ right)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_write_sum_is_the_rounded_sum_on_the_mask_and_nothing_elsewhere(structure: str, dtype: torch.dtype) -> None:
    shape = (130, 70)
    layout, mask = _layout(shape, structure), _expanded(shape, structure)
    weight = torch.randn(shape).to(dtype)
    original, delta = layout.gather(weight), 0.1 * torch.randn(layout.count)
    dense_delta = torch.zeros(shape)
    layout.scatter_(dense_delta, delta)
    expected = written_weight(weight, dense_delta[mask], mask)
    before = weight.clone()
    write_sum_(weight, layout, original, delta)
    assert torch.equal(weight, expected)
    assert torch.equal(weight[~mask], before[~mask])
    write_sum_(weight, layout, original, torch.zeros_like(delta))
    assert torch.equal(weight, before)


def test_more_entries_than_a_chunk_and_rows_than_a_block() -> None:
    shape = (1000, 800)
    layout = _layout(shape, "element", density=0.7)
    assert layout.count > CHUNK
    matrix = torch.randn(shape)
    copy = torch.zeros(shape)
    layout.scatter_(copy, layout.gather(matrix))
    assert torch.equal(copy, matrix * layout.mask())
    x, grad = torch.randn(9, 800), torch.randn(9, 1000)
    torch.testing.assert_close(layout.gradient(grad, x), layout.gather(grad.T @ x))


def test_row_blocks_without_entries_are_skipped() -> None:
    units = torch.zeros(1000, 8, dtype=torch.bool)
    units[900, 3] = True
    layout = layout_of(units, (1000, 8), "element")
    x, grad = torch.randn(5, 8), torch.randn(5, 1000)
    torch.testing.assert_close(layout.gradient(grad, x), (grad.T @ x)[900, 3:4])


def test_errors_name_what_was_wrong() -> None:
    with pytest.raises(ValueError, match=r"no element of the 4 x 5 matrix"):
        layout_of(torch.zeros(4, 5, dtype=torch.bool), (4, 5), "element")
    layout = _layout((8, 6), "element")
    good, values = torch.randn(8, 6), torch.zeros(layout.count)
    for arguments, words in [
        ((torch.randn(6, 8), layout, values, values), r"\(8, 6\) matrix, the weight is \(6, 8\)"),
        ((good, layout, values[1:], values), "entries, but"),
        ((good, layout, values.bfloat16(), values), "bfloat16, the weight is torch.float32"),
    ]:
        before = good.clone()
        with pytest.raises(ValueError, match=words):
            write_sum_(*arguments)
        assert torch.equal(good, before)


def test_masks_of_the_paper_go_through_a_layout() -> None:
    weight = torch.randn(128, 192) @ torch.diag(torch.rand(192) + 0.1)
    for structure in STRUCTURES:
        mask = build_mask(weight, "safe", MaskOptions(structure=structure))
        layout = layout_of(mask.units, (128, 192), structure)
        assert torch.equal(layout.mask(), mask.entries)


def test_the_comparison_sees_a_wrong_entry() -> None:
    """The gradient test above fails on a layout that keeps one entry too far."""
    layout = _layout((600, 40), "element")
    assert isinstance(layout, ElementLayout)
    x, grad = torch.randn(33, 40), torch.randn(33, 600)
    wrong = ElementLayout((600, 40), (layout.mask().view(-1).nonzero().squeeze(1).int() + 1).clamp_max(600 * 40 - 1))
    assert relative_error(wrong.gradient(grad, x), layout.gradient(grad, x)) > 0.5


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D], ids=["Linear", "Conv1D"])
def test_a_rewritten_weight_is_put_back_for_the_backward(kind: type) -> None:
    transposed = kind is Conv1D
    weight, other, bias = torch.randn(70, 40), torch.randn(70, 40), torch.randn(70)
    stored = (weight.T if transposed else weight).contiguous()
    original = stored.clone()
    x = torch.randn(5, 40, requires_grad=True)
    twin = x.detach().clone().requires_grad_()

    def put_back() -> None:
        stored.data.copy_(original)

    out = rewritten_linear(x, stored, bias, transposed=transposed, before_backward=put_back)
    assert relative_error(out, nn.functional.linear(twin, weight, bias)) <= 5e-7  # seen 1.3e-7
    stored.data.copy_(other.T if transposed else other)  # through .data: autograd does not notice
    out.square().sum().backward()
    nn.functional.linear(twin, weight, bias).square().sum().backward()
    assert x.grad is not None and twin.grad is not None
    assert relative_error(x.grad, twin.grad) <= 5e-7  # seen 1.7e-7


def test_without_being_put_back_the_gradient_is_of_the_other_weight() -> None:
    stored = torch.randn(70, 40)
    x = torch.randn(5, 40, requires_grad=True)
    out = rewritten_linear(x, stored, None, before_backward=lambda: None)
    stored.data.copy_(torch.randn(70, 40))
    out.sum().backward()
    assert x.grad is not None and relative_error(x.grad, stored.sum(0).expand(5, 40)) <= 5e-7
