"""The dense truth that every fast path of this package is tested against: a full gradient, then the mask."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def masked_weight_gradient(
    x: Tensor,  # (tokens, d_in)
    grad: Tensor,  # (tokens, d_out)
    mask: Tensor,  # (d_out, d_in) bool
) -> Tensor:
    """The whole ``grad.T @ x`` with everything outside the mask set to zero, (d_out, d_in) in the inputs' dtype."""
    return torch.where(mask, grad.T @ x, torch.zeros((), dtype=x.dtype, device=x.device))


def masked_linear(x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor) -> Tensor:
    """``F.linear`` of a dense leaf ``weight`` whose gradient is masked by a hook: the packed linear's twin."""
    if weight.requires_grad:
        weight.register_hook(lambda grad: grad * mask)
    return F.linear(x, weight, bias)


def written_weight(original: Tensor, delta: Tensor, mask: Tensor) -> Tensor:
    """``round(original + delta)`` on the mask, row-major, ``original`` elsewhere; a new (d_out, d_in) tensor."""
    out = original.clone()
    out[mask] = (original[mask].to(delta.dtype) + delta).to(original.dtype)
    return out


def adamw_step(
    value: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> None:
    """One AdamW step in place, written out in the order of operations of torch's fused kernel (fp32).

    Source: Loshchilov and Hutter (1711.05101), Algorithm 2.
    """
    beta1, beta2 = betas
    value.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = exp_avg_sq.sqrt() / (1 - beta2**step) ** 0.5 + eps
    value.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))
