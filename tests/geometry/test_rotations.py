"""Random orthogonal matrices: orthogonal, of the distribution that they claim, the same for a seed."""

import pytest
import torch

from attention_models import distance
from offprincipal_peft.geometry import haar_rotation, hadamard_rotation


@pytest.mark.parametrize("order", [1, 2, 4, 12, 20, 28, 36, 64, 72, 80, 96, 112, 128, 160, 192, 256])
def test_a_hadamard_rotation_is_orthogonal_and_flat(order: int) -> None:
    found = hadamard_rotation(order, seed=1)
    assert distance(found.T @ found, torch.eye(order, dtype=torch.float64)) <= 1e-14  # observed 2.7e-15
    assert distance(found.abs() * order**0.5, torch.ones_like(found)) <= 1e-15  # observed 0.0
    assert torch.equal(found, hadamard_rotation(order, seed=1))
    assert order < 4 or not torch.equal(found, hadamard_rotation(order, seed=2))


def test_hadamard_orders_without_a_matrix_are_refused() -> None:
    for order in (3, 6, 10, 50):
        with pytest.raises(ValueError, match=rf"order {order} \(there is none: an order is 1, 2 or a multiple of 4"):
            hadamard_rotation(order, 0)
    with pytest.raises(ValueError, match=r"order 92 \(neither doubling nor Paley has it\); use haar_rotation"):
        hadamard_rotation(92, 0)
    with pytest.raises(ValueError, match="at least 1, got 0 and None"):
        haar_rotation(0, 0)


def test_haar_rotations_are_orthogonal_and_uniform() -> None:
    state = torch.get_rng_state()
    many = haar_rotation(6, 0, heads=4000)
    assert torch.equal(torch.get_rng_state(), state)
    assert distance(many.mT @ many, torch.eye(6, dtype=torch.float64).expand_as(many)) <= 1e-14  # observed 1.6e-15
    # Of the Haar measure: entries have mean 0 and variance 1/6, and the trace has mean 0 and variance 1. A QR whose
    # signs are not fixed gives the trace a mean of -1.26. Standard errors 0.0065 and 0.016.
    assert distance(many.mean(0), torch.zeros(6, 6, dtype=torch.float64)) <= 0.03  # observed 0.014
    assert distance(many.square().mean(0), torch.full((6, 6), 1 / 6, dtype=torch.float64)) <= 0.015  # observed 0.0071
    trace = many.diagonal(dim1=1, dim2=2).sum(1)
    assert abs(float(trace.mean())) <= 0.06  # observed 0.016
    assert float(trace.var()) == pytest.approx(1.0, abs=0.1)  # observed 0.998
    assert torch.equal(haar_rotation(6, 0), haar_rotation(6, 0, heads=1)[0])
    assert not torch.equal(haar_rotation(6, 0), haar_rotation(6, 1))
