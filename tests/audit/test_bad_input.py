"""Bad input through the library and the command: what is skipped is named with its reason, and when it is refused."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from audit.dense import pair
from audit.test_run import model
from offprincipal_peft import cli
from offprincipal_peft.audit import AuditError, CheckpointError, audit

UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WORDS = re.compile(r"\s+")


def sound() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """UP and DOWN before and after."""
    pairs = {UP: pair((48, 32)), DOWN: pair((32, 48), seed=1)}
    return {name: both[0] for name, both in pairs.items()}, {name: both[1] for name, both in pairs.items()}


def command(*words: object) -> int:
    return cli.main(["audit", *map(str, words)])


# ---- what can be answered without the faulty part: exit code 0

Case = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]  # added to base, to tuned; tuned's config.json


def _skipping() -> dict[str, tuple[Case, dict[str, str]]]:
    embedding = torch.randn(20, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    codes, scale = torch.ones(48, 32, dtype=torch.int8), torch.ones(48)
    bnb = {"quantization_config": {"quant_method": "bitsandbytes"}}
    fp8 = torch.ones(48, 32).to(torch.float8_e4m3fn)
    x = "model.layers.1.mlp.up_proj.weight"
    return {
        "another shape": (
            ({x: torch.ones(4, 6)}, {x: torch.ones(6, 4)}, {}),
            {x: r"shape (4, 6) in base and (6, 4) in tuned"},
        ),
        "missing": (({x: torch.ones(4, 6)}, {}, {}), {x: "missing in tuned"}),
        "extra": (({}, {x: torch.ones(4, 6)}, {}), {x: "missing in base"}),
        "tied in tuned": (
            (
                {EMBEDDING: embedding, HEAD: embedding.clone()},
                {EMBEDDING: embedding + 1},
                {"tie_word_embeddings": True},
            ),
            {HEAD: f"tied: the same content as {EMBEDDING} in base, and missing in tuned"},
        ),
        "tied in base": (
            ({EMBEDDING: embedding}, {EMBEDDING: embedding + 1, HEAD: embedding + 1}, {}),
            {HEAD: f"tied: the same content as {EMBEDDING} in tuned, and missing in base"},
        ),
        "untied by training": (
            ({EMBEDDING: embedding}, {EMBEDDING: embedding, HEAD: embedding + 1}, {}),
            {HEAD: f"which may tie it to {EMBEDDING}; in tuned their contents differ, so it is untied there"},
        ),
        "int8": (
            ({x: torch.ones(48, 32)}, {x: codes, x.removesuffix("weight") + "SCB": scale}, bnb),
            {
                x: "quantised by bitsandbytes: stored as I8 in tuned",
                x.removesuffix("weight") + "SCB": f"belongs to {x}",
            },
        ),
        "fp8": (
            ({x: torch.ones(48, 32)}, {x: fp8, f"{x}_scale_inv": scale[:1]}, {}),
            {x: "quantised: stored as F8_E4M3 in tuned", f"{x}_scale_inv": f"quantised: belongs to {x} in tuned"},
        ),
        "integers": (
            ({"ids": torch.arange(4)}, {"ids": torch.arange(4)}, {}),
            {"ids": "holds I64 values in base, which are no floating-point weights"},
        ),
    }


SKIPPING = _skipping()


@pytest.mark.parametrize("case", SKIPPING)
def test_what_is_skipped_is_named_and_the_rest_is_answered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    (base, tuned, config), reasons = SKIPPING[case]
    before, after = sound()
    plain = audit(model(tmp_path / "b0", before), model(tmp_path / "t0", after))
    sides = model(tmp_path / "b", before | base), model(tmp_path / "t", after | tuned, **config)
    report = audit(*sides)
    assert {name for name, _ in report.skipped} == set(reasons)
    for name, reason in report.skipped:
        assert reasons[name] in reason
    compared = {weight.name: weight for weight in report.weights}
    assert {UP, DOWN} <= set(compared) and not set(compared) & set(reasons)
    for weight in plain.weights:
        assert compared[weight.name].changes[0].spectrum == weight.changes[0].spectrum
    assert command(*sides) == cli.DONE
    told = WORDS.sub(" ", capsys.readouterr().out)
    assert f"Not compared: {len(reasons)} tensor" in told
    for name, reason in report.skipped:
        assert name in told and reason in told


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_weights_that_are_not_finite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], side: int, value: float
) -> None:
    sides = sound()
    sides[side][UP] = sides[side][UP].clone()
    sides[side][UP][2, 3] = value
    folders = model(tmp_path / "b", sides[0]), model(tmp_path / "t", sides[1])
    report = audit(*folders)
    found = {weight.name: weight.changes[0] for weight in report.weights}
    assert found[UP].notes and "NaN or infinite entries" in found[UP].notes[0]
    assert found[UP].nonfinite == (1 - side, side) and found[UP].spectrum is None
    assert found[DOWN].spectrum is not None and found[DOWN].nonfinite == (0, 0) and not found[DOWN].notes
    assert command(*folders, "--json", tmp_path / "a.json", "--html", tmp_path / "a.html") == cli.DONE
    told = WORDS.sub(" ", capsys.readouterr().out)
    assert UP in told and re.search("NaN or infinite|not finite", told)
    assert (tmp_path / "a.json").is_file() and (tmp_path / "a.html").is_file()


def test_mixed_dtypes_are_compared_in_the_coarser_with_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, _ = sound()
    wide = {name: tensor.float() * 1.0001 for name, tensor in before.items()}  # below half a bf16 step
    folders = model(tmp_path / "b", before), model(tmp_path / "t", wide)
    report = audit(*folders)
    assert all("BF16 in base, F32 in tuned" in weight.notes[0] for weight in report.weights)
    assert all(weight.changes[0].stored_changed == 0 < weight.changes[0].norm for weight in report.weights)
    assert command(*folders) == cli.DONE
    assert "compared in bfloat16" in WORDS.sub(" ", capsys.readouterr().out)


# ---- what cannot be answered: exit code 2 and one line


def _truncated(path: Path) -> Path:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return path


def _corrupt(path: Path) -> Path:
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[:12] + b"\xff\x00{" + data[15:])
    return path


def _adapter(path: Path) -> Path:
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "m"}))
    return path


REFUSED: dict[str, tuple[Callable[[Path, Path, Path], list[object]], str]] = {
    "nothing to compare": (lambda r, b, t: [b, model(r / "x", {"other": torch.ones(3)})], "has the name of one in"),
    "every shape another": (
        lambda r, b, t: [b, model(r / "x", {UP: torch.ones(3), DOWN: torch.ones(2)})],
        "can be compared with its namesake",
    ),
    "a truncated tuned file": (lambda r, b, t: [b, _truncated(t)], "is cut short: its tensors end at byte"),
    "a truncated base": (lambda r, b, t: [_truncated(b), t], "is cut short: its tensors end at byte"),
    "a corrupt base": (lambda r, b, t: [_corrupt(b), t], "the header is not JSON"),
    "a corrupt tuned file": (lambda r, b, t: [b, _corrupt(t)], "the header is not JSON"),
    "an adapter as BASE": (lambda r, b, t: [_adapter(r / "x"), t], "holds a PEFT adapter of m"),
    "no such folder": (lambda r, b, t: [b, r / "nowhere"], "nowhere does not exist"),
    "an empty folder": (lambda r, b, t: [b, (r / "x").mkdir() or r / "x"], "holds no safetensors file"),
    "an unknown probe": (lambda r, b, t: [b, t, "--probes", "angles,speed"], "unknown probe 'speed'; the probes are"),
    "no probe": (lambda r, b, t: [b, t, "--probes", ","], "no probe is left"),
    "consensus of one": (lambda r, b, t: [b, t, "--probes", "consensus"], "give two or more"),
    "a pattern without match": (lambda r, b, t: [b, t, "--layers", "q_proj"], "'q_proj' matches none of the compared"),
    "a bad pattern": (lambda r, b, t: [b, t, "--layers", "("], "'(' is no regular expression"),
    "a bad device": (lambda r, b, t: [b, t, "--device", "tpu9"], "device 'tpu9' cannot be used"),
    "a rank of 0": (lambda r, b, t: [b, t, "--rank", "0"], "rank must be"),
    "a rank of 1.5": (lambda r, b, t: [b, t, "--rank", "1.5"], "rank must be"),
    "a density of 1": (lambda r, b, t: [b, t, "--low-density", "1"], "low_density must lie in (0, 1)"),
    "json into no folder": (lambda r, b, t: [b, t, "--json", r / "none" / "a.json"], "there is no folder"),
    "html into no folder": (lambda r, b, t: [b, t, "--html", r / "none" / "a.html"], "there is no folder"),
    "json over a folder": (lambda r, b, t: [b, t, "--json", r], "is a folder"),
    "one file for both": (lambda r, b, t: [b, t, "--json", r / "a", "--html", r / "a"], "--json and --html"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_answered_is_one_line_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    make, message = REFUSED[case]
    before, after = sound()
    words = make(tmp_path, model(tmp_path / "base", before), model(tmp_path / "tuned", after))
    monkeypatch.setattr("offprincipal_peft.audit.run._Work.weight", lambda *_: pytest.fail("work was done"))
    there = sorted(tmp_path.rglob("*"))
    assert command(*words) == cli.MISTAKE
    out, error = capsys.readouterr()
    assert error.startswith("error: ") and error.count("\n") == 1 and not out
    assert message in error
    assert sorted(tmp_path.rglob("*")) == there


@pytest.mark.parametrize("words", [[], ["only-base"], ["b", "t", "--mode", "quick"], ["b", "t", "--rank", "two"]])
def test_a_command_that_is_no_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command(*words)
    assert stop.value.code == cli.MISTAKE and "usage: offprincipal audit" in capsys.readouterr().err


def test_the_library_refuses_with_the_same_words(tmp_path: Path) -> None:
    before, after = sound()
    base, tuned = model(tmp_path / "b", before), model(tmp_path / "t", after)
    with pytest.raises(CheckpointError, match="is cut short"):
        audit(base, _truncated(model(tmp_path / "x", after)))
    with pytest.raises(CheckpointError, match="has the name of one in"):
        audit(base, model(tmp_path / "y", {"other": torch.ones(3)}))
    with pytest.raises(CheckpointError, match="holds a PEFT adapter"):
        audit(_adapter(tmp_path / "z"), tuned)
    with pytest.raises(AuditError, match="device"):
        audit(base, tuned, device="tpu9")


def test_a_file_that_shrinks_while_it_is_audited(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Found in the middle of the work: still one line, and no report beside it."""
    before, after = sound()
    base, tuned = model(tmp_path / "b", before), model(tmp_path / "t", after)

    def shrink(*_: object) -> None:
        file = tuned / "model.safetensors"
        with file.open("r+b") as stream:
            stream.truncate(file.stat().st_size - 4000)

    with pytest.raises(CheckpointError, match="became shorter since it was opened"):
        audit(base, tuned, progress=shrink)
