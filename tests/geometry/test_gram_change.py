"""What the fast spectral route multiplies out and iterates, against plain fp64 products and decompositions."""

from __future__ import annotations

import pytest
import torch

from offprincipal_peft.geometry import gram_change
from offprincipal_peft.geometry.perturbation import trailing


def test_trailing_space_is_the_eigenvectors() -> None:
    noise = torch.randn(128, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    basis = torch.linalg.qr(torch.eye(128, dtype=torch.float64) + 0.05 * noise)[0]  # strongly mixed
    matrix = basis.T @ torch.diag(torch.linspace(16, 0.05, 128, dtype=torch.float64).square()) @ basis
    matrix = (matrix + matrix.T) / 2
    found = trailing(matrix, 32, 1e-7)
    assert found is not None
    vectors = torch.linalg.eigh(matrix)[1]
    images = found.double().T @ vectors[:, :16]  # the last half is inside
    assert float((torch.linalg.svdvals(images) - 1).abs().max()) < 1e-6  # seen: 4.6e-8


def test_trailing_space_of_an_indefinite_matrix_is_refused() -> None:
    matrix = torch.diag(torch.tensor([1.0, 0.5, -0.1], dtype=torch.float64))
    assert trailing(matrix, 1, 1e-7) is None
    assert trailing(matrix, 1, 1e-3) is not None  # the noise explains what is negative


@pytest.mark.parametrize("shape", [(70, 50), (50, 70), (24, 90)])
@pytest.mark.parametrize("dtypes", [("bfloat16", "bfloat16"), ("float32", "float32"), ("bfloat16", "float32")])
@pytest.mark.parametrize("native", [True, False])
def test_norms_of_the_change(monkeypatch: pytest.MonkeyPatch, shape, dtypes, native) -> None:
    monkeypatch.setattr(gram_change, "multiplies_bf16", lambda device: native)
    monkeypatch.setattr(gram_change, "CHUNK", 500)  # several chunks
    generator = torch.Generator().manual_seed(5)
    base = torch.randn(shape, generator=generator)
    pair = (base, base + 0.1 * torch.randn(shape, generator=generator))
    before, after = (w.to(getattr(torch, dtype)) for w, dtype in zip(pair, dtypes, strict=True))
    exact = after.double() - before.double()
    change = gram_change.difference(before, after)
    assert change.dtype == torch.bfloat16 and torch.equal(change == 0, exact == 0)
    norm = gram_change.change_norm(change, shape[0] < shape[1], 0)
    largest = float(torch.linalg.matrix_norm(exact, 2))
    assert 0.995 <= norm / largest <= 1 + 1e-3  # seen: 0.99936 and 1 + 3.3e-4
    assert gram_change.frobenius(change) == pytest.approx(float(exact.norm()), rel=4e-4)  # seen: 1.4e-4


def test_rotation_is_the_product() -> None:
    generator = torch.Generator().manual_seed(5)
    symmetric = torch.randn(37, 37, generator=generator)
    symmetric += symmetric.T.clone()
    basis = torch.linalg.qr(torch.randn(37, 37, generator=generator))[0]
    found = gram_change.rotate(symmetric, basis)
    assert torch.equal(found, found.T)
    expected = basis.double().T @ symmetric.double() @ basis.double()
    assert float((found.double() - expected).abs().max()) < 1e-5  # seen: 8.7e-7
