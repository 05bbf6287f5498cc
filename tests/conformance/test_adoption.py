"""That PEFT's tests are what runs here: none lost unnoticed, every exception explained, every explanation needed."""

import importlib
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from torch import nn

from conformance import adopt, cases, explained, ledger, source
from conformance.stand_ins import OffPrincipal, OffPrincipalLora, Sparse, moved_starts

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MODULES = sorted(p.stem for p in HERE.glob("test_*.py") if "\nglobals().update(adopt(" in p.read_text())


@pytest.fixture(scope="module", autouse=True)
def every_module_is_adopted() -> None:
    """Also where this file alone is run: adoption happens at import, once."""
    if not source.available():
        pytest.fail(source.MISSING)
    adopted = {identity.split("::")[0] for identity in adopt.KEPT}
    for name in MODULES:
        if name not in adopted:
            spec = importlib.util.spec_from_file_location(f"conformance_{name}", HERE / f"{name}.py")
            spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_no_test_was_lost() -> None:
    """kept.txt names the tests that ran when it was written; PEFT may add some, and renames must be looked at."""
    recorded = set((HERE / "kept.txt").read_text().split())
    gone = recorded - adopt.KEPT
    assert not gone, f"PEFT's tests that are no longer adopted (rename or remove them in kept.txt): {sorted(gone)}"
    assert len(recorded) >= 250  # observed: see the file; an empty record would prove nothing


def test_what_is_left_out_says_why() -> None:
    assert all(adopt.DROPPED.values())
    assert not set(adopt.DROPPED) & adopt.KEPT
    about_lora = [name for name, why in adopt.DROPPED.items() if "Lora" in why and "LoraConfig" in why.split()]
    assert not about_lora


def test_every_explanation_is_used(request: pytest.FixtureRequest) -> None:
    seen = request.config.stash.get(ledger.SEEN, set())
    collected = {name.split("::")[0] for name in seen}
    if set(MODULES) - collected:
        pytest.skip("needs the whole folder to be collected: run pytest tests/conformance")
    assert ledger.unused(seen) == []


def test_an_explanation_that_matches_nothing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "test_x::TestY::test_z[case]"
    monkeypatch.setattr(ledger, "SKIPPED", ())
    monkeypatch.setattr(ledger, "DESELECTED", (explained.Deselected(("test_z[c*]", "test_gone"), "why", "where"),))
    assert ledger.unused({name}) == ["test_gone"]


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("test_a", "m::T::test_a[x-1]", True),
        ("T::test_a", "m::T::test_a", True),
        ("T::test_a", "m::OtherT::test_a", False),
        ("test_a[*x*]", "m::T::test_a[0-x-1]", True),
        ("test_a[*y*]", "m::T::test_a[0-x-1]", False),
        ("test_a", "m::T::test_ab", False),
    ],
)
def test_patterns(pattern: str, name: str, expected: bool) -> None:
    assert ledger.matches(pattern, name) is expected


def test_a_skip_without_an_explanation_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    skip = explained.Skipped(("test_z",), "no GPU", "why", "where")
    monkeypatch.setattr(ledger, "SKIPPED", (skip,))
    report = SimpleNamespace(skipped=True, passed=False, when="call", longrepr=("file", 1, "Skipped: no GPU here"))
    assert ledger.judge("m::T::test_z", report) is None
    assert "does not explain" in ledger.judge("m::T::test_other", report)
    report.longrepr = ("file", 1, "Skipped: because")
    assert "does not explain" in ledger.judge("m::T::test_z", report)


def test_an_explained_skip_that_runs_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "SKIPPED", (explained.Skipped(("test_z",), "no GPU", "why", "where"),))
    report = SimpleNamespace(skipped=False, passed=True, when="call", longrepr=None)
    assert "remove that" in ledger.judge("m::T::test_z", report)
    assert ledger.judge("m::T::test_other", report) is None


def test_the_tests_named_instead_exist() -> None:
    named = [each.instead for each in (*explained.DESELECTED, *explained.SKIPPED)]
    for place in [*named, *explained.REFUSED_LORA_CASES.values()]:
        path, _, test = place.partition("::")
        assert f"def {test}(" in (ROOT / path).read_text(), place


def test_every_refused_case_of_lora_is_explained() -> None:
    patterns = explained.REFUSED_LORA_CASES
    assert len(cases.REFUSED) >= 30  # observed 42
    unexplained = {n: why for n, why in cases.REFUSED.items() if not any(fnmatchcase(n, p) for p in patterns)}
    assert not unexplained
    assert [p for p in patterns if not any(fnmatchcase(n, p) for n in cases.REFUSED)] == []


def test_the_stubs_are_gone() -> None:
    for name in ("diffusers", "parameterized"):
        assert not isinstance(sys.modules.get(name), source._Anything)
    assert getattr(sys.modules.get("parameterized"), "parameterized", None) is not source._Parameterized


@pytest.mark.parametrize("config_cls", [OffPrincipal, OffPrincipalLora, Sparse])
def test_a_moved_start_changes_the_output_and_another_does_not(config_cls: type) -> None:
    switch = "init_weights" if config_cls is Sparse else "init_lora_weights"
    base, x = nn.Sequential(nn.Linear(10, 20)), torch.randn(3, 10)
    expected = base(x)
    with moved_starts():
        still = get_peft_model(base, config_cls(target_modules=["0"]))
        assert torch.equal(still(x), expected)
        still.unload()
        moved = get_peft_model(base, config_cls(target_modules=["0"], **{switch: False}))
        assert (moved(x) - expected).abs().max() > 0.1  # observed 1.3 and more
