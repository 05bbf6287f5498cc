"""Bounds on policies: exact divergences in plain Python, log-linear families, and updates that break first order."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import DEVICES
from offprincipal_peft.geometry.leash import (
    FisherNorm,
    fisher_bound,
    fisher_norm,
    kl_leash,
    tilted_policy,
    weight_bound,
)


def _normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _log_policy(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.log_softmax(2 * _normal(shape, seed), -1)


def _plain_kl(log_p: Tensor, log_q: Tensor) -> float:
    """Mean over rows, from lists."""
    rows = list(
        zip(log_p.reshape(-1, log_p.shape[-1]).tolist(), log_q.reshape(-1, log_q.shape[-1]).tolist(), strict=True)
    )
    return math.fsum(math.exp(a) * (a - b) for p, q in rows for a, b in zip(p, q, strict=True)) / len(rows)


def _fitted(features: Tensor, theta: Tensor, target: Tensor) -> Tensor:
    """argmin over theta of the mean KL(target || softmax(features theta)), by Newton's method: log pi+."""
    p = target.exp()
    for _ in range(60):
        log_pi = torch.log_softmax(features @ theta, -1)
        pi = log_pi.exp()
        mean = (pi[..., None] * features).sum(-2)
        gradient = (mean - (p[..., None] * features).sum(-2)).sum(0)
        centred = features - mean[..., None, :]
        theta = theta - torch.linalg.solve(torch.einsum("xn,xni,xnj->ij", pi, centred, centred), gradient)
    assert float(gradient.abs().max()) < 1e-12
    return torch.log_softmax(features @ theta, -1)


