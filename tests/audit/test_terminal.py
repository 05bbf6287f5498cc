"""The plain report fits its width, says what the report says, and stays readable where a stream has only ASCII."""

import dataclasses
import re

import pytest

from audit.reports import KINDS, report
from offprincipal_peft.audit.results import Verdict
from offprincipal_peft.audit.tables import share_text
from offprincipal_peft.audit.terminal import terminal_report

CASES = {
    "one": report(),
    "five": report(2, ("rl", "sft", "c", "d", "e")),
    "deep": report(80, kinds=("q_proj",)),
    "still": report(1, still=True),
    "counts only": report(2, probes=("bf16",)),
    "outside alone": report(0),
    "nothing": dataclasses.replace(report(1), weights=[], skipped=[]),
}


def rows(text: str) -> dict[str, list[str]]:
    """The table rows of the first checkpoint, by name."""
    found: dict[str, list[str]] = {}
    for line in text.split("\n\n")[1].splitlines():
        name, *cells = re.split(r"\s{2,}", line)
        found.setdefault(name, cells)
    return found


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "no-such-encoding"])
@pytest.mark.parametrize("width", [40, 100, 117])
@pytest.mark.parametrize("case", CASES)
def test_every_line_fits(case: str, width: int, encoding: str) -> None:
    text = terminal_report(CASES[case], width, layers=True, encoding=encoding)
    assert max(map(len, text.splitlines())) <= width
    assert encoding == "utf-8" or text.isascii()
    assert not re.search(r"\b(nan|inf|None)\b", text) and not text.endswith("\n")
    for verdict in CASES[case].verdicts:
        for sentence in verdict.sentences:
            assert sentence in re.sub(r"\s+", " ", text)


def test_the_numbers_are_those_of_the_report() -> None:
    made = report(3)
    found = rows(terminal_report(made))
    assert set(found) >= {*KINDS, "embed_tokens", "norm", "all"}
    weights = [weight for weight in made.weights if weight.kind == "q_proj"]
    changes = [weight.changes[0] for weight in weights]
    sparsity = 100 * (1 - sum(c.changed for c in changes) / sum(w.entries for w in weights))
    assert found["q_proj"][:2] == ["3", f"{sparsity:.1f}"]
    norms = (sum(c.norm**2 for c in changes) / sum(w.norm**2 for w in weights)) ** 0.5
    assert float(found["q_proj"][2].replace("−", "-")) == pytest.approx(norms, rel=0.05)
    assert found["embed_tokens"][3:] == ["–"] * 6
    on, changed = sum(c.low.value * c.changed for c in changes if c.low), sum(c.changed for c in changes)
    assert found["q_proj"][7] == f"{on / changed / 0.3:.2f}"
    largest = max(c.angles.output[-1] for c in changes if c.angles) * 57.29577951308232
    assert float(found["q_proj"][4].split("/")[0]) == pytest.approx(largest, rel=0.05)


def test_layers_are_shown_where_asked_for() -> None:
    text = terminal_report(report(12), layers=True)
    assert all(f"\nlayer {i} " in text for i in range(12)) and "\noutside " in text
    assert "layer 0 " not in terminal_report(report(12))


def test_skipped_tensors_are_counted_by_reason() -> None:
    text = re.sub(r"\s+", " ", terminal_report(report(1)))
    assert "Not compared: 4 tensors - 3: missing in tuned (model.layers.0.rotary.inv_freq, " in text
    assert "- 1: tied: the same content as model.embed_tokens.weight in base" in text
    assert "Error: singular values to 2e-7 of the largest. 12.5 s on cpu." in text


def test_a_narrow_terminal_says_what_it_leaves_out() -> None:
    text = terminal_report(report(2), 50)
    assert (
        re.search(r"No room for: .*M_low/chance", text.replace("\n", " ")) and "M_low/ " not in text.split("No room")[0]
    )
    with pytest.raises(ValueError, match="needs 40 columns, got a width of 39"):
        terminal_report(report(1), 39)


def test_columns_that_nothing_fills_are_left_out() -> None:
    text = terminal_report(CASES["counts only"])
    assert "NSS" not in text and "M_low" not in text and "same in" in text


def test_colour_adds_codes_and_nothing_else() -> None:
    coloured = terminal_report(report(2), color=True)
    assert "\x1b[1m" in coloured
    assert re.sub(r"\x1b\[\d+m", "", coloured) == terminal_report(report(2))


def test_ascii_spells_the_symbols_out() -> None:
    verdict = Verdict("none", "none", "unknown", "unknown", "unknown", ["‖ΔW‖₂ ≤ 3 σ × 2°, 90 ± 1 − ☃."])
    made = dataclasses.replace(report(1), verdicts=[verdict])
    assert verdict.sentences[0] in terminal_report(made)
    text = terminal_report(made, encoding="latin-1")
    assert "|dW|_2 <= 3 s x 2 deg, 90 +- 1 - ?." in text


def test_every_note_of_a_column_stands_alone() -> None:
    """A column that nothing fills is left out, and its note with it."""
    changes = [dataclasses.replace(weight.changes[0], principal=None, matched=None) for weight in report(1).weights]
    weights = [dataclasses.replace(w, changes=[c]) for w, c in zip(report(1).weights, changes, strict=True)]
    text = re.sub(r"\s+", " ", terminal_report(dataclasses.replace(report(1), weights=weights)))
    assert "M_princ" not in text and "the same for" not in text
    assert "M_low/chance: share of the changed entries on the mask of the smallest weights, over its density." in text


def test_names_cannot_steer_the_terminal() -> None:
    """Names come from files; one may hold the code that clears a screen."""
    made = report(1, ("a\x1b[2J",), kinds=("q_proj",))
    weight = dataclasses.replace(made.weights[1], kind="\x1b]0;x\x07q", name="n\x1b[2J", notes=["odd\x9b"])
    made = dataclasses.replace(made, weights=[weight], skipped=[("t\x1b[2J", "b\x08ad")])
    for color in (False, True):
        text = terminal_report(made, color=color, layers=True).replace("\x1b[1m", "").replace("\x1b[0m", "")
        assert "�[2J" in text and not [c for c in text if not c.isprintable() and c != "\n"]


def test_long_audits_last_seconds() -> None:
    assert terminal_report(dataclasses.replace(report(1), seconds=5321.4)).endswith("5,321 s on cpu.")
    assert terminal_report(dataclasses.replace(report(1), seconds=0.0123)).endswith("0.0123 s on cpu.")


def test_shares_next_to_none_and_all() -> None:
    values = (0.0, 2e-9, 0.5, 1 - 2e-4, 1 - 2e-9, 1 - 1e-16, 1.0, 1.0000000000000002)
    shown = ["0.0", "0.00000020", "50.0", "99.980", "99.99999980", "100.0", "100.0", "100.0"]
    assert [share_text(v) for v in values] == shown
