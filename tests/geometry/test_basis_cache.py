"""The cache: hits without linear algebra, damage, keys."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from offprincipal_peft.geometry import WeightSpectrum, basis_cache, solvers


def weight(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(40, 60, generator=torch.Generator().manual_seed(seed)).to(dtype)


def everything(W: Tensor, directory: Path | None, **options: object) -> list[Tensor]:
    spectrum = WeightSpectrum(W, cache_dir=directory, **options)  # type: ignore[arg-type]
    sides = [spectrum.minor(4, "output"), spectrum.minor(4, "input"), spectrum.null(4, "input")]
    return [*spectrum.top(5), *spectrum.bottom(5), *sides, spectrum.values()]


def forbid_linear_algebra(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("linear algebra on a cache hit")

    for name in ("svd", "svdvals", "qr", "eigh", "lu_factor_ex", "cholesky_ex", "solve_triangular", "eigvalsh"):
        monkeypatch.setattr(torch.linalg, name, refuse)
    monkeypatch.setattr(solvers, "TallMatrix", refuse)
    monkeypatch.setattr(torch, "matmul", refuse)


def test_a_hit_is_bit_equal_and_computes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = everything(weight(), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(first, everything(weight(), None), strict=True))
    forbid_linear_algebra(monkeypatch)
    with pytest.raises(AssertionError, match="linear algebra"):
        everything(weight(), None)  # the trap works
    second = everything(weight(), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    spectrum = WeightSpectrum(weight(), cache_dir=tmp_path)
    spectrum.top(5)
    assert [report.route for report in spectrum.reports] == ["cache"]


def test_the_environment_names_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(basis_cache.ENVIRONMENT_VARIABLE, str(tmp_path / "from-environment"))
    WeightSpectrum(weight()).top(2)
    assert len(list((tmp_path / "from-environment").glob("*.safetensors"))) == 1


def test_no_directory_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    WeightSpectrum(weight()).top(2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["empty", "truncated", "noise", "other", "nan"])
def test_a_damaged_file_warns_and_is_replaced(tmp_path: Path, damage: str) -> None:
    expected = WeightSpectrum(weight(), cache_dir=tmp_path).top(3)
    (path,) = tmp_path.glob("*.safetensors")
    content = path.read_bytes()
    if damage == "other":  # a valid file with the wrong shapes
        WeightSpectrum(weight(), cache_dir=tmp_path / "other").top(4)
        shutil.copy(next((tmp_path / "other").glob("*.safetensors")), path)
    elif damage == "nan":
        path.write_bytes(content[:-4] + b"\xff\xff\xff\xff")
    else:
        path.write_bytes({"empty": b"", "truncated": content[:-10], "noise": b"\x99" * 200}[damage])
    with pytest.warns(UserWarning, match=path.name):
        again = WeightSpectrum(weight(), cache_dir=tmp_path).top(3)
    assert torch.equal(again.U, expected.U)
    assert path.read_bytes() == content
    assert not list(tmp_path.glob("*.tmp"))


def test_what_makes_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def files() -> int:
        return len(list(tmp_path.glob("*.safetensors")))

    W = weight()
    WeightSpectrum(W, cache_dir=tmp_path).top(3)
    WeightSpectrum(W.clone(), cache_dir=tmp_path, name="another name").top(3)
    WeightSpectrum(W.T.contiguous().T, cache_dir=tmp_path).top(3)  # the same values, another layout
    assert files() == 1
    changed = W.clone()
    changed[0, 0] = torch.nextafter(changed[0, 0], torch.tensor(9.0, dtype=W.dtype))
    for count, request in enumerate(
        (
            lambda: WeightSpectrum(changed, cache_dir=tmp_path).top(3),
            lambda: WeightSpectrum(W.view(60, 40), cache_dir=tmp_path).top(3),
            lambda: WeightSpectrum(W.view(torch.float16), cache_dir=tmp_path).top(3),
            lambda: WeightSpectrum(W.float(), cache_dir=tmp_path).top(3),
            lambda: WeightSpectrum(W, cache_dir=tmp_path, seed=1).top(3),
            lambda: WeightSpectrum(W, cache_dir=tmp_path, method="exact").top(3),
            lambda: WeightSpectrum(W, cache_dir=tmp_path).top(4),
            lambda: WeightSpectrum(W, cache_dir=tmp_path).bottom(3),
            lambda: WeightSpectrum(W, cache_dir=tmp_path).minor(3, "output"),
            lambda: WeightSpectrum(W, cache_dir=tmp_path).minor(3, "input"),
        ),
        start=2,
    ):
        request()
        assert files() == count
    monkeypatch.setattr(basis_cache, "ALGORITHM_VERSION", basis_cache.ALGORITHM_VERSION + 1)
    WeightSpectrum(W, cache_dir=tmp_path).top(3)
    assert files() == count + 1


def test_a_weight_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Tensor] = []
    original = basis_cache.weight_digest
    monkeypatch.setattr(basis_cache, "weight_digest", lambda W: calls.append(W) or original(W))
    everything(weight(), tmp_path)
    assert len(calls) == 1


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(basis_cache, "save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        WeightSpectrum(weight(), cache_dir=tmp_path).top(3)
    assert not list(tmp_path.iterdir())
