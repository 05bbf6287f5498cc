"""An audit survives its JSON whole, and what is no such file is refused with its place."""

import base64
import copy
import dataclasses
import json
import math
import os
import threading
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from audit.reports import PROBES, report
from offprincipal_peft.audit import storing
from offprincipal_peft.audit.page import write_page
from offprincipal_peft.audit.results import AuditReport, Inequality, Map
from offprincipal_peft.audit.storing import AuditFormatError, from_json, read_json_report, to_json, write_json

CASES = {
    "one": report(),
    "five": report(2, ("a", "b", "c", "d", "e")),
    "still": report(1, still=True),
    "counts only": report(2, probes=("bf16",)),
    "nothing": dataclasses.replace(report(1), weights=[], sources=[], skipped=[], verdicts=[]),
}


def same(first: Any, second: Any) -> bool:
    """Equal values of equal types, NaN as NaN and tensors by their content."""
    if type(first) is not type(second):
        return False
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if dataclasses.is_dataclass(first):
        return all(same(getattr(first, f.name), getattr(second, f.name)) for f in dataclasses.fields(first))
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, dict):
        return list(first) == list(second) and all(same(first[key], second[key]) for key in first)
    return first == second or (isinstance(first, float) and math.isnan(first) and math.isnan(second))


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_lost(tmp_path: Path, case: str) -> None:
    path = tmp_path / "deep" / "audit.json"
    write_json(CASES[case], path)
    assert same(read_json_report(path), CASES[case])
    assert [file.name for file in path.parent.iterdir()] == ["audit.json"]


def test_the_comparison_of_this_file_sees_a_difference() -> None:
    made = to_json(CASES["one"])
    made["weights"][1]["changes"][0]["map"]["density"]["zlib"] = base64.b64encode(zlib.compress(bytes(144))).decode()
    assert not same(from_json(made), CASES["one"])
    assert not same(dataclasses.replace(CASES["one"], seconds=12), dataclasses.replace(CASES["one"], seconds=12.0))


def awkward() -> AuditReport:
    """NaN, both infinities, the smallest numbers and a map without cells."""
    made = report(1, kinds=("q_proj",), outside=False)
    change = dataclasses.replace(
        made.weights[0].changes[0],
        norm=math.nan,
        largest=math.inf,
        bounds={"weyl": Inequality(5e-324, math.inf), "mirsky": Inequality(-math.inf, 0.1 + 0.2)},
        map=Map(torch.zeros(0, 3, dtype=torch.uint8)),
    )
    weight = dataclasses.replace(made.weights[0], changes=[change], name='"\u2028 ünï')
    return dataclasses.replace(made, weights=[weight], settings=dataclasses.replace(made.settings, rank=7))


def test_numbers_that_json_lacks_come_back(tmp_path: Path) -> None:
    made = awkward()
    write_json(made, tmp_path / "a.json")

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} stands in the file")

    json.loads((tmp_path / "a.json").read_text(encoding="utf-8"), parse_constant=refuse)
    found = read_json_report(tmp_path / "a.json")
    assert same(found, made)
    assert type(found.settings.rank) is int and type(from_json(to_json(report())).settings.rank) is float


def test_a_string_that_looks_like_infinity_stays_a_string() -> None:
    made = dataclasses.replace(report(1), error="inf")
    assert from_json(json.loads(json.dumps(to_json(made)))).error == "inf"


def change(path: str, value: Any) -> dict[str, Any]:
    """A stored audit with one place changed; a ``...`` value takes it away."""
    made = copy.deepcopy(to_json(report(1, kinds=("q_proj",), outside=False)))
    at: Any = made
    *inner, last = [int(part) if part.isdigit() else part for part in path.split("/")]
    for part in inner:
        at = at[part]
    if value is ...:
        del at[last]
    else:
        at[last] = value
    return made


