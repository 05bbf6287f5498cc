"""A sweep on a Ray cluster of two nodes on this machine: the same numbers as without, and a node may be lost."""

import importlib
import socket
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from offprincipal_peft.rlvr import sweep_ray
from offprincipal_peft.rlvr.records import numeric_fields, read_records
from offprincipal_peft.rlvr.sweep import SweepError, SweepSpec, run_sweep
from offprincipal_peft.rlvr.sweep_ray import WorkOrder
from versions import older_than

FAKE = Path(__file__).with_name("fake_trial.py")
COMMAND = [sys.executable, str(FAKE)]
SPEC = {
    "base": {"learning_rate": 1e-3, "steps": 3},
    "methods": [{"method": "lora", "label": f"t{index}", "rank": index + 1} for index in range(6)],
}
PATIENCE = 90.0  # seconds until a test gives up; no result depends on it
MEMORY = 80 * 1024 * 1024
# A node whose process is gone counts as lost after seconds; one that is only slow has the usual time to answer.
HEALTH = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 5}


def test_without_ray_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SweepError, match=r"pip install 'offprincipal-peft\[ray\]'"):
        run_sweep(SweepSpec.from_dict(SPEC), tmp_path, ray_address="local", command=COMMAND)


def test_connection_of_another_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_ray, "import_ray", lambda: types.SimpleNamespace(is_initialized=lambda: True))
    with pytest.raises(SweepError, match=r"connected to a Ray cluster already: call ray\.shutdown\(\)"):
        run_sweep(SweepSpec.from_dict(SPEC), tmp_path, ray_address="local", command=COMMAND)


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_cluster_that_is_not_there(scheme: str, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(SweepError, match=rf"--ray {scheme}127.0.0.1:{port}: nothing answers there \(.*refused\)"):
        run_sweep(SweepSpec.from_dict(SPEC), tmp_path, ray_address=f"{scheme}127.0.0.1:{port}", command=COMMAND)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without cores, so that every trial runs on one of the nodes that a test adds."""
    pytest.importorskip("ray")
    utilities = importlib.import_module("ray.cluster_utils")
    head = {"num_cpus": 0, "object_store_memory": MEMORY, "_system_config": HEALTH, "include_dashboard": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        if older_than("ray", "2.52"):
            patch.setattr("ray._private.ray_constants.ENABLE_RAY_CLUSTER", False)  # then its address is 127.0.0.1
        cluster = utilities.Cluster(initialize_head=True, head_node_args=head)
        patch.setenv("RAY_ADDRESS", cluster.address)  # what "auto" means
        try:
            yield cluster
        finally:
            cluster.shutdown()


@pytest.fixture
def nodes(cluster: Any) -> list[Any]:
    """Two nodes of one core, whatever a test before did to them."""
    while len(cluster.worker_nodes) < 2:
        cluster.add_node(num_cpus=1, object_store_memory=MEMORY)
    return list(cluster.worker_nodes)


@pytest.fixture(scope="module")
def local_numbers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("local")
    run_sweep(SweepSpec.from_dict(SPEC), folder, command=COMMAND)
    return numbers(folder)


def numbers(folder: Path) -> list[dict[str, Any]]:
    return [numeric_fields(record) for record in read_records(folder)]


@pytest.mark.slow
def test_records_are_handed_back(
    nodes: list[Any],
    tmp_path: Path,
    local_numbers: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The workers do not see the sweep's folder; one trial's process dies once."""
    monkeypatch.setattr(
        sweep_ray,
        "WorkOrder",
        lambda **values: WorkOrder(**values | {"token": "/nowhere/token", "shared_output": "/nowhere/out.json"}),
    )
    events: list[dict[str, Any]] = []
    command = [*COMMAND, "--ledger", str(tmp_path / "ledger"), "--die", "t1:1"]
    outcome = run_sweep(
        SweepSpec.from_dict(SPEC),
        tmp_path / "sweep",
        ray_address="auto",
        command=command,
        progress=events.append,
    )
    assert len(outcome.finished) == 6
    assert numbers(tmp_path / "sweep") == local_numbers
    assert [event["id"][:2] for event in events if event["state"] == "retry"] == ["t1"]
    assert not list((tmp_path / "sweep" / "work").iterdir())
    log = (tmp_path / "sweep" / "logs" / f"{outcome.finished[1]}.log").read_text().splitlines()
    assert [line for line in log if not line.startswith("===")][1:] == [
        "about to die",
        f"run 2 of {outcome.finished[1]}",
    ]


@pytest.mark.slow
def test_driver_goes_on_where_it_was(nodes: list[Any], tmp_path: Path, local_numbers: list[dict[str, Any]]) -> None:
    """The workers see the sweep's folder; the driver is stopped when two trials have finished."""
    ledger = tmp_path / "ledger"
    options: dict[str, Any] = {
        "ray_address": "auto",
        "command": [*COMMAND, "--ledger", str(ledger)],
    }

    class Stop(Exception):
        pass

    def stop(event: dict[str, Any]) -> None:
        if event["state"] == "finished" and event["done"] == 2:
            raise Stop

    with pytest.raises(Stop):
        run_sweep(SweepSpec.from_dict(SPEC), tmp_path / "sweep", progress=stop, **options)
    assert wait_for(lambda: not any(is_alive(int(line[2])) for line in started(ledger)))
    whole = {path.stem for path in (tmp_path / "sweep" / "trials").glob("*.json")}
    before = len(started(ledger))
    outcome = run_sweep(SweepSpec.from_dict(SPEC), tmp_path / "sweep", **options)
    assert len(whole) == 2 and whole <= set(outcome.skipped)
    assert len(outcome.finished) == 6
    assert not whole & {line[1] for line in started(ledger)[before:]}
    assert numbers(tmp_path / "sweep") == local_numbers
    assert not list((tmp_path / "sweep" / "work").iterdir())


@pytest.mark.slow
def test_lost_node_loses_no_trial(
    cluster: Any, nodes: list[Any], tmp_path: Path, local_numbers: list[dict[str, Any]]
) -> None:
    """Both nodes are in the middle of a trial when one is killed; its trial runs again on the other."""
    ledger, go_on = tmp_path / "ledger", tmp_path / "go-on"
    first: list[list[str]] = []

    def lose_a_node() -> None:
        try:
            first.extend(wait_for(lambda: started(ledger) if len(started(ledger)) == 2 else None))
            cluster.remove_node(nodes[0], allow_graceful=False)
            wait_for(lambda: sum(is_alive(int(line[2])) for line in first) == 1)
        finally:
            go_on.touch()

    killer = threading.Thread(target=lose_a_node)
    killer.start()
    command = [*COMMAND, "--ledger", str(ledger), "--wait", str(go_on)]
    outcome = run_sweep(SweepSpec.from_dict(SPEC), tmp_path / "sweep", ray_address="auto", command=command)
    killer.join()
    assert len(first) == 2
    assert len(outcome.finished) == 6
    assert numbers(tmp_path / "sweep") == local_numbers
    starts = [line[1] for line in started(ledger)]
    twice = [trial_id for trial_id in set(starts) if starts.count(trial_id) == 2]
    assert len(starts) == 7 and len(twice) == 1 and twice[0] in [line[1] for line in first]


def started(ledger: Path) -> list[list[str]]:
    lines = [line.split() for line in ledger.read_text().splitlines()] if ledger.exists() else []
    return [line for line in lines if line[0] == "start"]


def is_alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_for(question: Callable[[], Any]) -> Any:
    """The first answer that is something."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if answer := question():
            return answer
        time.sleep(0.02)
    raise AssertionError("waited in vain")
