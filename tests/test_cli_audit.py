"""``offprincipal audit``: its files, its tables, its progress, adapters as TUNED, and an interrupted run."""

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from audit.planted import base_model, plant, write
from interop.exporting import load_base, save_base, saved, trained
from offprincipal_peft import cli
from offprincipal_peft.audit import audit, from_json, open_checkpoint, read_json_report, to_json
from offprincipal_peft.commands import audit as command
from offprincipal_peft.interop.audit_source import open_adapter


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("pair")
    return write(root / "base", base_model(torch.bfloat16)), plant(root / "tuned", "rows", torch.bfloat16)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny base, an off-principal adapter of it and a plain LoRA with two adapters in it."""
    root = tmp_path_factory.mktemp("adapters")
    base = save_base(root / "base")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    host = peft.get_peft_model(load_base(base), lora)
    host.add_adapter("second", lora)
    return {
        "base": base,
        "off": saved(trained(base, "offprincipal"), root / "off"),
        "plain": saved(host, root / "plain"),
    }


def run(*words: object) -> int:
    return cli.main(["audit", *map(str, words)])


def timeless(data: dict[str, Any]) -> dict[str, Any]:
    return data | {"seconds": 0.0}


def test_json_is_what_the_library_returns(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--probes", "sparsity, stripes,angles", "--layers", r"layers\.0\.", "--layers", "norm", "--rank", "0.1")
    more = ("--principal-density", "0.3", "--low-density", "0.2")
    assert run(*pair, *options, *more, "--json", tmp_path / "a.json") == cli.DONE
    found = json.loads((tmp_path / "a.json").read_text())
    expected = audit(
        *pair,
        probes=["sparsity", "angles", "stripes"],
        layers=[r"layers\.0\.", "norm"],
        rank=0.1,
        principal_density=0.3,
        low_density=0.2,
    )
    assert timeless(found) == timeless(to_json(expected))
    assert from_json(found).settings.rank == 0.1 and read_json_report(tmp_path / "a.json").verdicts
    assert f"written: {tmp_path}/a.json" in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_a_whole_number_is_a_count(pair: tuple[Path, Path], tmp_path: Path) -> None:
    assert run(*pair, "--rank", "3", "--mode", "exact", "--probes", "angles", "--json", tmp_path / "a.json") == cli.DONE
    report = read_json_report(tmp_path / "a.json")
    assert (report.settings.rank, report.settings.mode) == (3, "exact")
    assert {w.changes[0].angles.k for w in report.weights if w.changes[0].angles} == {3}


def test_the_page_is_written(pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.html").write_text("an older one")
    assert run(*pair, "--html", tmp_path / "a.html") == cli.DONE
    page = (tmp_path / "a.html").read_text()
    assert page.lstrip().lower().startswith("<!doctype html") and "</html>" in page
    assert "Striped by rows" in page and "q_proj" in page
    assert f"written: {tmp_path}/a.html" in capsys.readouterr().out


def test_the_terminal_has_a_row_for_each_kind_and_on_request_for_each_layer(
    pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "input_layernorm")
    outside = ("embed_tokens", "lm_head")
    assert run(*pair) == cli.DONE
    text = capsys.readouterr().out
    assert text.startswith("tuned against base\n- Sparse in bf16: ")
    for kind in (*kinds, *outside, "all"):
        assert re.search(rf"^{kind} +\d+ ", text, re.M), kind
    assert "Striped by rows" in text and "layer 1" not in text and "\x1b" not in text
    assert run(*pair, "--per-layer") == cli.DONE
    text = capsys.readouterr().out
    for row in ("layer 0", "layer 1", "outside"):
        assert re.search(rf"^{row} +\d+ ", text, re.M), row


class Terminal:
    """A stderr that says whether it is a terminal."""

    def __init__(self, tty: bool) -> None:
        self.tty, self.text = tty, ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return self.tty


@pytest.mark.parametrize("tty", [True, False])
def test_progress_is_shown_on_a_terminal_alone(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tty: bool
) -> None:
    stream = Terminal(tty)
    monkeypatch.setattr(sys, "stderr", stream)
    assert run(*pair, "--probes", "sparsity") == cli.DONE
    if not tty:
        assert stream.text == ""
        return
    lines = [line for line in stream.text.split("\r") if line]
    assert len(lines) == len(base_model()) and stream.text.endswith("\n") and stream.text.count("\n") == 1
    shares = [int(line.split(" %")[0]) for line in lines]
    assert shares == sorted(shares) and shares[-1] == 100
    assert all("model." in line or "lm_head" in line for line in lines) and max(map(len, lines)) <= 80


# ---- adapters


def test_an_adapter_folder_is_merged_and_audited(
    adapters: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (adapters["base"], adapters["off"], adapters["plain"], "--json", tmp_path / "a.json")
    assert run(*words) == cli.DONE
    told = capsys.readouterr().out
    assert "off against base" in told and "plain against base" in told
    found = read_json_report(tmp_path / "a.json")
    with open_checkpoint(adapters["base"]) as base:
        sides = [open_adapter(adapters[name], base) for name in ("off", "plain")]
        expected = audit(base, *sides)
    assert timeless(to_json(found)) == timeless(to_json(expected))
    plain = {weight.name for weight in found.weights if weight.changes[1].changed}
    assert plain and all("q_proj" in name for name in plain)
    assert found.verdicts[0].direction == "off-principal"


def test_an_adapter_by_its_name(adapters: dict[str, Path], tmp_path: Path) -> None:
    norms = []
    for name in ("default", "second"):
        out = tmp_path / f"{name}.json"
        words = (adapters["base"], adapters["plain"], "--adapter-name", name, "--probes", "sparsity", "--json", out)
        assert run(*words) == cli.DONE
        norms.append([weight.changes[0].norm for weight in read_json_report(out).weights])
    assert norms[0] != norms[1]


def test_an_adapter_by_its_file_and_one_of_a_folder_that_holds_only_named_ones(
    adapters: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """PEFT saves every adapter that is not called default into a subfolder of its name."""
    named = tmp_path / "named"
    shutil.copytree(adapters["plain"] / "second", named / "second")
    given = (
        [adapters["plain"] / "second"],
        [adapters["plain"] / "second" / "adapter_model.safetensors"],
        [named, "--adapter-name", "second"],
    )
    norms = []
    for i, words in enumerate(given):
        out = tmp_path / f"{i}.json"
        assert run(adapters["base"], *words, "--probes", "sparsity", "--json", out) == cli.DONE, words
        norms.append([weight.changes[0].norm for weight in read_json_report(out).weights])
    assert norms[0] == norms[1] == norms[2] and any(norms[0])
    capsys.readouterr()
    assert run(adapters["base"], named) == cli.MISTAKE
    assert "It holds saved adapters in second: name one." in capsys.readouterr().err
    shutil.copy(adapters["base"] / "config.json", named)
    (named / "model.safetensors").write_bytes(b"cut")  # a model of its own: that is what is wrong
    assert run(adapters["base"], named) == cli.MISTAKE
    assert "model.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["off", "base"], "holds a PEFT adapter"),
        (["base", "plain", "--adapter-name", "third"], "third"),
    ],
)
def test_adapters_that_are_refused(
    adapters: dict[str, Path], capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert run(*(adapters.get(word, word) for word in words)) == cli.MISTAKE
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


# ---- interruptions


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["work", "json", "page"])
def test_an_interrupted_audit_leaves_no_partial_file(
    pair: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    place = {"work": "audit.run._Work.weight", "json": "audit.storing.os.replace", "page": "audit.storing.os.replace"}
    option = "--html" if where == "page" else "--json"
    (tmp_path / "a").write_text("as it was")
    monkeypatch.setattr(f"offprincipal_peft.{place[where]}", interrupt)
    assert run(*pair, "--probes", "sparsity", option, tmp_path / "a") == cli.INTERRUPTED
    assert "interrupted" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "as it was"


INTERRUPTED_CHILD = """
import os, signal, sys
from offprincipal_peft import cli
from offprincipal_peft.audit import run
run._Work.weight = lambda *_: os.kill(os.getpid(), signal.SIGINT)
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of another kind")
def test_ctrl_c_in_a_process_of_its_own(pair: tuple[Path, Path], tmp_path: Path) -> None:
    words = [sys.executable, "-c", INTERRUPTED_CHILD, "audit", *map(str, pair), "--json", str(tmp_path / "a.json")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (cli.INTERRUPTED, ""), done.stderr
    assert "interrupted" in done.stderr and "Traceback" not in done.stderr and not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_every_option_reaches_the_library(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: dict[str, Any] = {}
    real: Callable[..., Any] = audit
    monkeypatch.setattr(
        "offprincipal_peft.audit.audit", lambda *sides, **options: given.update(options) or real(*sides, **options)
    )
    assert run(*pair, "--device", "cpu", "--mode", "exact", "--rank", ".5", "--probes", "sparsity") == cli.DONE
    assert given == {
        **{"probes": ["sparsity"], "layers": [], "rank": 0.5, "mode": "exact", "device": "cpu"},
        **{"principal_density": 0.5, "low_density": 0.5859, "progress": None},
    }
    for words in (["--rank", "two"], ["--rank", ""]):
        with pytest.raises(SystemExit):
            run(*pair, *words)
        error = capsys.readouterr().err
        assert f"argument --rank: {words[1]!r} is neither a number of directions nor a fraction" in error
    assert command._rank("16") == 16 and type(command._rank("16")) is int
