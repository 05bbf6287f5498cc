"""The text whose loss says what was forgotten: the package's own, or a file."""

from pathlib import Path

import pytest

from offprincipal_peft.rlvr.checks import check_trials
from offprincipal_peft.rlvr.config import TrialConfig
from offprincipal_peft.rlvr.evaluation import OTHER_TEXT, other_text
from offprincipal_peft.rlvr.trial import run_trial
from tiny_trials import save_tiny_task, tiny_trial


def test_a_file_or_the_package_s_own_page(tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text("a b c\n")
    assert other_text(str(own)) == "a b c\n" and other_text("") == OTHER_TEXT.read_text(encoding="utf-8")
    own.write_bytes(b"\xff\xfe\xff")
    for path, why in ((own, "invalid start byte"), (tmp_path / "no.txt", "No such file"), (tmp_path, "directory")):
        with pytest.raises(ValueError, match=f"other_text='.*' cannot be read as text: .*{why}"):
            other_text(str(path))


def test_trials_keep_their_names_without_one() -> None:
    plain = TrialConfig("lora", 1e-4)
    assert plain.trial_id == "lora-lr0.0001-s0-05b09a86"  # as before the field was there
    assert TrialConfig("lora", 1e-4, other_text="x").trial_id != plain.trial_id
    with pytest.raises(ValueError, match="other_text=3: it is text, the path of a file, or empty"):
        TrialConfig("lora", 1e-4, other_text=3)  # type: ignore[arg-type]


def test_the_loss_is_of_the_file_s_text_and_a_bad_one_is_told_before_training(tmp_path: Path) -> None:
    folder = save_tiny_task(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("1+1=2\n" * 20)

    def trial(**fields: str) -> TrialConfig:
        return TrialConfig.from_dict(
            {**tiny_trial(folder), "method": "lora", "learning_rate": 1e-3, "steps": 1, **fields}
        )

    check = check_trials()
    found = [run_trial(config) for config in (trial(), trial(other_text=str(text)))]
    assert [record["status"] for record in found] == ["finished"] * 2
    first, second = (record["result"]["forgetting_base"] for record in found)
    assert first != second
    check(trial(other_text=str(text)))
    (tmp_path / "empty.txt").write_text("")
    for name, why in (("no.txt", "cannot be read as text"), ("empty.txt", "the text has 0 tokens")):
        with pytest.raises(ValueError, match=why):
            check(trial(other_text=str(tmp_path / name)))
