"""What an installed version lacks: the suite also runs on the lowest versions that pyproject.toml admits."""

from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

import pytest
from packaging.version import Version


def older_than(package: str, first: str) -> bool:
    """Whether the installed `package` came before the release `first`."""
    return Version(version(package)) < Version(first)


def needs(package: str, first: str, feature: str) -> Any:
    """A mark that skips where `feature`, which came with the release `first`, does not exist yet."""
    reason = f"{feature} came with {package} {first}; installed is {version(package)}"
    return pytest.mark.skipif(older_than(package, first), reason=reason)


def runnable(methods: Iterable[str]) -> list[Any]:
    """The names of a comparison's methods, as parameters; one that the installed PEFT lacks is skipped."""
    lacking = {"peft-supertuning": needs("peft", "0.21", "Super-Tuning")}
    return [pytest.param(name, marks=lacking[name]) if name in lacking else name for name in methods]
