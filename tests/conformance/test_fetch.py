"""The script that fetches PEFT's tests: whole or not at all, only what belongs, a word about what went wrong."""

import io
import tarfile
from pathlib import Path

import pytest

from conformance import fetch


def _archive(path: Path, names: list[str]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 2
            tar.addfile(member, io.BytesIO(b"x\n"))
    return path


GOOD = ["peft-1/tests/test_custom_models.py", "peft-1/tests/deep/data.json", "peft-1/src/peft/__init__.py"]


def test_only_the_tests_are_unpacked(tmp_path: Path) -> None:
    fetch.unpack_tests(_archive(tmp_path / "a.tar.gz", GOOD), tmp_path / "out")
    found = sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert found == ["tests/deep/data.json", "tests/test_custom_models.py"]


def test_a_path_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    archive = _archive(tmp_path / "a.tar.gz", [*GOOD, "peft-1/tests/../../../evil.py"])
    with pytest.raises(fetch.FetchError, match="cannot unpack"):
        fetch.unpack_tests(archive, tmp_path / "out")
    assert not (tmp_path.parent / "evil.py").exists()


def test_a_release_without_tests_says_so(tmp_path: Path) -> None:
    with pytest.raises(fetch.FetchError, match="ships no tests"):
        fetch.unpack_tests(_archive(tmp_path / "a.tar.gz", GOOD[2:]), tmp_path / "out")


def test_a_second_fetch_does_nothing_and_a_failed_one_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloads = []

    def download(version: str, into: Path) -> Path:
        downloads.append(version)
        return _archive(into / "a.tar.gz", GOOD if len(downloads) > 1 else GOOD[2:])

    monkeypatch.setattr(fetch, "download", download)
    folder = fetch.source_folder(tmp_path, "1.2.3")
    with pytest.raises(fetch.FetchError):
        fetch.fetch(folder, "1.2.3")
    assert list(folder.parent.iterdir()) == []
    fetch.fetch(folder, "1.2.3")
    fetch.fetch(folder, "1.2.3")
    assert downloads == ["1.2.3", "1.2.3"]
    assert (folder / "tests" / "test_custom_models.py").is_file()
    assert [p.name for p in folder.parent.iterdir()] == ["1.2.3"]


def test_without_a_network_it_says_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(fetch.FetchError, match=r"could not download the source distribution of peft 0\.0\.0"):
        fetch.download("0.0.0", tmp_path)
