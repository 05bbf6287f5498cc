"""``offprincipal patch``: every action, its output, its exit codes and what it says where something is wrong."""

import json
import re
import sys
from pathlib import Path

import pytest

from interop.patches.twins import State, hash_of, listing, load, model_state, next_state, same, write
from offprincipal_peft import cli

Case = tuple[Path, list[State]]
Captured = pytest.CaptureFixture[str]


def run(*words: object) -> int:
    return cli.main(["patch", *map(str, words)])


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[State]:
    """The working folder holds the states 0, 1 and 2 as folders."""
    monkeypatch.chdir(tmp_path)
    states = [model_state()]
    states += [next_state(states[0], 1)]
    states += [next_state(states[1], 30)]
    for i, state in enumerate(states):
        write(tmp_path / str(i), state, "sharded")
    return states


@pytest.fixture
def chain(case: list[State], capsys: Captured) -> list[State]:
    Path("chain").mkdir()
    assert run("anchor", "0", "chain/anchor-00000000.safetensors") == cli.DONE
    assert run("make", "0", "1", "chain/patch-00000001.safetensors") == cli.DONE
    words = ("--base-step", 1, "--positions", "chain/patch-00000001.safetensors")
    assert run("make", "1", "2", "chain/patch-00000002.safetensors", *words) == cli.MISTAKE  # other entries changed
    assert "make a sparse patch" in capsys.readouterr().err
    assert run("make", "1", "2", "chain/patch-00000002.safetensors", "--base-step", 1) == cli.DONE
    capsys.readouterr()
    return case


def test_make_and_apply(case: list[State], capsys: Captured) -> None:
    assert run("make", "0", "1", "p.safetensors") == cli.DONE
    size = Path("p.safetensors").stat().st_size
    assert capsys.readouterr().out == (
        f"p.safetensors: sparse, step 0 to 1, 62 of 982 entries (6.3136 %) in 3 tensors, {size:,} bytes; "
        f"state {hash_of(case[1])}\n"
    )
    assert run("apply", "0", "p.safetensors") == cli.DONE
    assert capsys.readouterr().out == f"0: step 1, 62 entries set, 2 files written; state {hash_of(case[1])}\n"
    assert same(load(Path("0")), case[1])


def test_make_numbers_and_overwrites(case: list[State], capsys: Captured) -> None:
    assert run("make", "0", "1", "p.safetensors", "--base-step", 4, "--step", 9) == cli.DONE
    assert "step 4 to 9" in capsys.readouterr().out
    assert run("make", "0", "1", "p.safetensors") == cli.MISTAKE
    assert capsys.readouterr().err == (
        "error: p.safetensors exists; give another name, or overwrite=True (--overwrite).\n"
    )
    assert run("make", "0", "1", "p.safetensors", "--overwrite") == cli.DONE
    assert run("make", "0", "1", "q.safetensors", "--step", 0) == cli.MISTAKE
    assert "step 0 must come after base_step 0" in capsys.readouterr().err
    assert run("anchor", "0", "p.safetensors", "--overwrite", "--step", 3) == cli.DONE
    assert "p.safetensors: full, step 3, 982 of 982 entries (100.0000 %) in 7 tensors" in capsys.readouterr().out


def test_positions(case: list[State], capsys: Captured) -> None:
    assert run("make", "0", "1", "p.safetensors") == cli.DONE
    assert run("make", "0", "1", "v.safetensors", "--positions", "p.safetensors") == cli.DONE
    assert "v.safetensors: values, step 0 to 1, 62 of 982 entries" in capsys.readouterr().out
    assert run("apply", "0", "v.safetensors") == cli.DONE and same(load(Path("0")), case[1])


def test_apply_a_chain(chain: list[State], capsys: Captured) -> None:
    for step in (1, 2, 0):
        assert run("apply", "0", "chain", "--step", step) == cli.DONE
        assert same(load(Path("0")), chain[step])
    assert run("apply", "0", "chain") == cli.DONE and same(load(Path("0")), chain[2])
    capsys.readouterr()
    assert run("apply", "0", "chain") == cli.DONE
    assert capsys.readouterr().out == "0 is at step 2 already; nothing was written\n"


