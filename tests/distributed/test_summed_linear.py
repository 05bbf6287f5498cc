"""The product on a weight that is not written against the product on one that is: the same bits."""

import pytest
import torch
from torch import Tensor

from offprincipal_peft.kernels import packed_linear, write_sum_
from offprincipal_peft.kernels.layout import Layout, layout_of
from offprincipal_peft.kernels.summed_linear import summed_linear

SHAPE = (40, 24)  # (d_out, d_in)
STRUCTURES = ("element", "dense element", "row", "column", "block")


def made(structure: str, shape: tuple[int, int], dtype: torch.dtype) -> tuple[Layout, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    grid = {"row": shape[:1], "column": shape[1:], "block": (-(-shape[0] // 8), -(-shape[1] // 8))}
    units = torch.rand(grid.get(structure, shape), generator=generator) < 0.5
    kind = structure.removeprefix("dense ")
    layout = layout_of(units, shape, kind, side=8, dense=structure.startswith("dense"))
    delta = layout.expand(torch.randn(layout.count, generator=generator)) * 0.1
    return layout, delta, torch.randn(shape, generator=generator).to(dtype)


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_same_bits_as_on_a_written_weight(structure: str, transposed: bool, dtype: torch.dtype, autocast: bool) -> None:
    stored = (SHAPE[1], SHAPE[0]) if transposed else SHAPE
    layout, values, weight = made(structure, stored, dtype)
    written, bias = weight.clone(), torch.randn(SHAPE[0]).to(dtype)
    write_sum_(written, layout, layout.gather(weight), values)
    assert not torch.equal(written, weight)
    before, found = weight.clone(), []
    for matrix, product in ((written, packed_linear), (weight, summed_linear)):
        x = torch.randn(3, 5, SHAPE[1], generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        delta = values.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = product(x, delta, matrix, bias, layout, transposed=transposed)
        out.float().square().sum().backward()
        found.append((out, x.grad, delta.grad))
    for expected, actual in zip(*found, strict=True):
        assert actual.dtype == expected.dtype and torch.equal(actual, expected)
    assert torch.equal(weight, before)


def test_a_narrower_update_is_summed_in_fp32() -> None:
    """As FSDP's mixed precision casts it for a forward."""
    layout, delta, weight = made("element", SHAPE, torch.bfloat16)
    narrow, x = delta.bfloat16(), torch.eye(SHAPE[1], dtype=torch.bfloat16)
    written = weight.clone()
    write_sum_(written, layout, layout.gather(weight), narrow.float())
    assert torch.equal(summed_linear(x, narrow, weight, None, layout).T, written)


@pytest.mark.parametrize("which", ["weight", "delta"])
def test_a_write_before_the_backward_is_noticed(which: str) -> None:
    layout, delta, weight = made("element", SHAPE, torch.float32)
    delta.requires_grad_()
    out = summed_linear(torch.randn(2, SHAPE[1], requires_grad=True), delta, weight, None, layout)
    with torch.no_grad():
        {"weight": weight, "delta": delta}[which].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
