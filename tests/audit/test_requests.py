"""What the library is asked for is checked before any work, and refused in words that say what would be right."""

import math
from pathlib import Path
from typing import Any

import pytest

from audit.dense import pair
from audit.test_run import one
from offprincipal_peft.audit import AuditError, CheckpointError, audit


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probes": ["speed"]}, "unknown probe 'speed'; the probes are sparsity, magnitude"),
        ({"probes": "sparsity"}, "probes must be a sequence of names, got the string"),
        ({"probes": []}, "no probe is left"),
        ({"probes": ["consensus"]}, "give two or more"),
        ({"mode": "quick"}, "mode must be 'fast' or 'exact', got 'quick'"),
        ({"rank": 0}, "rank must be a number of directions"),
        ({"rank": 1.5}, "rank must be"),
        ({"rank": True}, "rank must be"),
        ({"rank": math.nan}, "rank must be"),
        ({"principal_density": 1.0}, r"principal_density must lie in \(0, 1\), got 1.0"),
        ({"low_density": 0}, r"low_density must lie in \(0, 1\), got 0"),
        ({"device": "tpu9"}, "device 'tpu9' cannot be used"),
        ({"layers": ["("]}, r"layers: '\(' is no regular expression"),
        ({"layers": "layers"}, "layers must be a sequence of regular expressions, got the string"),
    ],
)
def test_a_request_is_checked(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(AuditError, match=message):
        one(tmp_path, *pair((6, 4)), **options)


def test_requests_are_checked_before_anything_is_opened(tmp_path: Path) -> None:
    for options in ({"probes": ["speed"]}, {"device": "tpu9"}, {"rank": 0}):
        with pytest.raises(AuditError):
            audit(tmp_path / "nowhere", tmp_path / "nowhere", **options)


def test_patterns_and_checkpoints_that_leave_nothing(tmp_path: Path) -> None:
    base, tuned = pair((6, 4))
    with pytest.raises(CheckpointError, match=r"layers: 'q_proj' matches none of the compared weights, for instance"):
        one(tmp_path, base, tuned, layers=["q_proj"])
    with pytest.raises(CheckpointError, match="at least one tuned"):
        audit(tmp_path / "side0")
    sides = [tmp_path / "side0", *[tmp_path / "side1"] * 31]
    with pytest.raises(AuditError, match="'consensus' takes 30 tuned checkpoints at most, got 31"):
        audit(*sides)
    assert len(audit(*sides, probes=["sparsity"]).verdicts) == 31