FAULTS = {
    "another version": (
        change("format", "offprincipal-audit/0"),
        "format is 'offprincipal-audit/0', this",
    ),
    "another file": ({"schema": 1}, "a stored audit is an object with a 'format'"),
    "a list": ([1], "a stored audit is an object"),
    "a missing field": (change("weights/0/changes/0/norm", ...), r"weights\[0\].changes\[0\].norm is missing"),
    "a foreign field": (change("settings/speed", 3), "settings has no field 'speed'; it has probes"),
    "text for a number": (change("seconds", "fast"), 'seconds should be a number, not "fast"'),
    "a flag for a number": (change("seconds", True), "seconds should be a number, not true"),
    "half a count": (change("weights/0/entries", 1.5), r"weights\[0\].entries should be a whole number, not 1.5"),
    "a short pair": (change("skipped/0", ["a"]), r"skipped\[0\] should be a list of 2"),
    "a change too few": (
        change("weights/0/changes", []),
        r"weights\[0\].changes should be a list of 1, one for each tuned checkpoint, not of 0",
    ),
    "a verdict too few": (change("verdicts", []), "verdicts should be a list of 1, one for each tuned checkpoint"),
    "a cut map": (
        change("weights/0/changes/0/map/density/shape", [5, 5]),
        r"holds 144 bytes, its shape \[5, 5\]",
    ),
    "a broken map": (change("weights/0/changes/0/map/density/zlib", "AAAA"), "density.zlib cannot be unpacked"),
    "no map": (change("weights/0/changes/0/map/density", 3), "density should be a map"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_what_does_not_fit_is_refused_with_its_place(tmp_path: Path, case: str) -> None:
    data, message = FAULTS[case]
    with pytest.raises(AuditFormatError, match=message):
        from_json(data)
    path = tmp_path / "x.json"
    path.write_text(json.dumps(data))
    with pytest.raises(AuditFormatError, match=f"x.json: .*{message}"):
        read_json_report(path)


def test_a_file_that_is_no_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for content in (b"", b"{", b"\xff\xfe\x00"):
        path.write_bytes(content)
        with pytest.raises(AuditFormatError, match=r"x\.json is no JSON file"):
            read_json_report(path)
    with pytest.raises(FileNotFoundError):
        read_json_report(tmp_path / "none.json")


def test_fields_with_a_default_may_be_missing() -> None:
    made = to_json(report(1, probes=("bf16",)))
    for name in ("low", "angles", "notes", "nonfinite"):
        del made["weights"][0]["changes"][0][name]
    assert same(from_json(made), report(1, probes=("bf16",)))


def test_an_interrupted_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "audit.json"
    write_json(report(1), path)
    before = path.read_bytes()

    def broken(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(storing.os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        write_json(report(2), path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_maps_are_small_and_only_uint8() -> None:
    made = report(1, kinds=("q_proj",), outside=False, probes=PROBES)
    density = made.weights[0].changes[0].map
    assert density is not None
    stored = to_json(made)["weights"][0]["changes"][0]["map"]["density"]
    assert zlib.decompress(base64.b64decode(stored["zlib"])) == bytes(density.density.flatten().tolist())
    change = dataclasses.replace(made.weights[0].changes[0], map=Map(torch.zeros(2, 2)))
    with pytest.raises(TypeError, match=r"a map's density is uint8, got torch\.float32"):
        to_json(dataclasses.replace(made, weights=[dataclasses.replace(made.weights[0], changes=[change])]))


def test_a_name_that_is_no_text_is_stored_too(tmp_path: Path) -> None:
    """A folder's name may be bytes that are no UTF-8; hours of work must not end with them."""
    source = dataclasses.replace(report(1).sources[1], path=os.fsdecode(b"/models/\xff"))
    made = dataclasses.replace(report(1), sources=[report(1).sources[0], source])
    write_json(made, tmp_path / "a.json")
    assert same(read_json_report(tmp_path / "a.json"), made)
    write_page(made, tmp_path / "a.html")
    assert "/models/\\udcff" in (tmp_path / "a.html").read_text(encoding="utf-8")


def test_what_is_no_file_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    """A pipe or /dev/stdout, and a link to a file elsewhere."""
    pipe, found = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: found.append(pipe.read_text(encoding="utf-8")), daemon=True)
    reader.start()
    storing.write_text(pipe, "a report")
    reader.join(10)
    assert found == ["a report"] and pipe.is_fifo()
    receiving, sending = os.pipe()
    storing.write_text(f"/dev/fd/{sending}", "to a pipe without a name")
    assert os.read(receiving, 100) == b"to a pipe without a name"
    for end in (receiving, sending):
        os.close(end)
    (tmp_path / "there").mkdir()
    link, target = tmp_path / "link", tmp_path / "there" / "file"
    link.symlink_to(target)
    for text in ("new", "old and new"):
        storing.write_text(link, text)
        assert link.is_symlink() and target.read_text() == text


def test_a_name_as_long_as_names_can_be(tmp_path: Path) -> None:
    storing.write_text(tmp_path / ("x" * 250 + ".json"), "text")
    assert [len(path.name) for path in tmp_path.iterdir()] == [255]


def test_a_number_beyond_all_numbers_is_refused_with_its_place() -> None:
    with pytest.raises(AuditFormatError, match="seconds should be a number"):
        from_json(change("seconds", 10**400))
