"""The product with a packed update alone, for a base weight that cannot hold it (a quantised one).

The update is made dense in the input's dtype for the product and dropped; the backward makes it again, so that no
dense matrix outlives either. Where whole rows or columns train, only those are multiplied.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .layout import ColumnLayout, Layout, RowLayout


def packed_delta_linear(x: Tensor, delta: Tensor, layout: Layout) -> Tensor:
    """``x @ dW.T`` for the (d_out, d_in) update whose entries in ``layout`` are ``delta`` and zero elsewhere.

    Args:
        x: (..., d_in).
        delta: (slots,), the trained parameter.
        layout: its entries in a (d_out, d_in) matrix.

    Returns (..., d_out) in the dtype of ``x``, the autocast dtype under autocast. The gradient of ``delta`` exists on
    the mask alone, in fp32 as torch accumulates it into the parameter's dtype.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        out: Tensor = _PackedDelta.apply(x, delta, layout)
    return out


def dense_update(delta: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    """(slots,) -> (rows, columns) with zeros off the mask."""
    dense = torch.zeros(layout.shape, dtype=dtype, device=delta.device)
    layout.scatter_(dense, delta.to(dtype))
    return dense


def _product(flat: Tensor, delta: Tensor, layout: Layout) -> Tensor:
    """(tokens, d_in) -> (tokens, d_out)."""
    if isinstance(layout, RowLayout):
        rows = delta.to(flat.dtype).view(-1, layout.shape[1])
        out = flat.new_zeros(flat.shape[0], layout.shape[0])
        return out.index_copy_(1, layout.stripes, F.linear(flat, rows))
    if isinstance(layout, ColumnLayout):
        return F.linear(layout.needed_right(flat), delta.to(flat.dtype).view(layout.shape[0], -1))
    return F.linear(flat, dense_update(delta, layout, flat.dtype))


def _input_gradient(grad: Tensor, delta: Tensor, layout: Layout) -> Tensor:
    """(tokens, d_out) -> (tokens, d_in)."""
    if isinstance(layout, RowLayout):
        return layout.needed_left(grad) @ delta.to(grad.dtype).view(-1, layout.shape[1])
    if isinstance(layout, ColumnLayout):
        out = grad.new_zeros(grad.shape[0], layout.shape[1])
        return out.index_copy_(1, layout.stripes, grad @ delta.to(grad.dtype).view(layout.shape[0], -1))
    return grad @ dense_update(delta, layout, grad.dtype)


class _PackedDelta(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor, layout: Layout) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(layout.needed_right(flat) if delta.requires_grad else flat.new_empty(0), delta)
        ctx.layout, ctx.x_shape = layout, x.shape
        return _product(flat, delta, layout).view(*x.shape[:-1], layout.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needed, delta = ctx.saved_tensors  # torch refuses a parameter that was written in between
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        grad_x = grad_delta = None
        if ctx.needs_input_grad[0]:
            grad_x = _input_gradient(grad, delta, ctx.layout).view(ctx.x_shape)
        if ctx.needs_input_grad[1]:
            grad_delta = ctx.layout.gradient(ctx.layout.needed_left(grad), needed)
        return grad_x, grad_delta, None
