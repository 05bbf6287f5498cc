"""What an installed version lacks: the suite also runs on the lowest versions that pyproject.toml admits."""

from importlib.metadata import version

from packaging.version import Version


def older_than(package: str, first: str) -> bool:
    """Whether the installed `package` came before the release `first`."""
    return Version(version(package)) < Version(first)
