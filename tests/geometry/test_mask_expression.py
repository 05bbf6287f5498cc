"""The grammar: what it accepts, how it binds, where it points when it refuses."""

import pytest

from offprincipal_peft.geometry.mask_expression import MaskExpressionError, atoms, fold, parse

EQUIVALENT = [
    ("low|~principal", "low | (~principal)"),
    ("low | principal & random", "low | (principal & random)"),
    ("low & principal | random", "(low & principal) | random"),
    ("~low & principal", "(~low) & principal"),
    ("~~low", "~(~low)"),
    ("((safe))", "safe"),
    ("random( matched(principal) )", "random(matched(principal))"),
    ("low | principal | random", "(low | principal) | random"),
]


@pytest.mark.parametrize(("one", "other"), EQUIVALENT)
def test_equivalent_texts(one: str, other: str) -> None:
    assert parse(one) == parse(other)


@pytest.mark.parametrize("text", [text for pair in EQUIVALENT for text in pair])
def test_printing_and_parsing_again_changes_nothing(text: str) -> None:
    assert parse(str(parse(text))) == parse(text)


REFUSED = [
    ("", 0, "found the end"),
    ("  ", 2, "found the end"),
    ("low |", 5, "found the end"),
    ("| low", 0, "found '|'"),
    ("low low", 4, "found 'low'"),
    ("(low", 4, r"expected ')'"),
    ("low)", 3, r"found ')'"),
    ("lwo", 0, "unknown mask 'lwo'; there are principal, low, safe, random"),
    ("low & $", 6, "unexpected character '$'"),
    ("low(principal)", 3, "'low' takes no argument"),
    ("matched", 0, "needs an argument, for instance matched(principal)"),
    ("thinned()", 8, r"found ')'"),
    ("low && safe", 5, "found '&'"),
    ("__import__('os')", 0, "unknown mask '__import__'"),
    ("low.__class__", 3, "unexpected character '.'"),
    ("~" * 200 + "low", 100, "nested"),
]


@pytest.mark.parametrize(("text", "position", "words"), REFUSED)
def test_a_malformed_expression_is_pointed_at(text: str, position: int, words: str) -> None:
    with pytest.raises(MaskExpressionError) as caught:
        parse(text)
    assert caught.value.position == position
    assert words in str(caught.value)
    caret = str(caught.value).splitlines()[-1]
    assert caret == "  " + " " * position + "^"


def test_only_text_is_parsed() -> None:
    with pytest.raises(TypeError, match="got int"):
        parse(3)  # type: ignore[arg-type]


def test_atoms_and_folding() -> None:
    assert atoms(parse("random(safe) & ~random")) == {"low", "principal", "random"}
    truth = {"low": True, "principal": False, "safe": True, "random": False}
    for text in ("low & ~principal | random", "~(low | random) | safe", "~~low & ~random"):
        value = fold(
            parse(text),
            atom=truth.__getitem__,
            negate=lambda x: not x,
            combine=lambda op, x, y: (x and y) if op == "&" else (x or y),
            call=lambda _, x: x,
        )
        python = text.replace("~", " not ").replace("&", "and").replace("|", "or")
        assert value == eval(python, {}, truth)  # of this test's own three texts
