"""What PEFT's own tests need around them here, and the hooks that hold their outcomes against explained.py."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from conformance import ledger, local_models
from conformance.stand_ins import moved_starts

HERE = Path(__file__).parent


# Marks in PEFT's modules; skipf is a slip of theirs.
PEFT_MARKS = ("single_gpu_tests", "multi_gpu_tests", "bitsandbytes", "skipf")


def pytest_configure(config: pytest.Config) -> None:
    for mark in PEFT_MARKS:
        config.addinivalue_line("markers", f"{mark}: PEFT's own")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    adopted = [item for item in items if HERE in item.path.parents and ledger.is_adopted(item)]
    names = {id(item): ledger.identity(item) for item in adopted}
    config.stash[ledger.SEEN] = set(names.values())
    out = [item for item in adopted if ledger.deselection(names[id(item)])]
    if out:
        config.hook.pytest_deselected(items=out)
        gone = {id(item) for item in out}
        items[:] = [item for item in items if id(item) not in gone]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if ledger.is_adopted(item):
        wrong = ledger.judge(ledger.identity(item), report)
        if wrong is not None:
            report.outcome, report.longrepr = "failed", wrong
    return report


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's client answers at once that it is offline, where it would retry for minutes."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.utils.hub.is_offline_mode", lambda: True)


@pytest.fixture(autouse=True, scope="module")
def starts_that_change_the_output() -> Iterator[None]:
    with moved_starts():
        yield


@pytest.fixture(scope="session")
def saved_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return local_models.save_all(tmp_path_factory.mktemp("models"))


@pytest.fixture
def local_models_folder(saved_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of local_models are models in the working directory."""
    monkeypatch.chdir(saved_models)
