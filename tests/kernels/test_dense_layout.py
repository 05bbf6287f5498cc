"""Dense slots for masks that name most entries: the packed layout's results, by another road."""

import pytest
import torch
from torch import Tensor

from offprincipal_peft.kernels import MaskedAdamW, layout_of, packed_linear, write_sum_, write_values_
from offprincipal_peft.kernels.layout import Layout
from offprincipal_peft.kernels.packed_update import PackedMaster, register_master
from offprincipal_peft.kernels.reference import masked_weight_gradient

SHAPES = [(300, 70), (64, 48), (1, 40), (2100, 3)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def _pair(shape: tuple[int, int], density: float = 0.74) -> tuple[Layout, Layout, Tensor]:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < density
    mask[0, :2] = torch.tensor([True, False])
    return layout_of(mask, shape, "element", dense=True), layout_of(mask, shape, "element"), mask


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_slots_and_entries(shape: tuple[int, int]) -> None:
    dense, packed, mask = _pair(shape)
    assert (dense.slots, dense.count, packed.slots) == (mask.numel(), packed.count, packed.count)
    assert torch.equal(dense.units(), mask) and torch.equal(dense.mask(), mask)
    values = torch.randn(packed.count)
    slots = dense.expand(values)
    assert torch.equal(dense.compress(slots), values)
    assert torch.equal(slots.view(shape) != 0, mask)
    assert packed.compress(values) is values and packed.expand(values) is values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient_is_the_dense_one_masked(shape: tuple[int, int], dtype: torch.dtype) -> None:
    dense, packed, mask = _pair(shape)
    x, grad = torch.randn(9, shape[1]).to(dtype), torch.randn(9, shape[0]).to(dtype)
    found = dense.gradient(grad, x)
    truth = masked_weight_gradient(x, grad, mask).float()
    torch.testing.assert_close(found.view(shape), truth)
    assert torch.equal(dense.compress(found), packed.gradient(grad, x))  # the same products, bit for bit
    assert bool((found.view(shape)[~mask] == 0).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_written_is_what_the_packed_layout_writes(dtype: torch.dtype) -> None:
    dense, packed, mask = _pair((300, 70))
    weight = torch.randn(300, 70).to(dtype)
    weight[~mask] = torch.tensor(-0.0, dtype=dtype)  # a sum with zero would lose the sign
    one, other = weight.clone(), weight.clone()
    delta = 0.1 * torch.randn(packed.count, dtype=torch.promote_types(dtype, torch.float32))
    slots = dense.expand(delta) + torch.where(mask.view(-1), 0.0, 7.0)  # an optimiser that moved frozen slots
    original = dense.gather(one)
    write_sum_(one, dense, original, slots)
    write_sum_(other, packed, packed.gather(other), delta)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    assert torch.equal(one.view(bits), other.view(bits))
    kept = original.clone()
    write_values_(one, dense, original)
    assert torch.equal(one.view(bits), weight.view(bits))
    assert torch.equal(original.view(bits), kept.view(bits)), "the kept entries are not used as scratch"


def test_without_the_mask_frozen_entries_would_move() -> None:
    """The broken variant: the sum written everywhere."""
    dense, _, mask = _pair((300, 70))
    weight = torch.full((300, 70), -0.0, dtype=torch.bfloat16)
    plain = (weight.float() + dense.expand(torch.zeros(dense.count)).view(300, 70)).bfloat16()
    assert not torch.equal(plain.view(torch.int16)[~mask], weight.view(torch.int16)[~mask])


def test_through_the_packed_linear() -> None:
    dense, packed, _ = _pair((300, 70))
    weight, x, upstream = torch.randn(300, 70), torch.randn(5, 70, requires_grad=True), torch.randn(5, 300)
    slots, entries = torch.zeros(dense.slots, requires_grad=True), torch.zeros(packed.count, requires_grad=True)
    packed_linear(x, slots, weight, None, dense).backward(upstream)
    packed_linear(x, entries, weight, None, packed).backward(upstream)
    assert torch.equal(dense.compress(slots.grad), entries.grad)


class _Master(PackedMaster):
    precision = "split"

    def __init__(self, matrix: Tensor, layout: Layout) -> None:
        self.matrix, self.layout, self.start = matrix, layout, layout.gather(matrix)
        self.parameter = torch.nn.Parameter(torch.zeros(layout.slots, dtype=torch.bfloat16))
        self.parameter.grad_dtype = torch.float32
        register_master(self.parameter, self)

    def original(self) -> Tensor:
        return self.start

    def current(self) -> Tensor:
        return self.matrix

    def stepped(self) -> None:
        pass


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_a_split_master_is_the_packed_one(moments: str) -> None:
    dense, packed, mask = _pair((300, 70))
    weight = (0.02 * torch.randn(300, 70)).bfloat16()
    one, other = _Master(weight.clone(), dense), _Master(weight.clone(), packed)
    steps = [MaskedAdamW([m.parameter], lr=1e-4, weight_decay=10.0, moments=moments) for m in (one, other)]
    for _ in range(20):
        grad = torch.randn(packed.count)
        one.parameter.grad, other.parameter.grad = dense.expand(grad), grad
        for step in steps:
            step.step()
    assert torch.equal(one.matrix, other.matrix)
    assert torch.equal(one.matrix[~mask], weight[~mask]) and not torch.equal(one.matrix, weight)
    low = one.parameter.detach().view(torch.int16)
    assert torch.equal(dense.compress(low), other.parameter.detach().view(torch.int16))
