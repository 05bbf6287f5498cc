"""Fetch the tests of the installed PEFT from its source distribution: ``python tests/conformance/fetch.py``.

They land in ``<environment>/peft-source/<version>/tests``, outside the repository. A folder of that name is complete:
it is unpacked beside and renamed. Nothing but the standard library and pip is used.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

COMMAND = f"{sys.executable} {Path(__file__).resolve()}"


class FetchError(Exception):
    """PEFT's source distribution could not be had; the message says why."""


def source_folder(prefix: Path | None = None, version: str | None = None) -> Path:
    """Where the tests of PEFT ``version`` (the installed one) belong below the environment ``prefix`` (this one)."""
    version = version or importlib.metadata.version("peft")
    return Path(prefix or sys.prefix) / "peft-source" / version


def fetch(folder: Path, version: str) -> Path:
    """Put the tests of PEFT ``version`` into ``folder``/tests; does nothing where they are. Raises ``FetchError``."""
    if (folder / "tests").is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetching-") as scratch:
        unpacked = unpack_tests(download(version, Path(scratch)), Path(scratch) / "unpacked")
        try:
            unpacked.rename(folder)
        except OSError as error:
            if not (folder / "tests").is_dir():  # another process may have been faster
                raise FetchError(f"cannot put PEFT's tests into {folder}: {error}") from error
    return folder


def download(version: str, into: Path) -> Path:
    """The source distribution of PEFT ``version``, by pip with the user's own settings."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary", ":all:", "--no-build-isolation", "--dest", str(into), f"peft=={version}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    found = sorted(into.glob("*.tar.gz"))
    if result.returncode or len(found) != 1:
        raise FetchError(
            f"pip could not download the source distribution of peft {version} (exit status {result.returncode}); it "
            f"needs a network or a mirror, which pip's own settings can name.\n{result.stderr.strip()}"
        )
    return found[0]


def unpack_tests(archive: Path, into: Path) -> Path:
    """Unpack ``peft-<version>/tests`` of ``archive`` as ``into``/tests and nothing else. Raises ``FetchError``."""

    def members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
        for member in tar.getmembers():
            _, _, inside = member.name.partition("/")
            if inside.startswith("tests/") and (member.isfile() or member.isdir()):
                yield member.replace(name=inside, deep=False)

    try:
        with tarfile.open(archive) as tar:
            tar.extractall(into, members=members(tar), filter="data")
    except (tarfile.TarError, OSError) as error:
        raise FetchError(f"cannot unpack {archive.name}: {error}") from error
    if not (into / "tests" / "test_custom_models.py").is_file():
        raise FetchError(f"{archive.name} holds no tests/test_custom_models.py: this release ships no tests")
    return into


def main() -> int:
    version = importlib.metadata.version("peft")
    folder = source_folder(version=version)
    if not (folder / "tests").is_dir():
        print(f"fetching the tests of peft {version}")
    try:
        fetch(folder, version)
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
