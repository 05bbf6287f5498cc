"""Records: written whole or not at all, read back with checks, compared without what may vary."""

import copy
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offprincipal_peft.rlvr import records
from offprincipal_peft.rlvr.records import (
    SCHEMA,
    RecordError,
    environment,
    git_state,
    numeric_fields,
    read_record,
    read_records,
    write_json,
    write_record,
)


def record(**changes: Any) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "id": "lora-lr0.0001-s0-00000000",
        "status": "finished",
        "config": {"method": "lora", "seed": 0},
        "environment": {"python": "3.11"},
        "started": "2000-01-01T00:00:00+00:00",
        "wall_s": 3.5,
        "curve": [{"step": 1, "reward": 0.5, "step_s": 0.2}],
        "evaluations": [{"step": 0, "split": "test", "accuracy": 0.25, "correct": [0, 1, 0, 0]}],
        "result": {"test_accuracy": 0.25, "step_s": 0.2, "peak_memory_bytes": 10, "state_bytes": 7},
        "error": None,
        **changes,
    }


# ---- writing


def test_there_and_back(tmp_path):
    path = tmp_path / "trials" / "a.json"  # the folder is made
    write_record(path, record())
    assert read_record(path) == record()
    assert os.listdir(path.parent) == ["a.json"]
    assert path.stat().st_mode & 0o777 == 0o644  # not the temporary file's 0600


class Disk(OSError):
    pass


