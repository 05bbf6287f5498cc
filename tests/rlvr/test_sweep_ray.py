"""A sweep on a Ray cluster of two nodes on this machine: the same numbers as without, and a node may be lost."""

import importlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from offprincipal_peft.rlvr import sweep_ray
from offprincipal_peft.rlvr.records import numeric_fields, read_records
from offprincipal_peft.rlvr.sweep import SweepError, SweepSpec, run_sweep
from offprincipal_peft.rlvr.sweep_ray import WorkOrder

FAKE = Path(__file__).with_name("fake_trial.py")
COMMAND = [sys.executable, str(FAKE)]
SPEC = {
    "base": {"learning_rate": 1e-3, "steps": 3},
    "methods": [{"method": "lora", "label": f"t{index}", "rank": index + 1} for index in range(6)],
}
PATIENCE = 90.0  # seconds until a test gives up; no result depends on it
MEMORY = 80 * 1024 * 1024
# A node counts as lost after a second or two instead of half a minute.
HEALTH = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3}


def test_without_ray_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SweepError, match=r"pip install 'offprincipal-peft\[ray\]'"):
        run_sweep(SweepSpec.from_dict(SPEC), tmp_path, ray_address="local", command=COMMAND)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without cores, so that every trial runs on a node that a test adds."""
    ray = pytest.importorskip("ray")
    utilities = importlib.import_module("ray.cluster_utils")
    head = {
        "num_cpus": 0,
        "object_store_memory": MEMORY,
        "_system_config": HEALTH,
        "include_dashboard": False,
        "node_ip_address": "127.0.0.1",
    }
    cluster = utilities.Cluster(initialize_head=True, head_node_args=head)
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="warning")
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def nodes(cluster: Any) -> Iterator[list[Any]]:
    added = [cluster.add_node(num_cpus=1, object_store_memory=MEMORY, node_ip_address="127.0.0.1") for _ in range(2)]
    try:
        yield added
    finally:
        for node in added:
            if node in cluster.worker_nodes:
                cluster.remove_node(node)


@pytest.fixture(scope="module")
def local_numbers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("local")
    run_sweep(SweepSpec.from_dict(SPEC), folder, command=COMMAND)
    return numbers(folder)


def numbers(folder: Path) -> list[dict[str, Any]]:
    return [numeric_fields(record) for record in read_records(folder)]


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False])
def test_two_nodes_give_the_same_numbers(
    shared: bool, nodes: list[Any], tmp_path: Path, local_numbers: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the workers see the sweep's folder or hand their records back."""
    orders: list[WorkOrder] = []

    def order(**values: Any) -> WorkOrder:
        orders.append(WorkOrder(**values | ({} if shared else {"token": "/nowhere", "shared_output": "/nowhere/x"})))
        return orders[-1]

    monkeypatch.setattr(sweep_ray, "WorkOrder", order)
    events: list[dict[str, Any]] = []
    outcome = run_sweep(
        SweepSpec.from_dict(SPEC), tmp_path, ray_address="auto", command=COMMAND, progress=events.append
    )
    assert len(outcome.finished) == len(orders) == 6
    assert numbers(tmp_path) == local_numbers
    assert [event["state"] for event in events].count("finished") == 6
    assert not list((tmp_path / "work").iterdir())
    assert "run 1 of t0-" in (tmp_path / "logs" / f"{outcome.finished[0]}.log").read_text().splitlines()[-1]


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


@pytest.mark.slow
def test_driver_goes_on_where_it_was(nodes: list[Any], tmp_path: Path, local_numbers: list[dict[str, Any]]) -> None:
    ledger = tmp_path / "ledger"
    command = [*COMMAND, "--ledger", str(ledger)]

    class Stop(Exception):
        pass

    def stop(event: dict[str, Any]) -> None:
        if event["state"] == "finished" and event["done"] == 2:
            raise Stop

    with pytest.raises(Stop):
        run_sweep(SweepSpec.from_dict(SPEC), tmp_path / "sweep", ray_address="auto", command=command, progress=stop)
    whole = {path.stem for path in (tmp_path / "sweep" / "trials").glob("*.json")}
    before = len(started(ledger))
    outcome = run_sweep(SweepSpec.from_dict(SPEC), tmp_path / "sweep", ray_address="auto", command=command)
    assert len(whole) == 2 and whole <= set(outcome.skipped)
    assert len(outcome.finished) == 6
    assert not whole & {line[1] for line in started(ledger)[before:]}
    assert numbers(tmp_path / "sweep") == local_numbers


@pytest.mark.slow
def test_trial_that_dies_on_a_worker_is_retried_then_recorded(nodes: list[Any], tmp_path: Path) -> None:
    spec = SweepSpec.from_dict({**SPEC, "methods": SPEC["methods"][:2]})
    command = [*COMMAND, "--ledger", str(tmp_path / "ledger"), "--die", "t1:9"]
    outcome = run_sweep(spec, tmp_path / "sweep", ray_address="auto", command=command)
    assert [trial_id[:2] for trial_id in outcome.failed] == ["t1"]
    error = next(record for record in read_records(tmp_path / "sweep") if record["status"] == "failed")["error"]
    assert error["message"].endswith("(attempts: 2)") and "SIGKILL" in error["message"]
    assert error["traceback"].splitlines()[-1] == "about to die"


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