def test_apply_to_a_copy(chain: list[State], capsys: Captured) -> None:
    before = listing(Path("0"))
    assert run("apply", "0", "chain", "--out", "new") == cli.DONE
    assert listing(Path("0")) == before and same(load(Path("new")), chain[2])
    assert run("apply", "0", "chain/patch-00000001.safetensors", "--out", "new") == cli.MISTAKE
    assert capsys.readouterr().err == "error: new exists; give the name of a new folder.\n"


def test_apply_refuses(chain: list[State], capsys: Captured) -> None:
    before = listing(Path("0"))
    first, second = "chain/patch-00000001.safetensors", "chain/patch-00000002.safetensors"
    for words, message in (
        (("0", second), "0 is not what chain/patch-00000002.safetensors was made for"),
        (("0", "chain", first), "chain is a folder; give one folder that holds a chain, or patch files"),
        (("0", first, "--step", 1), "--step chooses a step of a chain; give the chain's folder, or leave it out"),
        (("0", "chain", "--step", 5), "chain has no step 5; it has 3 steps from 0 to 2, the nearest is 2"),
        (("0", "nothing.safetensors"), "nothing.safetensors is no file; give a patch that `offprincipal patch make`"),
        (("0", "1/model-00001-of-00003.safetensors"), "is a safetensors file but no patch"),
        (("0", "1"), "1 holds no anchor-*.safetensors and no patch-*.safetensors: it is no chain"),
        (("nothing", first), "nothing does not exist; give a model's folder"),
        (("chain/anchor-00000000.safetensors", first), "is a patch and not a checkpoint to change"),
    ):
        assert run("apply", *words) == cli.MISTAKE, words
        said = capsys.readouterr().err
        assert said.startswith("error: ") and message in said and said.count("\n") == 1, said
    assert listing(Path("0")) == before


def test_verify(chain: list[State], capsys: Captured) -> None:
    assert run("verify", "chain", "chain/patch-00000001.safetensors", "--target", "1") == cli.DONE
    assert capsys.readouterr().out == (
        "chain: 1 anchor and 2 patches, whole and without a gap\n"
        "chain/patch-00000001.safetensors: whole\n"
        "1: in one of these states\n"
    )
    assert run("verify", "chain/patch-00000001.safetensors", "--target", "2") == cli.MISTAKE
    said = capsys.readouterr()
    assert f"2 is in the state {hash_of(chain[2])}, with which none of these begins or ends" in said.err
    path = Path("chain/patch-00000001.safetensors")
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 64]))
    for words in (("chain",), (str(path),)):
        assert run("verify", *words) == cli.MISTAKE
        assert "patch-00000001.safetensors is damaged: its bytes do not have the digest" in capsys.readouterr().err


def test_info(chain: list[State], capsys: Captured) -> None:
    assert run("info", "chain") == cli.DONE
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "chain/anchor-00000000.safetensors", "chain/patch-00000001.safetensors", "chain/patch-00000002.safetensors",
    ]  # fmt: skip
    assert run("info", "chain/patch-00000001.safetensors", "--tensors") == cli.DONE
    rows = capsys.readouterr().out.splitlines()[1:]
    assert [row.split() for row in rows if "a.weight" in row] == [["a.weight", "(37,", "11)", "40", "9.8280", "%"]]
    assert len(rows) == 3