@pytest.mark.parametrize("function", ["fsync", "replace", "chmod"])
@pytest.mark.parametrize("error", [Disk, KeyboardInterrupt])
def test_a_write_that_fails_midway_leaves_the_old_file(function, error, tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_record(path, record())

    def broken(*arguments):
        raise error("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(records.os, function, broken)
        with pytest.raises(error):
            write_record(path, record(wall_s=99.0))
    assert os.listdir(tmp_path) == ["a.json"]  # and no temporary file
    assert read_record(path) == record()


def test_what_is_no_json_is_refused_before_anything_is_written(tmp_path):
    path = tmp_path / "a.json"
    write_record(path, record())
    with pytest.raises(TypeError):
        write_record(path, record(result={"value": object()}))
    assert os.listdir(tmp_path) == ["a.json"] and read_record(path) == record()


# The module alone, by its file: the package would import torch, which takes seconds.
WRITER = f"""
import runpy, sys
from pathlib import Path
module = runpy.run_path({records.__file__!r})
SCHEMA, write_record = module["SCHEMA"], module["write_record"]
record = dict(schema=SCHEMA, id="a", status="finished", config={{}}, environment={{}}, curve=[], evaluations=[])
for number in range(10**9):
    write_record(Path(sys.argv[1]), {{**record, "number": number, "filling": [number] * 20_000}})
    if number == 2:
        print("ready", flush=True)
"""


def test_a_killed_writer_leaves_a_whole_file(tmp_path):
    """kill -9 at whatever point of a loop of writes: what lies there is one write's file from start to end."""
    path = tmp_path / "trials" / "a.json"
    for _ in range(3):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        writer.send_signal(signal.SIGKILL)
        assert writer.wait() == -signal.SIGKILL
        found = read_record(path)
        assert found["number"] >= 2 and found["filling"] == [found["number"]] * 20_000
        # What a killed write leaves beside it is not read as a record.
        assert [r["id"] for r in read_records(tmp_path)] == ["a"]


def test_numbers_that_do_not_exist_are_null(tmp_path):
    path = tmp_path / "a.json"
    curve = [{"step": 1, "loss": math.nan, "kl": (math.inf, [-math.inf, np.float64("nan")])}]
    write_record(path, record(curve=curve))
    assert "NaN" not in path.read_text() and "Infinity" not in path.read_text()
    assert read_record(path)["curve"] == [{"step": 1, "loss": None, "kl": [None, [None, None]]}]


def test_paths_and_keys_become_text(tmp_path):
    write_json(tmp_path / "a.json", {1: Path("a/b"), "t": (1, 2), "yes": True})
    assert json.loads((tmp_path / "a.json").read_text()) == {"1": "a/b", "t": [1, 2], "yes": True}


# ---- reading


BROKEN = [
    (record(schema=SCHEMA + 1), f"schema {SCHEMA + 1}; this version reads and writes schema {SCHEMA}"),
    (record(schema="1"), "schema '1'; this version"),
    ({k: v for k, v in record().items() if k != "schema"}, r"not a trial's record \(no 'schema'\)"),
    ([record()], "not a trial's record"),
    ({k: v for k, v in record().items() if k not in ("curve", "id")}, "lacks id, curve"),
    (record(status="running"), "status 'running' is none of finished, failed"),
]


@pytest.mark.parametrize(("value", "words"), BROKEN)
def test_another_schema_and_missing_parts_are_named(value, words, tmp_path):
    path = tmp_path / "trials" / "a.json"
    path.parent.mkdir()
    path.write_text(json.dumps(value))
    for read in (lambda: read_record(path), lambda: read_records(tmp_path)):
        with pytest.raises(RecordError, match=f"trials/a.json: {words}"):
            read()
    with pytest.raises(RecordError, match=words):  # nor is such a record written
        write_record(tmp_path / "b.json", value)
    assert not (tmp_path / "b.json").exists()


def test_a_truncated_file_is_named_wherever_it_ends(tmp_path):
    text = json.dumps(record())
    for length in (0, 1, 20, len(text) // 2, len(text) - 1):
        (tmp_path / "cut.json").write_text(text[:length])
        with pytest.raises(RecordError, match=r"cut.json: not a JSON file .*delete it and the trial runs again"):
            read_record(tmp_path / "cut.json")
    (tmp_path / "cut.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecordError, match=r"cut.json: not a JSON file"):
        read_record(tmp_path / "cut.json")


def test_records_come_sorted_by_id_and_nothing_else_is_read(tmp_path):
    assert read_records(tmp_path) == []
    for name in ("c", "a", "b"):
        write_record(tmp_path / "trials" / f"x{name}.json", record(id=name))
    (tmp_path / "trials" / ".xa.json.1234.tmp").write_text("{")
    (tmp_path / "trials" / "a.log").write_text("not a record")
    assert [r["id"] for r in read_records(tmp_path)] == ["a", "b", "c"]


# ---- what must repeat


def paths(value: Any, at: tuple = ()) -> set[tuple]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {at, *(path for key, item in pairs for path in paths(item, (*at, key)))}


def test_numeric_fields_drops_exactly_what_varies():
    full = record(
        error={"stage": "train", "traceback": "at 0x7f"},
        geometry={"history": [{"step": 1, "geometry/update_norm": 2.0, "seconds": 0.1}]},
    )
    before = copy.deepcopy(full)
    kept = numeric_fields(full)
    assert full == before
    assert paths(full) - paths(kept) == {
        ("environment",),
        ("environment", "python"),
        ("started",),
        ("wall_s",),
        ("curve", 0, "step_s"),
        ("result", "step_s"),
        ("result", "peak_memory_bytes"),
        ("error", "traceback"),
        ("geometry", "history", 0, "seconds"),
    }
    assert paths(kept) <= paths(full)
    assert kept["result"] == {"test_accuracy": 0.25, "state_bytes": 7}  # a method's memory is the same every time


# ---- where it ran


def git(folder: Path, *arguments: str) -> str:
    name = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *name, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_the_state_of_a_checkout(tmp_path):
    package = tmp_path / "checkout" / "package"
    package.mkdir(parents=True)
    git(tmp_path / "checkout", "init", "-q")
    assert git_state(package) is None  # no commit yet
    (package / "a.py").write_text("a = 1\n")
    git(package, "add", "a.py")
    git(package, "commit", "-q", "-m", "first")
    clean = {"commit": git(package, "rev-parse", "HEAD"), "dirty": False}
    assert git_state(package) == clean
    (package / "new.py").write_text("b = 1\n")
    assert git_state(package) == clean  # untracked files are no difference
    (package / "a.py").write_text("a = 2\n")
    assert git_state(package) == {**clean, "dirty": True}


def test_outside_of_a_checkout_and_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    (tmp_path / "plain").mkdir()
    assert git_state(tmp_path / "plain") is None
    assert git_state(tmp_path / "missing") is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(Path(records.__file__).parent) is None


def test_a_package_inside_someone_elses_checkout_has_no_commit(tmp_path):
    """A virtual environment usually lies, ignored, in the checkout of the project that uses it."""
    (tmp_path / ".gitignore").write_text(".venv\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".gitignore")
    git(tmp_path, "commit", "-q", "-m", "first")
    installed = tmp_path / ".venv" / "offprincipal_peft" / "rlvr"
    installed.mkdir(parents=True)
    assert git_state(installed) is None


def test_the_environment_is_plain_json():
    found = environment()
    assert json.loads(json.dumps(found)) == found
    assert set(found) == {"python", "packages", "machine", "threads", "git"}
    assert found["packages"]["offprincipal-peft"] and found["packages"]["torch"]
    assert found["machine"]["cpu"] and found["machine"]["cores"] >= 1 and found["threads"] >= 1
