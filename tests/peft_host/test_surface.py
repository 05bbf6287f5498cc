"""Every call of PEFT's surface with every method, and the page that says so."""

import pytest

from peft_host import surface
from peft_host.surface import COLUMNS, ELSEWHERE, PAGE, Method, Refusal, public_calls, registry

CELLS = [(call, key) for call in registry() for key in COLUMNS]


@pytest.mark.parametrize(("call", "key"), CELLS, ids=[f"{call}-{key}" for call, key in CELLS])
def test_the_call_gives_what_a_user_of_lora_expects(tmp_path, call, key):
    entry, method = registry()[call], COLUMNS[key]
    refusal = entry.refused.get(key)
    if refusal is None:
        entry.check(method, tmp_path)
        return
    with pytest.raises(refusal.error) as caught:
        entry.check(method, tmp_path)
    missing = [part for part in refusal.says if part not in str(caught.value)]
    assert not missing, f"the message lacks {missing}: {caught.value}"


def _plain(call: str) -> str:
    return call.split("(")[0]


def test_no_public_call_is_missing_from_the_table():
    missing = public_calls() - {_plain(call) for call in registry()}
    assert not missing, f"PEFT has calls without a check: {', '.join(sorted(missing))}"


def test_every_entry_is_a_call_that_peft_has():
    import peft.helpers
    import peft.optimizers
    import peft.utils.hotswap

    spaces = (peft, peft.functional, peft.helpers, peft.optimizers, peft.utils.hotswap, peft.tuners.lora)
    for call in {*map(_plain, registry()), *ELSEWHERE}:
        name, _dot, attribute = call.partition(".")
        found = next((getattr(space, name) for space in spaces if hasattr(space, name)), None)
        assert found is not None and (not attribute or hasattr(found, attribute)), call


def test_refusals_say_something():
    for entry in registry().values():
        assert "lora" not in entry.refused, f"{entry.call}: LoRA's column is what the others are measured by"
        for refusal in entry.refused.values():
            assert isinstance(refusal, Refusal) and refusal.says and all(refusal.says) and refusal.reason


def test_the_page_is_what_the_registry_renders():
    page = PAGE.read_text()
    assert page == surface.with_table(page), "run python tests/peft_host/surface.py"


def test_a_missing_call_and_a_changed_page_are_noticed(monkeypatch):
    registry()
    monkeypatch.delitem(surface.REGISTRY, "PeftModel.get_layer_status")
    with pytest.raises(AssertionError, match=r"PeftModel\.get_layer_status"):
        test_no_public_call_is_missing_from_the_table()
    with pytest.raises(AssertionError, match=r"surface\.py"):
        test_the_page_is_what_the_registry_renders()


def test_a_wrong_outcome_and_an_unexpected_message_are_noticed(tmp_path, monkeypatch):
    registry()

    def fails(method: Method, folder: object) -> None:
        raise ValueError("it does not work")

    entry = surface.Entry("x", fails, {"sparse": Refusal(ValueError, ("because",), "no")})
    monkeypatch.setitem(surface.REGISTRY, "x", entry)
    with pytest.raises(ValueError, match="does not work"):
        test_the_call_gives_what_a_user_of_lora_expects(tmp_path, "x", "plain")
    with pytest.raises(AssertionError, match="lacks"):
        test_the_call_gives_what_a_user_of_lora_expects(tmp_path, "x", "sparse")