class TestKlLeash:
    @pytest.mark.parametrize("shape", [(3,), (4, 5), (2, 3, 6)], ids=str)
    @pytest.mark.parametrize("beta", [0.05, 1.0, 30.0])
    def test_plain_python(self, shape: tuple[int, ...], beta: float) -> None:
        policy, tuned, sampler, rewards = (*(_log_policy(shape, i) for i in range(3)), _normal(shape, 3))
        for q, options in ((policy, {}), (sampler, {"sampler": sampler})):
            found = kl_leash(policy, tuned, rewards, beta, **options)
            weights = [
                [math.exp(a + r / beta) for a, r in zip(row, gains, strict=True)]
                for row, gains in zip(q.view(-1, shape[-1]).tolist(), rewards.view(-1, shape[-1]).tolist(), strict=True)
            ]
            target = torch.tensor([[w / sum(row) for w in row] for row in weights], dtype=torch.float64).view(shape)
            torch.testing.assert_close(tilted_policy(q, rewards, beta).exp(), target, rtol=1e-11, atol=1e-14)
            assert found.left == pytest.approx(_plain_kl(tuned, policy), rel=1e-12)  # seen 1.4e-16
            assert found.right == pytest.approx(_plain_kl(target.log(), policy), abs=1e-13)  # seen 4.4e-16
            assert found.asymptotic and not found.vacuous and found.tolerance < 1e-12

    def test_equality_for_a_free_policy(self) -> None:
        """A policy that can express the target becomes it."""
        policy, rewards = _log_policy((4, 6), 0), _normal((4, 6), 1)
        found = kl_leash(policy, tilted_policy(policy, rewards, 0.5), rewards, 0.5)
        assert abs(found.slack) < 1e-15 < found.tolerance and found.left > 0.1  # seen 1.1e-16, 0 on other processors
        assert found.tightness == pytest.approx(1.0, abs=1e-15)

    @pytest.mark.parametrize("beta", [0.2, 1.0, 5.0])
    def test_a_log_linear_policy_obeys_at_any_size(self, beta: float) -> None:
        """Pythagoras: the slack is the divergence that is left. It holds for the mean over states."""
        features, start, rewards = _normal((5, 7, 3), 0), _normal((3,), 1), _normal((5, 7), 2)
        policy = torch.log_softmax(features @ start, -1)
        for sampler in (policy, _log_policy((5, 7), 3)):
            target = tilted_policy(sampler, rewards, beta)
            tuned = _fitted(features, start, target)
            found = kl_leash(policy, tuned, rewards, beta, sampler=sampler)
            assert found.holds and 0.01 < found.tightness < 1
            assert found.slack == pytest.approx(_plain_kl(target, tuned), rel=1e-11)  # seen 6.2e-15
            states = [kl_leash(policy[i], tuned[i], rewards[i], beta, sampler=sampler[i]) for i in range(5)]
            assert sum(state.left for state in states) / 5 == pytest.approx(found.left, rel=1e-12)

    def test_a_curved_family_breaks_it(self) -> None:
        """Mixtures of two fixed policies: the best one is further away than the target. So it is no guarantee."""
        first, second, target = (
            torch.tensor(p, dtype=torch.float64) for p in ([0.01, 0.36, 0.63], [0.36, 0.52, 0.12], [0.18, 0.5, 0.32])
        )
        share = torch.linspace(0, 1, 100001, dtype=torch.float64)[:, None]
        family = ((1 - share) * first + share * second).log()
        best = int((target * family).sum(1).argmax())
        assert 0 < best < 100000  # inside
        rewards = target.log() - first.log()  # with beta = 1 and q = pi these make the target
        found = kl_leash(first.log(), family[best], rewards, 1.0)
        assert found.right == pytest.approx(_plain_kl(target.log(), first.log()), rel=1e-9)
        assert found.tightness > 1.1 and not found.holds and found.asymptotic  # seen 1.124

    def test_a_wrong_side_is_caught(self) -> None:
        policy, rewards = _log_policy((4, 6), 0), _normal((4, 6), 1)
        tuned = tilted_policy(policy, rewards, 1.0)
        assert kl_leash(policy, tuned, rewards, 1.0).holds
        assert not kl_leash(policy, tuned, rewards, 1.0 + 1e-9).holds  # a softer target than the one that was reached

    def test_small_divergences_and_rounding(self) -> None:
        """A step of 1e-7: the divergence is 1e-15, of which sum p (log p - log q) would keep no digit."""
        policy, rewards = _log_policy((1, 50), 0), 1e-7 * _normal((1, 50), 1)
        found = kl_leash(policy, tilted_policy(policy, rewards, 1.0), rewards, 1.0)
        second_order = float((policy.exp() * (rewards - (policy.exp() * rewards).sum()).square()).sum()) / 2
        assert found.right == pytest.approx(second_order, rel=1e-5)  # seen 9.8e-8
        for dtype in (torch.float32, torch.bfloat16):
            policy = _log_policy((4, 9), 2)
            tuned = tilted_policy(policy, _normal((4, 9), 3), 1.0)
            exact = kl_leash(policy, tuned, _normal((4, 9), 3), 1.0)
            found = kl_leash(policy.to(dtype), tuned.to(dtype), _normal((4, 9), 3), 1.0)
            assert found.holds and abs(found.left - exact.left) < found.tolerance
            assert exact.tolerance < found.tolerance < 100 * torch.finfo(dtype).eps * (1 + exact.left)

    def test_the_rounding_of_an_unlikely_sample_is_paid_for(self) -> None:
        """The target lies where the sampler hardly draws: its log-probabilities are large and rounded as such."""
        policy = torch.tensor([[0.9, 0.1]], dtype=torch.float64).log()
        for depth in (30.0712345, 300.0712345, 3000.0712345):
            sampler = torch.log_softmax(torch.tensor([[-depth, 0.0]], dtype=torch.float64), -1)
            rewards = torch.tensor([[depth + 0.3, 0.0]], dtype=torch.float64)
            exact = kl_leash(policy, policy, rewards, 1.0, sampler=sampler)
            for dtype in (torch.float32, torch.bfloat16):
                found = kl_leash(policy, policy, rewards, 1.0, sampler=sampler.to(dtype))
                eps = torch.finfo(dtype).eps
                assert abs(found.right - exact.right) < found.tolerance < 100 * eps * depth, (depth, dtype)

    def test_no_mass(self) -> None:
        policy = torch.tensor([0.5, 0.5, 0.0]).log()
        tuned = torch.tensor([1.0, 0.0, 0.0]).log()
        found = kl_leash(policy, tuned, torch.tensor([1.0, 0.0, 1e20]), 1.0)  # what is never drawn earns nothing
        odds = math.e / (1 + math.e)
        assert found.left == pytest.approx(math.log(2), rel=1e-6)
        assert found.right == pytest.approx(odds * math.log(2 * odds) + (1 - odds) * math.log(2 - 2 * odds), rel=1e-6)
        other = torch.tensor([0.1, 0.0, 0.9]).log()
        assert kl_leash(policy, tuned, torch.zeros(3), 1.0, sampler=other).vacuous
        assert kl_leash(policy, other, torch.zeros(3), 1.0).left == math.inf
        assert not kl_leash(policy, other, torch.zeros(3), 1.0).holds
        cold = tilted_policy(policy, torch.tensor([1.0, 0.0, 2.0]), 1e-300)  # all on the best that is drawn
        assert cold.exp().tolist() == [1.0, 0.0, 0.0]

    def test_bad_input(self) -> None:
        p, r = _log_policy((2, 3), 0), torch.zeros(2, 3)
        with pytest.raises(ValueError, match=r"same shape, got \(2, 3\), \(3,\), \(2, 3\)"):
            kl_leash(p, p[0], r, 1.0)
        with pytest.raises(ValueError, match=r"policy must sum to 1 over the last axis: \|log sum\| is"):
            kl_leash(p + 1e-3, p, r, 1.0)
        with pytest.raises(ValueError, match="tuned must sum to 1"):
            kl_leash(p, p * math.nan, r, 1.0)
        with pytest.raises(ValueError, match="log_probs must sum to 1"):
            tilted_policy(torch.full((2, 3), -math.inf), r, 1.0)
        with pytest.raises(TypeError, match="policy must be floating point"):
            kl_leash(p.long(), p.long(), r, 1.0)
        with pytest.raises(ValueError, match=r"n >= 1 choices, got \(2, 0\)"):
            tilted_policy(p[:, :0], r[:, :0], 1.0)
        for bad in (math.nan, math.inf):
            with pytest.raises(ValueError, match=r"rewards of shape \(2, 3\) hold NaN or infinite"):
                kl_leash(p, p, r + bad, 1.0)
        with pytest.raises(ValueError, match=r"shapes \(4, 3\) and \(2, 3\), the first must broadcast"):
            tilted_policy(p, torch.zeros(4, 3), 1.0)
        for beta in (0.0, -1.0, math.nan, math.inf):
            with pytest.raises(ValueError, match="beta must be finite and positive"):
                tilted_policy(p, r, beta)