def test_info_as_json(chain: list[State], capsys: Captured) -> None:
    assert run("info", "chain", "--json") == cli.DONE
    found = json.loads(capsys.readouterr().out)
    assert [(info["kind"], info["step"], info["base_step"]) for info in found] == [
        ("full", 0, None), ("sparse", 1, 0), ("sparse", 2, 1),
    ]  # fmt: skip
    path = Path("chain/patch-00000001.safetensors")
    assert found[1] == {
        "path": str(path),
        "kind": "sparse",
        "step": 1,
        "base_step": 0,
        "base": hash_of(chain[0]),
        "result": hash_of(chain[1]),
        "digest": found[1]["digest"],
        "indices_of": None,
        "total": 982,
        "shapes": {"a.weight": [37, 11], "c.cube": [3, 5, 7], "f.codes": [129]},
        "entries": {"a.weight": 40, "c.cube": 10, "f.codes": 12},
        "nbytes": path.stat().st_size,
        "count": 62,
        "density": 62 / 982,
    }


def test_restore(chain: list[State], capsys: Captured) -> None:
    for words, step in (((), 2), (("--step", 1), 1), (("--step", 0), 0)):
        assert run("restore", "chain", f"out-{step}", *words) == cli.DONE
        assert same(load(Path(f"out-{step}")), chain[step])
        assert f"out-{step}: step {step}, " in capsys.readouterr().out
    assert run("restore", "chain", "out-1") == cli.MISTAKE
    assert capsys.readouterr().err == "error: out-1 exists; give the name of a new folder.\n"


def test_an_unfinished_change_of_the_target_is_told(chain: list[State], capsys: Captured) -> None:
    Path("0/.offprincipal-patch.json").write_text("{")
    assert run("apply", "0", "chain") == cli.MISTAKE
    assert "was left by an interrupted change and cannot be used" in capsys.readouterr().err


def test_a_full_disk_is_a_mistake_without_a_traceback(
    case: list[State], capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert run("make", "0", "1", "p.safetensors") == cli.MISTAKE
    said = capsys.readouterr().err
    assert said == (
        "error: writing p.safetensors failed: [Errno 28] No space left on device. What was there is as it was.\n"
    )


def test_progress_on_a_terminal_alone(chain: list[State], capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("make", "0", "1", "p.safetensors") == cli.DONE
    assert not capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    for words in (
        ("make", "0", "1", "q.safetensors"),
        ("anchor", "0", "a.safetensors"),
        ("apply", "0", "p.safetensors"),
        ("verify", "p.safetensors", "--target", "0"),
        ("restore", "chain", "out"),
    ):
        assert run(*words) == cli.DONE
        said = capsys.readouterr().err
        assert said.endswith("\r100 %\n") and said.count("\n") == 1, words


def test_an_error_begins_on_a_line_of_its_own(
    case: list[State], capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not behind the per cent that were done until then."""
    assert run("make", "0", "1", "p.safetensors") == cli.DONE
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    capsys.readouterr()
    assert run("make", "0", "2", "v.safetensors", "--positions", "p.safetensors") == cli.MISTAKE
    said = capsys.readouterr().err
    assert said.count("%") and "\nerror: " in said


def test_words_that_are_missing_or_unknown(case: list[State], capsys: Captured) -> None:
    for words in ((), ("make", "0", "1"), ("apply", "0"), ("make", "0", "1", "p.safetensors", "--dense"), ("diff",)):
        with pytest.raises(SystemExit) as ended:
            run(*words)
        assert ended.value.code == cli.MISTAKE and "usage: offprincipal" in capsys.readouterr().err
    for action in ("make", "anchor", "apply", "verify", "info", "restore"):
        with pytest.raises(SystemExit) as ended:
            run(action, "--help")
        assert ended.value.code == 0 and f"usage: offprincipal patch {action}" in capsys.readouterr().out


def test_every_option_of_every_action_is_in_the_reference() -> None:
    section = (Path(__file__).parents[1] / "docs/api.md").read_text().partition("## Command line")[2]
    actions = next(action for action in cli._parser()._actions if isinstance(action.choices, dict))
    actions = next(action for action in actions.choices["patch"]._actions if isinstance(action.choices, dict))
    for name, parser in actions.choices.items():
        row = next(line for line in section.splitlines() if line.startswith(f"| `{name} "))
        options = {option for action in parser._actions for option in action.option_strings} - {"-h", "--help"}
        assert set(re.findall(r"--[a-z-]+", row)) == options, name
