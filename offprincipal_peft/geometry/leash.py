"""Gate I: how far one step takes a policy, and how far a policy's budget lets the weights go.

Both inequalities hold to first order in the update, so their :class:`Bound` carries ``asymptotic=True``: a finite
update may break them. Where they are exact stands at each function. Everything runs in fp64.

Source: 2511.08567, Propositions 3.1 and 3.2.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .bounds import Bound

_EPS = torch.finfo(torch.float64).eps


def tilted_policy(
    log_probs: Tensor,  # (…, n): log q, normalised over the last axis
    rewards: Tensor,  # (…, n) or what broadcasts to it
    beta: float,
) -> Tensor:  # (…, n) fp64
    """log q_beta with q_beta ∝ q exp(R / beta): the target of one step. Rewards and beta share their unit.

    Raises ``ValueError`` for probabilities that do not sum to 1 (within the rounding of their dtype), NaN or infinite
    rewards, shapes that do not broadcast and beta <= 0; ``TypeError`` for values that are not floating point.
    """
    q, rewards = _log_policy(log_probs, "log_probs"), rewards.detach().double()
    beta = _number(beta, "beta", positive=True)
    if not bool(rewards.isfinite().all()):
        raise ValueError(f"rewards of shape {tuple(rewards.shape)} hold NaN or infinite values")
    try:
        rewards = rewards.expand_as(q)
    except RuntimeError:
        shapes = f"{tuple(rewards.shape)} and {tuple(q.shape)}"
        raise ValueError(
            f"rewards and log_probs have shapes {shapes}, the first must broadcast to the second"
        ) from None
    best = rewards.masked_fill(q == -math.inf, -math.inf).amax(-1, keepdim=True)
    return torch.log_softmax(q + (rewards - best).clamp(max=0) / beta, -1)


def kl_leash(
    policy: Tensor,  # (…, n): log pi before the step; leading axes are prompts or states
    tuned: Tensor,  # (…, n): log pi+ after it
    rewards: Tensor,  # (…, n) or what broadcasts to it
    beta: float,
    *,
    sampler: Tensor | None = None,  # (…, n): log q; the policy itself by default (on-policy)
) -> Bound:
    """KL(pi+ || pi) <= KL(q_beta || pi), q_beta ∝ q exp(R / beta); both in nats, means over the leading axes.

    The claim is for pi+ = argmin KL(q_beta || pi') over the policies that the model can express, which is the caller's
    to provide. Exact, with the slack KL(q_beta || pi+), where logits are linear in the parameters (an exponential
    family); first order in general, hence ``asymptotic``. Per state it need not hold, so the means are compared.
    ``tolerance``: what rounding every log-probability by 8 eps of the coarsest dtype given changes. A policy that gives
    q_beta's support no mass makes the right side infinite.

    Raises as :func:`tilted_policy`, and ``ValueError`` for policies of different shapes. Source: Proposition 3.1.
    """
    sampler = policy if sampler is None else sampler
    if not policy.shape == tuned.shape == sampler.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (policy, tuned, sampler))
        raise ValueError(f"policy, tuned and sampler must have the same shape, got {shapes}")
    before, after, drawn = _log_policy(policy, "policy"), _log_policy(tuned, "tuned"), _log_policy(sampler, "sampler")
    target = tilted_policy(sampler, rewards, beta)
    eps = max(torch.finfo(x.dtype).eps for x in (policy, tuned, sampler))
    (left, error), (right, target_error) = _kl(after, before, after), _kl(target, before, drawn)
    return Bound(left, right, 8 * eps * (error + target_error), asymptotic=True)


def _log_policy(log_probs: Tensor, name: str) -> Tensor:
    """Checked, fp64, normalised again: rounding to the given dtype left the sum a little off."""
    if not log_probs.dtype.is_floating_point:
        raise TypeError(f"{name} must be floating point, got {log_probs.dtype}")
    if log_probs.ndim < 1 or not log_probs.numel():
        raise ValueError(f"{name} must be log-probabilities (…, n) of n >= 1 choices, got {tuple(log_probs.shape)}")
    values = log_probs.detach().double()
    off = float(values.logsumexp(-1).abs().max())
    allowed = 8 * torch.finfo(log_probs.dtype).eps * (1 + math.log(values.shape[-1]))
    if not off <= allowed:  # NaN and a row without mass come here too
        raise ValueError(f"{name} must sum to 1 over the last axis: |log sum| is {off:.2e}, {allowed:.2e} is rounding")
    return torch.log_softmax(values, -1)


def _kl(log_p: Tensor, log_q: Tensor, given: Tensor) -> tuple[float, float]:
    """Mean KL(p || q) as a sum of terms >= 0, which keeps small divergences, and its change per unit of rounding.

    ``given``: the log-probabilities that p was made of: a tilt leaves their rounding as large as it was.
    """
    p, q, d = log_p.exp(), log_q.exp(), log_p - log_q
    terms = torch.where(d.abs() < 1, p * (d + torch.expm1(-d)), p * d - p + q)
    terms = torch.where(p > 0, terms, q)
    slope = p * (d - terms.sum(-1, keepdim=True)).abs() + (p - q).abs()  # by the logits of p and of q
    error = slope * (1 + torch.maximum(log_p.abs(), given.abs()) + log_q.abs())
    error = torch.where(error.isfinite(), error, 0.0)
    return max(0.0, float(terms.sum(-1).mean())), float(error.sum(-1).mean())


class FisherNorm(NamedTuple):
    """An estimate of sqrt(D^T F D), F the Fisher information of the policy, with standard errors."""

    norm: float  # sqrt(D^T F D); low by about norm_error^2 / (2 norm), since the root is concave
    norm_error: float  # one standard error, to first order
    quadratic: float  # D^T F D, unbiased: in nats, twice the KL divergence to second order
    quadratic_error: float
    samples: int


def fisher_norm(
    scores: Tensor,  # (n,): the products g_i . D; with `update`, the scores g_i themselves, (n, *update.shape)
    update: Tensor | None = None,  # D, any shape
) -> FisherNorm:
    """D^T F D = E (g . D)^2 from n >= 2 scores g_i = grad log pi(y_i | x_i), each y_i drawn *from pi* at the base.

    Samples of another policy, labels of a data set or a sum over a batch give another matrix. One sample is what is
    independent: whole responses, not tokens. fp64.

    Raises ``ValueError`` for fewer than two samples, shapes that do not fit, NaN or infinite values.
    """
    products = scores.detach().double()
    if update is not None:
        if products.shape[1:] != update.shape or not update.numel():
            raise ValueError(
                f"scores {tuple(scores.shape)} must be (n, …) over the update's shape {tuple(update.shape)}"
            )
        products = products.reshape(len(products), -1) @ update.detach().double().reshape(-1)
    if products.ndim != 1 or len(products) < 2:
        raise ValueError(f"the Fisher norm needs 2 or more products (n,), got shape {tuple(products.shape)}")
    if not bool(products.isfinite().all()):
        raise ValueError(f"{int((~products.isfinite()).sum())} of {len(products)} score products are NaN or infinite")
    scale, n = float(products.abs().max()), len(products)
    if scale == 0.0:
        return FisherNorm(0.0, 0.0, 0.0, 0.0, n)
    squares = (products / scale).square()
    mean, error = float(squares.mean()), float(squares.std()) / math.sqrt(n)
    norm = math.sqrt(mean)
    return FisherNorm(scale * norm, scale * error / (2 * norm), scale * scale * mean, scale * scale * error, n)


def fisher_bound(norm: FisherNorm | float, kl: float, *, standard_errors: float = 2.0) -> Bound:
    """sqrt(D^T F D) <= sqrt(2 K) for an update that keeps KL(pi+ || pi) <= K = ``kl`` nats; no unit.

    First order, hence ``asymptotic``: KL = D^T F D / 2 (1 + o(1)), and where KL grows more slowly than that (F falls
    along D) a finite update breaks it. ``tolerance``: ``standard_errors`` of an estimated norm, and 4 eps of fp64.

    Raises ``ValueError`` for a norm or budget that is negative, NaN or infinite. Source: Proposition 3.2.
    """
    error = norm.norm_error if isinstance(norm, FisherNorm) else 0.0
    left = _number(norm.norm if isinstance(norm, FisherNorm) else norm, "norm")
    tolerance = error * _number(standard_errors, "standard_errors") + 4 * _EPS * left
    return Bound(left, math.sqrt(2) * math.sqrt(_number(kl, "kl")), tolerance, asymptotic=True)


def weight_bound(update: Tensor, kl: float, mu: float) -> Bound:  # any shape
    """||dW||_F <= sqrt(2 K / mu), in the units of the weight, where F >= mu I and KL(pi+ || pi) <= K = ``kl`` nats.

    For one layer: mu_W, the least eigenvalue of the Schur complement S_W, and the layer's share delta_W of the budget.
    First order, as :func:`fisher_bound`. A network with more parameters than its policy has freedom (any rescaling
    between layers) has mu = 0: then the right side is infinite. ``tolerance``: the rounding of a sum in fp64.

    Raises ``ValueError`` for NaN or infinite entries, a negative budget or mu. Source: Proposition 3.2.
    """
    if not update.numel() or not bool(update.isfinite().all()):
        raise ValueError(f"the update of shape {tuple(update.shape)} must have entries, all of them finite")
    values, mu, kl = update.detach().double(), _number(mu, "mu"), _number(kl, "kl")
    scale = float(values.abs().max()) or 1.0
    left = scale * float((values / scale).norm())
    return Bound(left, math.sqrt(2 * kl / mu) if mu else math.inf, 16 * _EPS * left, asymptotic=True)


def _number(value: float, name: str, *, positive: bool = False) -> float:
    value = float(value)
    if not (math.isfinite(value) and (value > 0 if positive else value >= 0)):
        raise ValueError(f"{name} must be finite and {'positive' if positive else 'not negative'}, got {value}")
    return value
