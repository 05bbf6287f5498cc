"""What a sweep shows: readable lines where there is no terminal, a table where there is one."""

import io
import math

import pytest

from offprincipal_peft.rlvr.progress import BARS, SweepProgress, spark

NAMES = {"id-a": "lora lr 1e-4", "id-b": "rlpo"}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def sweep(steps: int = 6) -> list[dict]:
    """Events of two trials as a sweep sends them: one finishes, one fails after a retry."""
    trial = {"event": "trial", "total": 3}
    events = [
        {"event": "waiting"},
        {**trial, "id": "id-a", "state": "started", "done": 0},
        {"event": "stage", "id": "id-a", "stage": "task"},
        {"event": "stage", "id": "id-a", "stage": "model"},
        {"event": "evaluation", "id": "id-a", "step": 0, "split": "test", "accuracy": 0.125, "kl": 0.0},
        {"event": "stage", "id": "id-a", "stage": "train"},
    ]
    for step in range(1, steps + 1):
        row = {"event": "step", "id": "id-a", "step": step, "steps": steps, "step_s": 0.5, "loss": 0.1}
        events.append({**row, "reward": step / steps})
    return [
        *events,
        {"event": "evaluation", "id": "id-a", "step": steps, "split": "test", "accuracy": 0.5, "kl": 0.01234},
        {"event": "finished", "id": "id-a", "result": {}, "error": None},
        {**trial, "id": "id-a", "state": "finished", "done": 1},
        {**trial, "id": "id-b", "state": "started", "done": 1},
        {**trial, "id": "id-b", "state": "retry", "done": 1, "message": "the process was killed"},
        {**trial, "id": "id-b", "state": "failed", "done": 2, "message": "KeyError in mine.py: [/a] [b]"},
        {**trial, "id": "unknown", "state": "started", "done": 2},
    ]


def shown(events: list[dict], stream: io.StringIO) -> SweepProgress:
    with SweepProgress(NAMES, stream) as progress:
        for event in events:
            progress(event)
    return progress


def test_lines_where_there_is_no_terminal():
    stream = io.StringIO()
    shown(sweep(), stream)
    first, *lines = stream.getvalue().splitlines()
    assert first == "another run is using this folder; waiting for it to end"
    assert all("\x1b" not in line and len(line) < 120 for line in lines)
    told = [line.split("s  ", 1)[1] for line in lines]  # without the seconds, which vary
    assert told == [
        "lora lr 1e-4  started (0/3 done)",
        "lora lr 1e-4  loading the model",
        "lora lr 1e-4  test accuracy 12.5% at step 0, KL 0.0000",
        "lora lr 1e-4  step   4/6  reward  0.417  ▂▃▅▆",  # the mean of the last four
        "lora lr 1e-4  step   6/6  reward  0.750  ▂▃▅▆▇█",
        "lora lr 1e-4  test accuracy 50.0% at step 6, KL 0.0123",
        "lora lr 1e-4  finished (1/3 done)",
        "rlpo          started (1/3 done)",
        "rlpo          retry (1/3 done) the process was killed",
        "rlpo          failed (2/3 done) KeyError in mine.py: [/a] [b]",
    ]


def test_a_long_trial_does_not_make_long_lines():
    stream = io.StringIO()
    shown(sweep(steps=1000), stream)
    assert max(map(len, stream.getvalue().splitlines())) < 120


def test_supervised_training_shows_its_loss_even_where_it_overflows():
    stream = io.StringIO()
    row = {"event": "step", "id": "id-b", "steps": 8, "reward": None, "step_s": 0.1}
    losses = [3.0, 2.0, 1.0, 2.0, math.nan, math.inf, 1.0, 1.0]
    shown([{**row, "step": n, "loss": loss} for n, loss in enumerate(losses, 1)], stream)
    first, second = (line.split("s  rlpo", 1)[1].strip() for line in stream.getvalue().splitlines())
    assert first == "step   4/8  loss  2.000  █▆▃▆"
    assert second == "step   8/8  loss    nan  █▆▃▆▃▃"


def test_a_second_attempt_starts_anew():
    events = sweep()
    again = {"event": "trial", "id": "id-a", "state": "started", "done": 0, "total": 3}
    progress = shown([*events[:10], again], io.StringIO())
    trial = progress.trials["id-a"]
    assert (trial.rewards, trial.accuracy, trial.step, trial.state) == ([], [], 0, "started")


def test_trials_done_before_are_said_once():
    stream = io.StringIO()
    shown([{"event": "trial", "id": "id-b", "state": "skipped", "done": 1, "total": 2}], stream)
    assert stream.getvalue().rstrip().endswith("rlpo          done before")


def test_a_table_on_a_terminal(monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    shown(sweep(), stream)
    text = stream.getvalue()
    assert "test accuracy" in text and "lora lr 1e-4" in text and "12.5% → 50.0%" in text and "6/6" in text
    assert "finished" in text and "failed" in text
    assert "started (0/3 done)" not in text  # the table alone, no lines between


def test_names_and_messages_with_brackets_are_shown_as_they_are(monkeypatch):
    """rich would read [/a] as a closing tag without its opening one, and [r=4] as a style."""
    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "160")
    stream = Terminal()
    with SweepProgress({"id-a": "lora [r=4]", "id-b": "rlpo"}, stream) as progress:
        for event in sweep():
            progress(event)
    assert "lora [r=4]" in stream.getvalue() and "KeyError in mine.py: [/a] [b]" in stream.getvalue()


def test_an_error_inside_the_block_ends_the_table(monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = Terminal()
    with pytest.raises(KeyboardInterrupt), SweepProgress(NAMES, stream):
        raise KeyboardInterrupt
    assert stream.getvalue().endswith("\x1b[?25h")  # the cursor is back


# ---- spark


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ([], ""),
        ([0.0], "▁"),
        ([0.0, 0.0], "▁▁"),
        ([1.0], "█"),
        ([0.5], "▅"),  # rewards have their own scale, from 0 to 1
        ([n / 7 for n in range(8)], BARS),
        ([0.0, 5.0, 10.0], "▁▅█"),
        ([-1.0, 1.0], "▁█"),
        ([-2.0, -1.0], "▁▃"),
        ([math.nan, math.inf, 1.0], "█"),
        ([math.nan], ""),
    ],
)
def test_spark(values, line):
    assert spark(values) == line