class TestFisher:
    def test_the_quadratic_form_of_a_softmax(self) -> None:
        """Scores of a categorical policy at its logits are e_y - p, whose second moment is diag(p) - p p^T."""
        log_p, step = _log_policy((6,), 0), _normal((6,), 1)
        p = log_p.exp()
        exact = float(step @ (torch.diag(p) - torch.outer(p, p)) @ step)
        drawn = torch.multinomial(p, 40000, replacement=True, generator=torch.Generator().manual_seed(2))
        scores = torch.eye(6, dtype=torch.float64)[drawn] - p
        found = fisher_norm(scores, step)
        squares = [float(x) ** 2 for x in scores @ step]
        mean = math.fsum(squares) / 40000
        spread = math.sqrt(math.fsum((x - mean) ** 2 for x in squares) / 39999 / 40000)
        assert (found.quadratic, found.quadratic_error) == pytest.approx((mean, spread), rel=1e-11)  # seen 1.4e-13
        assert found.norm == pytest.approx(math.sqrt(mean), rel=1e-12)
        assert found.norm_error == pytest.approx(spread / (2 * math.sqrt(mean)), rel=1e-11)
        assert abs(found.quadratic - exact) < 3 * found.quadratic_error < 0.2 * exact  # seen 1.8 errors
        assert fisher_norm(scores @ step) == pytest.approx(found, rel=1e-13) and found.samples == 40000
        matrix = scores.view(-1, 2, 3)
        assert fisher_norm(matrix, step.view(2, 3)) == pytest.approx(found, rel=1e-13)

    def test_the_standard_error_is_that_of_repeated_draws(self) -> None:
        draws = _normal((400, 100), 0)
        estimates = [fisher_norm(row) for row in draws]
        for name, error in (("quadratic", "quadratic_error"), ("norm", "norm_error")):
            observed = torch.tensor([getattr(x, name) for x in estimates]).std()
            stated = torch.tensor([getattr(x, error) for x in estimates]).mean()
            assert float(stated / observed) == pytest.approx(1, abs=0.12)  # seen 0.011

    def test_the_bound_is_first_order(self) -> None:
        """KL / (D^T F D / 2) tends to 1; at a finite size it is larger along some updates and smaller along others."""
        log_p, step = (
            torch.tensor([0.1, 0.9], dtype=torch.float64).log(),
            torch.tensor([1.0, -1.0], dtype=torch.float64),
        )
        p = log_p.exp()
        fisher = torch.diag(p) - torch.outer(p, p)
        broken = []
        for size in (1e-4, -1e-4, 1.0, -1.0):
            after = torch.log_softmax(log_p + size * step, -1)
            norm = abs(size) * math.sqrt(float(step @ fisher @ step))
            found = fisher_bound(norm, _plain_kl(after, log_p))
            assert found.asymptotic and found.left == norm
            broken.append(not found.holds)
            if abs(size) < 1:
                assert found.tightness == pytest.approx(1, abs=1e-3)  # seen 5.3e-5
        assert broken[2:] == [False, True]  # towards the rare choice KL grows faster, away from it more slowly

    def test_the_tolerance_of_an_estimate(self) -> None:
        estimate = FisherNorm(1.0, 0.1, 1.0, 0.2, 50)
        assert not fisher_bound(1.0, 0.4).holds and not fisher_bound(estimate, 0.4, standard_errors=1.0).holds
        assert fisher_bound(estimate, 0.4).holds  # sqrt(0.8) = 0.894, and two errors
        equal = fisher_bound(1.0, 0.5)
        assert equal.holds and equal.tightness == pytest.approx(1, rel=1e-15)  # seen 2.2e-16

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    def test_the_weight_bound(self, dtype: torch.dtype) -> None:
        update = _normal((5, 7), 0).to(dtype)
        norm = math.sqrt(math.fsum(x * x for x in update.reshape(-1).tolist()))
        found = weight_bound(update, 0.02, 0.5)
        assert found.left == pytest.approx(norm, rel=1e-14) and found.right == pytest.approx(math.sqrt(0.08), rel=1e-15)
        assert found.asymptotic and not found.holds and not found.vacuous
        assert weight_bound(update, 0.5 * norm**2 * 0.3, 0.3).tightness == pytest.approx(1, rel=1e-14)  # seen 1.1e-16
        assert weight_bound(update, 0.5 * norm**2 * 0.3, 0.3).holds
        assert not weight_bound(update, 0.5 * norm**2 * 0.3, 0.3 * (1 + 1e-12)).holds
        assert weight_bound(update, 0.02, 0.0).vacuous and weight_bound(0 * update, 0.0, 1.0).tightness == 1.0

    def test_the_least_eigenvalue_gives_a_weaker_bound_than_the_form(self) -> None:
        factor = _normal((6, 6), 0)
        fisher, step = factor @ factor.T, 1e-3 * _normal((6,), 1)
        values, vectors = torch.linalg.eigh(fisher)
        for D in (step, vectors[:, 0]):
            norm = math.sqrt(float(D @ fisher @ D))
            kl = norm**2 / 2
            tight, weak = fisher_bound(norm, kl), weight_bound(D, kl, float(values[0]))
            assert tight.tightness == pytest.approx(1, rel=1e-12) and weak.tightness <= 1 + 1e-9
        assert weak.tightness == pytest.approx(1, rel=1e-9)  # along the least eigenvector; seen 2.2e-15

    @pytest.mark.parametrize("scale", [1e-150, 1e-30, 1e100])
    def test_extreme_scales(self, scale: float) -> None:
        products = _normal((30,), 0)
        plain, scaled = fisher_norm(products), fisher_norm(products * scale)
        assert scaled.norm / scale == pytest.approx(plain.norm, rel=1e-13)
        assert scaled.norm_error / scale == pytest.approx(plain.norm_error, rel=1e-13)
        assert weight_bound(products * scale, 1.0, 1.0).left == pytest.approx(scale * float(products.norm()), rel=1e-13)
        assert fisher_norm(torch.zeros(3)) == (0.0, 0.0, 0.0, 0.0, 3)

    def test_bad_input(self) -> None:
        calls: list[tuple[Callable[[], Any], str]] = [
            (lambda: fisher_norm(torch.ones(1)), r"2 or more products \(n,\), got shape \(1,\)"),
            (lambda: fisher_norm(torch.ones(())), "2 or more products"),
            (lambda: fisher_norm(torch.ones(4, 3)), r"got shape \(4, 3\)"),
            (lambda: fisher_norm(torch.ones(4, 3), torch.ones(4)), r"scores \(4, 3\) must be .* shape \(4,\)"),
            (lambda: fisher_norm(torch.tensor([1.0, math.nan, math.inf])), "2 of 3 score products are NaN or infinite"),
            (lambda: fisher_bound(-1.0, 1.0), "norm must be finite and not negative"),
            (lambda: fisher_bound(1.0, math.nan), "kl must be finite and not negative"),
            (lambda: weight_bound(torch.ones(2), -1.0, 1.0), "kl must be finite"),
            (lambda: weight_bound(torch.ones(2), 1.0, -1.0), "mu must be finite"),
            (lambda: weight_bound(torch.tensor([math.nan]), 1.0, 1.0), r"update of shape \(1,\) must have entries"),
            (lambda: weight_bound(torch.ones(0), 1.0, 1.0), r"update of shape \(0,\) must have entries"),
        ]
        for call, message in calls:
            with pytest.raises(ValueError, match=message):
                call()

    @pytest.mark.parametrize("device", DEVICES)
    def test_every_device(self, device: str) -> None:
        policy, tuned, rewards = _log_policy((2, 4), 0), _log_policy((2, 4), 1), _normal((2, 4), 2)
        there = kl_leash(policy.to(device).requires_grad_(), tuned.to(device), rewards.to(device), 1.0)
        assert there.left == pytest.approx(kl_leash(policy, tuned, rewards, 1.0).left, rel=1e-12)
        assert weight_bound(policy.to(device), 1.0, 1.0).left == pytest.approx(weight_bound(policy, 1.0, 1.0).left)
        assert fisher_norm(policy.view(-1).to(device)).norm == pytest.approx(fisher_norm(policy.view(-1)).norm)
