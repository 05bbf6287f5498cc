"""A linear map whose weight gradient exists only where a layout names entries.

Forward and input gradient are the dense products that a frozen layer costs anyway. Of the weight gradient only the
packed entries are ever stored, in fp32, as the gradient of a packed parameter. The weight is read again in the
backward; whoever writes it in between (another adapter, a disable) is asked to put it back by ``before_backward``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .layout import Layout


def packed_linear(
    x: Tensor,
    delta: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: Layout,
    *,
    transposed: bool = False,
    before_backward: Callable[[], None] | None = None,
) -> Tensor:
    """``x @ weight.T + bias`` with the gradient of the packed entries delivered to ``delta``.

    Args:
        x: (..., d_in).
        delta: (count,), the trained parameter; its value is not read, the weight already holds it.
        weight: (d_out, d_in), or (d_in, d_out) where ``transposed`` (``Conv1D``); never differentiated.
        bias: (d_out,) or None; never differentiated.
        layout: the trained entries of ``weight`` as it is stored.
        before_backward: called before the backward reads ``weight``.

    Under autocast the products run in the autocast dtype, as ``F.linear`` would.
    """
    return _product(x, delta, weight, bias, layout, transposed, before_backward)


def rewritten_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    transposed: bool = False,
    before_backward: Callable[[], None],
) -> Tensor:
    """``x @ weight.T + bias`` for a weight that nobody trains but that may hold other values by the backward.

    Arguments as in :func:`packed_linear`; ``before_backward`` puts the values of this forward back.
    """
    return _product(x, x.new_empty(0), weight, bias, None, transposed, before_backward)


def _product(
    x: Tensor,
    delta: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: Layout | None,  # not asked where delta needs no gradient
    transposed: bool,
    before_backward: Callable[[], None] | None,
) -> Tensor:
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    with torch.autocast(device, enabled=False):
        out: Tensor = _PackedLinear.apply(x, delta, weight, bias, layout, transposed, before_backward)
    return out


def dense_forward(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """The base layer's own call, so that its output has the same bits with and without gradients."""
    if not transposed:
        return F.linear(x, weight, bias)
    flat = x.view(-1, x.shape[-1]) if x.is_contiguous() else x.reshape(-1, x.shape[-1])
    out = flat @ weight if bias is None else torch.addmm(bias, flat, weight)
    return out.view(*x.shape[:-1], out.shape[-1])


def packed_gradient(grad: Tensor, needed: Tensor, layout: Layout, transposed: bool) -> Tensor:
    """The packed weight gradient, fp32, of an output's gradient (tokens, d_out) and the part of x that was kept."""
    if transposed:
        return layout.gradient(needed, layout.needed_right(grad))
    return layout.gradient(layout.needed_left(grad), needed)


class _PackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        delta: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layout: Any,
        transposed: bool,
        before_backward: Callable[[], None] | None,
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])  # (tokens, d_in)
        out = dense_forward(x, weight, bias, transposed)
        if delta.requires_grad:
            needed = layout.needed_left(flat) if transposed else layout.needed_right(flat)
            ctx.save_for_backward(needed)
        # Not saved through autograd: the same values are written into it again before every forward.
        ctx.weight, ctx.layout, ctx.transposed, ctx.before_backward = (
            weight.detach(),
            layout,
            transposed,
            before_backward,
        )
        ctx.x_shape = x.shape
        ctx.delta, ctx.version = delta.detach(), delta._version  # shares the parameter's version counter
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0].reshape(-1, grads[0].shape[-1])  # (tokens, d_out)
        grad_x = grad_delta = None
        if ctx.delta._version != ctx.version:
            raise RuntimeError(
                "the packed parameter was modified in place between a forward and its backward, which needs the "
                "weights of that forward; run backward() before the optimiser's step"
            )
        if ctx.before_backward is not None:
            ctx.before_backward()
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ (ctx.weight.T if ctx.transposed else ctx.weight)).view(ctx.x_shape)
        if ctx.needs_input_grad[1]:
            (needed,) = ctx.saved_tensors
            grad_delta = packed_gradient(grad, needed, ctx.layout, ctx.transposed)
        return grad_x, grad_delta, None, None, None, None, None
