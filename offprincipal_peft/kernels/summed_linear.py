"""The masked product on a weight that may be read and not written: one that FSDP gathered for this call alone.

The sum of weight and update is formed in a copy, multiplied and dropped; the backward, for which FSDP gathers the
weight again, forms it again. The copy holds the bits that :func:`.packed_update.write_sum_` would have written into the
weight, so that a sharded model computes with the weights of an unsharded one, at the cost of one more weight at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .layout import Layout
from .packed_linear import dense_forward, packed_gradient
from .packed_update import write_sum_


def summed_linear(
    x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor | None, layout: Layout, *, transposed: bool = False
) -> Tensor:
    """``x @ round(weight + delta).T + bias``; ``weight`` is read and never written or differentiated.

    Args:
        x: (..., d_in).
        delta: (slots,), the trained update, fp32 or narrower.
        weight: the base's own, (d_out, d_in), or (d_in, d_out) where ``transposed`` (``Conv1D``); contiguous.
        bias: (d_out,) or None; never differentiated.
        layout: the trained entries of ``weight`` as it is stored.

    Returns (..., d_out). The gradient of ``delta`` exists on the mask alone, in fp32. Under autocast the products run
    in the autocast dtype, as ``F.linear`` would. Autograd keeps ``weight`` itself, not a copy.
    """
    device, dtype = x.device.type, None
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(device, enabled=False):
        out: Tensor = _SummedLinear.apply(x, delta, weight, bias, layout, transposed, dtype)
    return out


def summed_weight(weight: Tensor, delta: Tensor, layout: Layout, dtype: torch.dtype | None = None) -> Tensor:
    """A copy of ``weight`` that holds ``round(weight + delta)`` on the layout, rounded once more to ``dtype``."""
    weight = weight.detach()
    total = weight.clone()
    write_sum_(
        total, layout, layout.gather(weight), delta.detach().to(torch.promote_types(weight.dtype, torch.float32))
    )
    return total if dtype is None else total.to(dtype)


class _SummedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        delta: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layout: Layout,
        transposed: bool,
        dtype: torch.dtype | None,
    ) -> Tensor:
        out = dense_forward(x, summed_weight(weight, delta, layout, dtype), bias, transposed)
        flat = x.reshape(-1, x.shape[-1])  # (tokens, d_in)
        needed = flat.new_empty(0)
        if delta.requires_grad:
            needed = layout.needed_left(flat) if transposed else layout.needed_right(flat)
        ctx.save_for_backward(needed, delta, weight)  # torch refuses what was written in between
        ctx.layout, ctx.transposed, ctx.dtype, ctx.x_shape = layout, transposed, dtype, x.shape
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needed, delta, weight = ctx.saved_tensors
        grad = grads[0].reshape(-1, grads[0].shape[-1])  # (tokens, d_out)
        grad_x = grad_delta = None
        if ctx.needs_input_grad[0]:
            total = summed_weight(weight, delta, ctx.layout, ctx.dtype)
            grad_x = (grad @ (total.T if ctx.transposed else total)).view(ctx.x_shape)
        if ctx.needs_input_grad[1]:
            grad_delta = packed_gradient(grad, needed, ctx.layout, ctx.transposed)
        return grad_x, grad_delta, None, None, None, None, None
