"""PEFT's own test modules, imported from its source distribution as a package that only the conformance tests know."""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conformance.fetch import COMMAND, source_folder

PACKAGE = "peft_own_tests"
TESTS: Path = source_folder() / "tests"
MISSING = f"PEFT's own tests are not in {TESTS}. Fetch them (once for each version of PEFT) with: {COMMAND}"

pytest.register_assert_rewrite(PACKAGE)


def available() -> bool:
    return TESTS.is_dir()


def load(name: str) -> types.ModuleType:
    """PEFT's test module ``name``. Raises ``FileNotFoundError`` where the tests were not fetched."""
    if not available():
        raise FileNotFoundError(MISSING)
    if PACKAGE not in sys.modules:
        package = types.ModuleType(PACKAGE)
        package.__path__ = [str(TESTS)]
        sys.modules[PACKAGE] = package
    with _stubs():
        module = importlib.import_module(f"{PACKAGE}.{name}")
    if hasattr(module, "hub_online_once"):
        module.hub_online_once = offline
    return module


@contextlib.contextmanager
def offline(model_id: str) -> Iterator[None]:
    """Instead of PEFT's ``hub_online_once``, which tells the hub's client that there is a network."""
    yield


class _Anything(types.ModuleType):
    """A module in which every name is an empty class."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _Parameterized:
    """Stands for ``parameterized.parameterized``; its tests are for models of the hub and are not taken over."""

    @staticmethod
    def expand(*args: Any) -> Any:
        return lambda test: None


@contextlib.contextmanager
def _stubs() -> Iterator[None]:
    """Packages that PEFT's tests import and this environment lacks, for the time of an import."""
    diffusers = _Anything("diffusers")
    diffusers.__version__ = "0"
    parameterized = types.ModuleType("parameterized")
    parameterized.parameterized = _Parameterized  # type: ignore[attr-defined]
    stubs = {"diffusers": diffusers, "parameterized": parameterized}
    with pytest.MonkeyPatch.context() as patch:
        for name, stub in stubs.items():
            patch.setitem(sys.modules, name, stub)
        yield
